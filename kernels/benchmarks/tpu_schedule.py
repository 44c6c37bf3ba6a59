"""Static cycles of TPU attention kernels, read from libtpu's schedule; no TPU is needed.

    python -m kernels.benchmarks.tpu_schedule --table             # the tables of kernels/README.md
    python -m kernels.benchmarks.tpu_schedule --table --training  # are filled by these two
    python -m kernels.benchmarks.tpu_schedule --tune              # the kernel's own block sizes
    python -m kernels.benchmarks.tpu_schedule --compare splash --chip v6e --head-dim 128
    python -m kernels.benchmarks.tpu_schedule --chip v5e --set q=512,1024 kv=512
    python -m kernels.benchmarks.tpu_schedule --case my.module:factory --chip v6e --set width=256

A case of your own is a function that returns an object with `function` and `arguments` (a tuple of
`jax.ShapeDtypeStruct`s); `schedule/cases.py` shows how to say how often its regions run.
"""

import ast
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from gqe_kernels.cycles.bundles import ScheduleError
from kernels.benchmarks.command_line import typed
from kernels.benchmarks.schedule import report
from kernels.benchmarks.schedule.compare import DENSE, GQE, SPLASH, Comparison, compare
from kernels.benchmarks.schedule.compiler import CompileError, OutOfVmemError
from kernels.benchmarks.schedule.cost import Cost, measure
from kernels.benchmarks.schedule.tune import tune

PROG = "kernels.benchmarks.tpu_schedule"
CASES = {"gqe": GQE, "dense": DENSE, "splash": SPLASH}
CHIPS, HEAD_DIMS, LENGTHS = ("v5e", "v6e", "tpu7x"), (64, 128), (4096, 32768)
RESULTS = Path(__file__).parent / "results"
SWEEPS = RESULTS / "cache" / "splash_sweeps.json"


@dataclasses.dataclass(frozen=True)
class ScheduleOptions:
    """Print schedules, compare them, or tune the kernel by them."""

    table: bool = False
    """Compare on every chip, head size and length, and write the results that are kept in git."""
    tune: bool = False
    """Find the kernel's block sizes and write their table."""
    compare: Literal["splash"] | None = None
    """Print splash attention's schedule, too, and the ratio."""
    case: str = "gqe"
    """gqe, dense, splash or module:function."""
    chip: tuple[Literal["v5e", "v5p", "v6e", "tpu7x"], ...] = ("v6e",)
    """What to compile for."""
    head_dim: tuple[int, ...] = (128,)
    length: tuple[int, ...] = (4096,)
    """Tokens of one sequence."""
    training: bool = False
    """Compare forward and backward, not forward alone."""
    set: tuple[str, ...] = ()
    """Options of the case, NAME=VALUE,...; of several values, each one."""
    jobs: int = 1
    """Compiles at a time."""
    sweep_again: bool = False
    """Do not use the sweeps of splash attention that an earlier run left in results/cache."""
    json: Path | None = None
    """A file for the figures: of a case with all regions, of a comparison those of the table."""
    plot: Path | None = None
    """A PNG of ratio against length; with a comparison."""

    def __post_init__(self) -> None:
        for name, values in (
            ("head-dim", self.head_dim),
            ("length", self.length),
            ("jobs", [self.jobs]),
        ):
            for value in values:
                if value <= 0:
                    raise ValueError(f"--{name} is {value}; it must be positive")
        if self.compare is None and not self.table:
            if self.plot:
                raise ValueError("--plot draws a ratio: add --compare splash")
            if self.training:
                raise ValueError(
                    "--training is for a comparison; a case takes --set training=True, say"
                )
        elif self.set:
            raise ValueError(
                "--set is for one case: block sizes of a comparison are swept or defaults"
            )
        self.settings()

    def settings(self) -> list[dict[str, int | bool]]:
        """Each combination of the options of the case."""
        named = {}
        for text in self.set:
            name, _, values = text.partition("=")
            try:
                named[name] = [ast.literal_eval(value) for value in values.split(",")]
            except (SyntaxError, ValueError):
                raise ValueError(
                    f"--set has {text!r}; it must be NAME=VALUE, VALUE a number, True or False"
                ) from None
        return [dict(zip(named, each, strict=True)) for each in itertools.product(*named.values())]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = tyro.cli(
        ScheduleOptions, prog=f"python -m {PROG}", args=arguments, description=__doc__
    )
    if options.table:
        path = RESULTS / ("tpu_schedule_training" if options.training else "tpu_schedule")
        options = dataclasses.replace(
            options,
            compare="splash",
            chip=CHIPS,
            head_dim=HEAD_DIMS,
            length=LENGTHS,
            json=options.json or path.with_suffix(".json"),
            plot=options.plot or path.with_suffix(".png"),
        )
    results: list[dict[str, Any]] = []
    try:
        if options.tune:
            progress = lambda line: print(line, flush=True)  # noqa: E731
            tune(HEAD_DIMS, LENGTHS, jobs=options.jobs, progress=progress)
            return
        for result in _compare(options) if options.compare else _show(options):
            results.append(report.row(result) if options.compare else report.regions(result))
            if options.json:  # after every result: a sweep takes minutes
                report.write_json(options.json, typed(PROG, arguments), results)
        if options.compare:
            print(report.markdown(results))
            if options.plot:
                report.plot(options.plot, results)
    except (ValueError, CompileError, ScheduleError) as error:
        sys.exit(f"error: {error}")


def _compare(options: ScheduleOptions) -> Iterator[Comparison]:
    start = time.monotonic()

    def progress(line: str) -> None:
        print(f"[{time.monotonic() - start:5.0f} s] {line}", file=sys.stderr, flush=True)

    for name, head_dim in itertools.product(options.chip, options.head_dim):
        for result in compare(
            name,
            head_dim,
            options.length,
            training=options.training,
            jobs=options.jobs,
            memory=None if options.sweep_again else SWEEPS,
            progress=progress,
        ):
            if not options.table:
                for cost in (result.splash, result.dense, result.gqe):
                    print(report.text(cost), end="\n\n")
            yield result


def _show(options: ScheduleOptions) -> Iterator[Cost]:
    shapes = [{}]
    if options.case in CASES:
        shapes = [
            {"length": length, "head_dim": head_dim}
            for length, head_dim in itertools.product(options.length, options.head_dim)
        ]
    settings = options.settings()
    swept = []
    for name, shape, setting in itertools.product(options.chip, shapes, settings):
        try:
            result = measure(CASES.get(options.case, options.case), name, shape | setting)
        except OutOfVmemError:
            if len(settings) == 1:
                raise
            print(f"{setting} does not fit in VMEM\n", flush=True)
            continue
        print(report.text(result), end="\n\n", flush=True)
        swept.append(result)
        yield result
    if len(settings) > 1:
        for result in sorted(swept, key=lambda result: (result.chip, result.cycles)):
            print(f"{result.chip} {result.cycles:>15,} cycles: {report.settings(result)}")


if __name__ == "__main__":
    main()
