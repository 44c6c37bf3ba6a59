"""Splash attention, dense, at its best block sizes, against this project's kernel."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from kernels.benchmarks.schedule import cases
from kernels.benchmarks.schedule.compiler import OutOfVmemError, schedule
from kernels.benchmarks.schedule.cost import Cost, cost, measure

SPLASH = f"{cases.__name__}:splash"
GQE = f"{cases.__name__}:gqe"
# What the sweep tries, but for blocks beyond the length and computed parts beyond their block.
BLOCK_Q = BLOCK_KV = (512, 1024, 2048)
BLOCK_KV_COMPUTE = (256, 512, 1024)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One head size and length on one chip.

    Attributes:
      sweep: estimated cycles of splash attention at every block size tried; None where the blocks
        do not fit in VMEM.
    """

    chip: str
    head_dim: int
    length: int
    splash: Cost
    gqe: Cost
    sweep: dict[str, int | None]

    @property
    def ratio(self) -> float:
        """Static cycles of splash attention over those of the kernel."""
        return self.splash.cycles / self.gqe.cycles


def compare(
    chip: str,
    head_dim: int,
    lengths: tuple[int, ...],
    *,
    jobs: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Comparison]:
    """Comparisons at each length, of which the sweep is done once.

    The bundles of a region depend on the length only through addresses, so the sweep compiles for
    the longest one and counts executions for each; the winner is compiled again at its own length.
    """
    sweep = _sweep_splash(chip, head_dim, lengths, jobs, progress)
    for length in lengths:
        fits = {key: cycles[length] for key, cycles in sweep.items() if cycles and length in cycles}
        best = min(fits, key=fits.get)
        progress(f"{chip}, D = {head_dim}, {length} tokens: splash at {_name(best)}, then GQE")
        options = {"length": length, "head_dim": head_dim}
        with ThreadPoolExecutor(jobs) as pool:
            splash = pool.submit(measure, SPLASH, chip, {**options, **dict(best)})
            gqe = pool.submit(measure, GQE, chip, options)
            yield Comparison(
                chip,
                head_dim,
                length,
                splash.result(),
                gqe.result(),
                {_name(key): cycles and cycles.get(length) for key, cycles in sweep.items()},
            )


def _sweep_splash(chip, head_dim, lengths, jobs, progress) -> dict:
    longest = max(lengths)
    candidates = [
        (("block_q", q), ("block_kv", kv), ("block_kv_compute", compute))
        for q, kv, compute in itertools.product(BLOCK_Q, BLOCK_KV, BLOCK_KV_COMPUTE)
        if compute <= kv and max(q, kv) <= longest
    ]

    def cycles(blocks) -> dict[int, int] | None:
        options = {"head_dim": head_dim, **dict(blocks)}
        try:
            programs = schedule(SPLASH, chip, {"length": longest, **options})
        except OutOfVmemError:
            return None
        counted = {}
        for length in lengths:
            if length % options["block_q"] == 0 and length % options["block_kv"] == 0:
                at = {"length": length, **options}
                case = cases.splash(**at)
                counted[length] = cost(programs, SPLASH, chip, at, case, same_grid=False).cycles
        return counted

    found = {}
    with ThreadPoolExecutor(jobs) as pool:
        for i, (blocks, counted) in enumerate(
            zip(candidates, pool.map(cycles, candidates), strict=True)
        ):
            found[blocks] = counted
            shown = "does not fit in VMEM" if counted is None else f"{counted} cycles by length"
            progress(
                f"{chip}, D = {head_dim}, splash sweep {i + 1}/{len(candidates)}: "
                f"{_name(blocks)}: {shown}"
            )
    return found


def _name(blocks) -> str:
    return " × ".join(str(size) for _, size in blocks)
