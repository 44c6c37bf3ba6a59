"""Prefill and training speed of GQE against dense GQA, on this machine's device.

    python -m kernels.benchmarks.prefill
    python -m kernels.benchmarks.prefill --budget-minutes 9 --json out/prefill.json
    python -m kernels.benchmarks.prefill --levels op step --lengths 2048 16384
    python -m kernels.benchmarks.prefill --without tokamax    # should it hang, or stop the device

GQE by the platform's kernel against dense GQA by the fastest kernel that runs here, each at its
best block sizes, in one process, in turn. Results are written after every case, with a plot; run
again, it goes on with what is missing. On a CPU the sizes are small, and say nothing of speed.
"""

import argparse
import pathlib
import shlex
import sys
import time
from typing import get_args

import jax
import jax.numpy as jnp

from kernels.benchmarks.speed import document as documents
from kernels.benchmarks.speed.cases import FULL, LEVELS, SMALL, Case, Level, Scale, cases
from kernels.benchmarks.speed.contenders import contenders
from kernels.benchmarks.speed.figure import draw
from kernels.benchmarks.speed.op import matmul
from kernels.benchmarks.speed.timing import DeviceLost, repeated, time_contenders

RESULTS = pathlib.Path(__file__).parent / "results" / "prefill.json"
SMALL_RESULTS = pathlib.Path("runs") / "prefill_small.json"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    begun = time.monotonic()
    options = _parse(arguments)
    platform = jax.default_backend()
    small = options.small or platform == "cpu"
    scale = SMALL if small else FULL
    path = options.json or (SMALL_RESULTS if small else RESULTS)
    given = sys.argv[1:] if arguments is None else arguments
    head = documents.header(
        shlex.join(["python", "-m", "kernels.benchmarks.prefill", *given]),
        {
            "rounds": options.rounds,
            "tokens": scale.tokens,
            "matmul": scale.matmul,
            "dtype": scale.model.dtype,
        },
    )
    try:
        document = documents.load(path, head)
    except documents.DocumentError as error:
        sys.exit(f"error: {error}")
    wanted = [case for case in cases(scale) if _wanted(case, options)]
    known = {case["case"] for case in document["cases"]}
    missing = [case for case in wanted if case.name not in known]
    print(f"{len(wanted)} cases, {len(missing)} to do: {path}", file=sys.stderr, flush=True)
    print(documents.HEADING, flush=True)
    deadline = begun + 60 * options.budget_minutes if options.budget_minutes else None
    speed = _matmul_speed(scale) if missing else 0.0
    longest = 0.0
    for number, case in enumerate(missing, 1):
        start = time.monotonic()
        if deadline and start + longest > deadline:
            left = len(missing) - number + 1
            print(f"the budget is spent; {left} cases are left: run again", file=sys.stderr)
            break
        say = _progress(f"[{number}/{len(missing)}] {case.name}")
        found = contenders(case, scale, platform, documents.best_options(document, case))
        found = [one for one in found if one.name not in options.without]
        try:
            outcomes = time_contenders(
                [*found, matmul(scale.matmul, jnp.dtype(scale.model.dtype))],
                rounds=options.rounds,
                seconds=scale.seconds,
                flops_per_second=speed / 2,
                progress=say,
            )
        except DeviceLost as error:
            sys.exit(f"error: {error}\nrun again, --without it, for what is missing")
        longest = max(longest, time.monotonic() - start)
        record = documents.record(case, outcomes, time.monotonic() - start)
        del found, outcomes  # their arrays, before the next case has its own
        document["cases"].append(record)
        documents.save(path, document)
        draw(path.with_suffix(".png"), document)
        say("")
        print(documents.row(record), flush=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path, help=f"the results; default: {RESULTS.name}")
    parser.add_argument("--budget-minutes", type=float, help="begin no case that would end later")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each contender")
    parser.add_argument("--small", action="store_true", help="small sizes, as on a CPU")
    parser.add_argument(
        "--levels",
        nargs="+",
        choices=get_args(Level),
        default=LEVELS,
        help="default: all but `blocks`, which tries the GPU kernel's block sizes",
    )
    parser.add_argument("--lengths", nargs="+", type=int, help="only these")
    parser.add_argument("--without", nargs="+", default=[], help="contenders to leave out, by name")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"rounds is {options.rounds}; a spread needs at least 2")
    if "blocks" in options.levels and jax.default_backend() != "gpu":
        parser.error("levels has blocks, which are a GPU kernel's; there is no GPU here")
    if options.budget_minutes is not None and options.budget_minutes <= 0:
        parser.error(f"budget-minutes is {options.budget_minutes}; it must be positive")
    return options


def _wanted(case: Case, options: argparse.Namespace) -> bool:
    return case.level in options.levels and (
        options.lengths is None or case.length in options.lengths
    )


def _matmul_speed(scale: Scale) -> float:
    """FLOP/s, roughly: it decides how often a measurement repeats its work."""
    one = matmul(scale.matmul, jnp.dtype(scale.model.dtype))
    program = jax.jit(repeated(lambda a, b: a @ b, 3))
    jax.block_until_ready(program(*one.arguments))
    start = time.perf_counter()
    jax.block_until_ready(program(*one.arguments))
    return 3 * one.flops / (time.perf_counter() - start)


def _progress(case: str):
    """A line that is written over on a terminal; elsewhere one line a case."""
    if sys.stderr.isatty():
        return lambda text: print(
            f"\r\033[K{case}: {text}" if text else "\r\033[K", end="", file=sys.stderr, flush=True
        )
    print(case, file=sys.stderr, flush=True)
    return lambda _: None


if __name__ == "__main__":
    main()
