"""Splash attention at its best block sizes against this project's kernel, routed and dense."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernels.benchmarks.schedule import cases
from kernels.benchmarks.schedule.compiler import CompileError, OutOfVmemError, schedule, versions
from kernels.benchmarks.schedule.cost import Cost, cost, measure

SPLASH = f"{cases.__name__}:splash"
GQE = f"{cases.__name__}:gqe"
DENSE = f"{cases.__name__}:dense"
# What the sweeps try: blocks of queries, blocks of keys, and the part of those computed at a time.
# Larger ones take many minutes to compile, each tile being unrolled.
FORWARD = tuple(
    {"block_q": q, "block_kv": kv, "block_kv_compute": compute}
    for q, kv, compute in (
        (512, 512, 512),
        (512, 1024, 512),
        (1024, 512, 512),
        *itertools.product((1024,), (1024,), (256, 512, 1024)),
        *itertools.product((1024,), (2048, 4096), (512, 1024)),
        *itertools.product((2048,), (1024, 2048), (512, 1024)),
        (2048, 2048, 2048),
        (2048, 4096, 1024),
    )
)
BACKWARD = tuple(
    {"block_q_dkv": q, "block_kv_dkv": kv, "block_kv_dkv_compute": compute}
    for q, kv, compute in (
        (512, 1024, 1024),
        (1024, 512, 512),
        (1024, 1024, 512),
        (1024, 1024, 1024),
        (1024, 2048, 1024),
    )
)
# dK and dV in one kernel, dQ in another: QK and dP are computed twice, and no size makes up for it.
APART = tuple(
    x | {"block_q_dq": x["block_q_dkv"], "block_kv_dq": x["block_kv_dkv"]} for x in BACKWARD[3:4]
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One head size and length on one chip.

    Attributes:
      training: the forward and the backward pass, not the forward alone.
      dense: of this project's kernel with every head computed, as splash attention does.
      sweep: estimated cycles of splash attention's kernels at all block sizes tried, least first.
    """

    chip: str
    head_dim: int
    length: int
    training: bool
    splash: Cost
    gqe: Cost
    dense: Cost
    sweep: dict[str, int]

    @property
    def ratio(self) -> float:
        """Static cycles of splash attention over those of the kernel."""
        return self.splash.cycles / self.gqe.cycles

    @property
    def dense_ratio(self) -> float:
        """Static cycles of the kernel run dense over those of the kernel routed."""
        return self.dense.cycles / self.gqe.cycles

    @property
    def issued_ratio(self) -> float:
        """The same without the cycles in which a core waits for a result."""
        return self.splash.issued / self.gqe.issued


@dataclasses.dataclass(frozen=True)
class _Tried:
    """Block sizes, and the cycles that the kernels they are for take at each length."""

    blocks: dict[str, int]
    cycles: dict[int, int]


@dataclasses.dataclass(frozen=True)
class _Sweep:
    chip: str
    head_dim: int
    lengths: tuple[int, ...]
    pool: ThreadPoolExecutor
    memory: Path | None
    progress: Callable[[str], None]


def compare(
    chip: str,
    head_dim: int,
    lengths: Sequence[int],
    *,
    training: bool = False,
    jobs: int = 1,
    memory: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Comparison]:
    """Comparisons at each length.

    The bundles of a region depend on the length only through addresses, so a sweep compiles for the
    longest one and counts executions for each; the winner is compiled again at its own length.

    Args:
      jobs: compiles at a time.
      memory: a file that keeps what the sweeps found, for later comparisons by the same libtpu.
    """
    with ThreadPoolExecutor(jobs) as pool:
        sweep = _Sweep(chip, head_dim, tuple(lengths), pool, memory, progress)
        forward = _try(sweep, "forward", FORWARD, ["splash_mha_fwd_no_residuals"])[0]
        backward = _backward(sweep) if training else []
        for length in lengths:
            passes = [[x for x in tried if length in x.cycles] for tried in (forward, backward)]
            blocks = {}
            for tried in filter(None, passes):
                blocks |= _best(tried, length).blocks
            progress(f"{chip}, D = {head_dim}, {length} tokens: splash at {_name(blocks)}, and GQE")
            shape = {"length": length, "head_dim": head_dim}
            splash = pool.submit(measure, SPLASH, chip, shape | blocks)
            if training:
                shape["training"] = True
            gqe, dense = (pool.submit(measure, case, chip, shape) for case in (GQE, DENSE))
            tried = sorted(itertools.chain(*passes), key=lambda x: x.cycles[length])
            yield Comparison(
                chip,
                head_dim,
                length,
                training,
                splash.result(),
                gqe.result(),
                dense.result(),
                {_name(x.blocks): x.cycles[length] for x in tried},
            )


