"""Splash attention at its best block sizes against this project's kernel, routed and dense."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernels.benchmarks.schedule import cases
from kernels.benchmarks.schedule.compiler import CompileError, schedule, versions
from kernels.benchmarks.schedule.cost import Cost, cycles_at, measure

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


# Block sizes, with the cycles of the kernels that they are for, by length.
Tried = list[tuple[dict[str, int], dict[int, int]]]


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """Splash attention's kernels on one chip at many block sizes, compiled for the longest length.

    Attributes:
      memory: a file that keeps what was found, for later sweeps by the same libtpu.
    """

    chip: str
    head_dim: int
    lengths: tuple[int, ...]
    pool: ThreadPoolExecutor
    memory: Path | None
    progress: Callable[[str], None]

    def forward(self) -> Tried:
        return self._try("forward", FORWARD, "splash_mha_fwd_no_residuals")[0]

    def backward(self) -> Tried:
        """dQ by the kernel for dK and dV, and by one of its own with the same blocks."""
        of_keys, of_queries = "splash_mha_dkv_no_residuals", "splash_mha_dq_no_residuals"
        (tried,) = self._try("backward in one kernel", BACKWARD, of_keys)
        keys, queries = self._try("backward in two kernels", APART, of_keys, of_queries)
        for (blocks, of_k), (_, of_q) in zip(keys, queries, strict=True):
            tried.append((blocks, {length: of_k[length] + of_q[length] for length in of_k}))
        return tried

    def _try(self, what: str, candidates: Sequence[dict[str, int]], *kernels: str) -> list[Tried]:
        """For each kernel, all block sizes that fit in VMEM."""
        candidates = [blocks for blocks in candidates if _divide(blocks, max(self.lengths))]
        place = f"{self.chip}, D = {self.head_dim}, splash {what}"
        key = f"{place}, {self.lengths}"
        known = self._recall().get(key, {})
        new = [blocks for blocks in candidates if _name(blocks) not in known]
        like = None
        if new:
            first = {"length": max(self.lengths), "head_dim": self.head_dim, **new[0]}
            like = schedule(SPLASH, self.chip, first)

        def cycles(blocks: dict[str, int]) -> dict[int, dict[str, int]] | None:
            lengths = [length for length in self.lengths if _divide(blocks, length)]
            options = {"head_dim": self.head_dim, **blocks}
            return cycles_at(SPLASH, self.chip, lengths, options, like)

        for i, found in enumerate(self.pool.map(cycles, new)):
            known[_name(new[i])] = found
            self._keep(key, known)
            shown = "does not fit in VMEM" if found is None else f"cycles by length {found}"
            self.progress(f"{place} {i + 1}/{len(new)}: {_name(new[i])}: {shown}")
        fit = [(blocks, found) for blocks in candidates if (found := known[_name(blocks)])]
        if not fit:
            raise CompileError(f"{place}: none of the block sizes fits in VMEM")
        return [
            [(blocks, {int(n): of[kernel] for n, of in found.items()}) for blocks, found in fit]
            for kernel in kernels
        ]

    def _recall(self) -> dict:
        if self.memory is None or not self.memory.exists():
            return {}
        document = json.loads(self.memory.read_text())
        return document["sweeps"] if document["versions"] == versions() else {}

    def _keep(self, key: str, known: dict) -> None:
        if self.memory is not None:
            sweeps = self._recall() | {key: known}  # another comparison may have written meanwhile
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            document = {"versions": versions(), "sweeps": sweeps}
            self.memory.write_text(json.dumps(document, indent=1) + "\n")


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
    """Comparisons at each length, the best block sizes compiled again at their own length.

    Args:
      jobs: compiles at a time.
      memory: a file that keeps what the sweeps found, for later comparisons by the same libtpu.
    """
    with ThreadPoolExecutor(jobs) as pool:
        sweep = _Sweep(chip, head_dim, tuple(lengths), pool, memory, progress)
        passes = [sweep.forward(), *([sweep.backward()] if training else [])]
        for length in lengths:
            # Each pass with its cycles at this length, the fastest first.
            tried = [
                sorted(
                    ((blocks, of[length]) for blocks, of in each if length in of),
                    key=lambda x: x[1],
                )
                for each in passes
            ]
            blocks = {name: size for each in tried for name, size in each[0][0].items()}
            progress(f"{chip}, D = {head_dim}, {length} tokens: splash at {_name(blocks)}, and GQE")
            shape = {"length": length, "head_dim": head_dim}
            ours = {**shape, "training": True} if training else shape
            costs = [
                pool.submit(measure, SPLASH, chip, shape | blocks),
                *(pool.submit(measure, case, chip, ours) for case in (GQE, DENSE)),
            ]
            yield Comparison(
                *(chip, head_dim, length, training),
                *(cost.result() for cost in costs),
                {_name(sizes): cycles for each in tried for sizes, cycles in each},
            )


def _divide(blocks: dict[str, int], length: int) -> bool:
    return all(length % size == 0 for size in blocks.values())


def _name(blocks: dict[str, int]) -> str:
    return ", ".join(f"{name.removeprefix('block_')} {size}" for name, size in blocks.items())
