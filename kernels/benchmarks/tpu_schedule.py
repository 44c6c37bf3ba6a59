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

import argparse
import ast
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from gqe_kernels.chips import CHIPS
from kernels.benchmarks.schedule import report
from kernels.benchmarks.schedule.bundles import ScheduleError
from kernels.benchmarks.schedule.compare import DENSE, GQE, SPLASH, Comparison, compare
from kernels.benchmarks.schedule.compiler import CompileError, OutOfVmemError
from kernels.benchmarks.schedule.cost import Cost, measure
from kernels.benchmarks.schedule.tune import tune

CASES = {"gqe": GQE, "dense": DENSE, "splash": SPLASH}
TABLE = {"chip": ["v5e", "v6e", "tpu7x"], "head_dim": [64, 128], "length": [4096, 32768]}
RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    results = []
    try:
        if options.tune:
            tune(
                TABLE["head_dim"],
                TABLE["length"],
                jobs=options.jobs,
                progress=lambda line: print(line, flush=True),
            )
            return
        for result in _compare(options) if options.compare else _show(options):
            results.append(result)
            if options.json:  # after every result: a sweep takes minutes
                report.write_json(options.json, results)
        if options.compare:
            print(report.markdown(results))
            if options.plot:
                report.plot(options.plot, results)
    except (ValueError, CompileError, ScheduleError) as error:
        sys.exit(f"error: {error}")


def _compare(options) -> Iterator[Comparison]:
    start = time.monotonic()

    def progress(line: str) -> None:
        print(f"[{time.monotonic() - start:5.0f} s] {line}", file=sys.stderr, flush=True)

    for chip, head_dim in itertools.product(options.chip, options.head_dim):
        for result in compare(
            chip,
            head_dim,
            options.length,
            training=options.training,
            jobs=options.jobs,
            memory=None if options.sweep_again else RESULTS / "splash_sweeps.json",
            progress=progress,
        ):
            if not options.table:
                for cost in (result.splash, result.dense, result.gqe):
                    print(report.text(cost), end="\n\n")
                print(f"splash / GQE: {result.ratio:.3f}; dense / GQE: {result.dense_ratio:.3f}\n")
            yield result


def _show(options) -> Iterator[Cost]:
    shapes = [{}]
    if options.case in CASES:
        shapes = [
            {"length": length, "head_dim": head_dim}
            for length, head_dim in itertools.product(options.length, options.head_dim)
        ]
    names, values = options.set.keys(), options.set.values()
    settings = [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]
    swept = []
    for chip, shape, setting in itertools.product(options.chip, shapes, settings):
        try:
            result = measure(CASES.get(options.case, options.case), chip, shape | setting)
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


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tpu_schedule",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--table", action="store_true", help="compare on every chip, head size and length")
    add("--tune", action="store_true", help="find the kernel's block sizes and write their table")
    add("--compare", choices=["splash"], help="print splash attention's schedule, and the ratio")
    add("--case", default="gqe", help="gqe, dense, splash or module:function (default: gqe)")
    add("--chip", nargs="+", choices=list(CHIPS), default=["v6e"])
    add("--head-dim", nargs="+", type=int, default=[128])
    add("--length", nargs="+", type=int, default=[4096], help="tokens of one sequence")
    add("--training", action="store_true", help="compare forward and backward, not forward alone")
    add(
        "--set",
        nargs="+",
        metavar="NAME=VALUE,...",
        default=[],
        help="options of the case; of several values, each in turn",
    )
    add("--jobs", type=int, default=1, help="compiles at a time")
    add("--sweep-again", action="store_true", help="do not use the sweeps kept in results/")
    add("--json", type=Path, help="write all figures to this file")
    add("--plot", type=Path, help="write a PNG of ratio against length; with a comparison")
    options = parser.parse_args(arguments)
    if options.table:
        options.compare = "splash"
        vars(options).update(TABLE)
        name = "tpu_schedule_training" if options.training else "tpu_schedule"
        options.json = options.json or RESULTS / f"{name}.json"
        options.plot = options.plot or RESULTS / f"{name}.png"
    if options.plot and not options.compare:
        parser.error("--plot draws a ratio: add --compare splash")
    for name in ("head_dim", "length", "jobs"):
        values = vars(options)[name]
        for value in values if isinstance(values, list) else [values]:
            if value <= 0:
                parser.error(f"--{name.replace('_', '-')} is {value}; it must be positive")
    if options.training and not options.compare:
        parser.error("--training is for a comparison; a case takes --set training=True, say")
    if options.set and options.compare:
        parser.error("--set is for one case: block sizes of a comparison are swept or defaults")
    options.set = dict(_setting(parser, text) for text in options.set)
    return options


def _setting(parser: argparse.ArgumentParser, text: str) -> tuple[str, list[int | bool]]:
    name, _, values = text.partition("=")
    try:
        return name, [ast.literal_eval(value) for value in values.split(",")]
    except (SyntaxError, ValueError):
        parser.error(f"--set has {text!r}; it must be NAME=VALUE, VALUE a number, True or False")


if __name__ == "__main__":
    main()