def _backward(sweep: _Sweep) -> list[_Tried]:
    """Both ways: dQ by the kernel for dK and dV, and by one of its own.

    The two kernels of the second way are tried with the same blocks; the best of each go together.
    """
    of_keys, of_queries = "splash_mha_dkv_no_residuals", "splash_mha_dq_no_residuals"
    tried = _try(sweep, "backward in one kernel", BACKWARD, [of_keys])[0]
    keys, queries = _try(sweep, "backward in two kernels", APART, [of_keys, of_queries])
    for length in sweep.lengths:
        k, q = (_best([x for x in of if length in x.cycles], length) for of in (keys, queries))
        blocks = k.blocks | {name: q.blocks[name] for name in ("block_q_dq", "block_kv_dq")}
        tried.append(_Tried(blocks, {length: k.cycles[length] + q.cycles[length]}))
    return tried


def _try(
    sweep: _Sweep, what: str, candidates: Sequence[dict[str, int]], kernels: Sequence[str]
) -> list[list[_Tried]]:
    """For each kernel, all block sizes that fit in VMEM."""
    longest = max(sweep.lengths)
    candidates = [blocks for blocks in candidates if _divide(blocks, longest)]
    place = f"{sweep.chip}, D = {sweep.head_dim}, splash {what}"
    key = f"{place}, {sweep.lengths}"
    known = _recall(sweep.memory).get(key, {})
    new = [blocks for blocks in candidates if _name(blocks) not in known]
    like = None
    if new:
        first = {"length": longest, "head_dim": sweep.head_dim, **new[0]}
        like = schedule(SPLASH, sweep.chip, first)

    def cycles(blocks: dict[str, int]) -> dict[str, dict[str, int]] | None:
        """By length and kernel; the length as JSON has it."""
        options = {"head_dim": sweep.head_dim, **blocks}
        try:
            programs = schedule(SPLASH, sweep.chip, {"length": longest, **options}, like=like)
        except OutOfVmemError:
            return None
        counted = {}
        for length in sweep.lengths:
            if _divide(blocks, length):
                at = {"length": length, **options}
                case = cases.splash(**at)
                total = cost(programs, SPLASH, sweep.chip, at, case, same_grid=False).kernels()
                counted[str(length)] = {kernel: total[kernel] for kernel in kernels}
        return counted

    for i, found in enumerate(sweep.pool.map(cycles, new)):
        known[_name(new[i])] = found
        _keep(sweep.memory, key, known)
        shown = "does not fit in VMEM" if found is None else f"cycles by length {found}"
        sweep.progress(f"{place} {i + 1}/{len(new)}: {_name(new[i])}: {shown}")
    fit = [blocks for blocks in candidates if known[_name(blocks)] is not None]
    if not fit:
        raise CompileError(f"{place}: none of the block sizes fits in VMEM")
    return [
        [
            _Tried(blocks, {int(n): of[kernel] for n, of in known[_name(blocks)].items()})
            for blocks in fit
        ]
        for kernel in kernels
    ]


def _recall(memory: Path | None) -> dict:
    if memory is None or not memory.exists():
        return {}
    document = json.loads(memory.read_text())
    return document["sweeps"] if document["versions"] == versions() else {}


def _keep(memory: Path | None, key: str, known: dict) -> None:
    if memory is not None:
        sweeps = _recall(memory) | {key: known}  # another comparison may have written meanwhile
        memory.parent.mkdir(parents=True, exist_ok=True)
        document = {"versions": versions(), "sweeps": sweeps}
        memory.write_text(json.dumps(document, indent=1) + "\n")


def _divide(blocks: dict[str, int], length: int) -> bool:
    return all(length % size == 0 for size in blocks.values())


def _best(tried: Sequence[_Tried], length: int) -> _Tried:
    return min(tried, key=lambda x: x.cycles[length])


def _name(blocks: dict[str, int]) -> str:
    return ", ".join(f"{name.removeprefix('block_')} {size}" for name, size in blocks.items())
