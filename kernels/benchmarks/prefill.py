"""Speed of GQE's attention against dense attention, on this machine's device.

    python -m kernels.benchmarks.prefill
    python -m kernels.benchmarks.prefill --budget-minutes 9 --json out/prefill.json
    python -m kernels.benchmarks.prefill --levels blocks
    python -m kernels.benchmarks.prefill --without tokamax    # should it hang, or stop the device

GQE by the platform's kernel against dense GQA by the fastest kernel that runs here, each at its
best block sizes, in one process, in alternation. Results are written after every case, with a
plot; run again, it continues with what is missing. On a CPU the sizes are small, and say nothing of
speed.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from kernels.benchmarks.command_line import typed
from kernels.benchmarks.speed import document as documents
from kernels.benchmarks.speed.cases import FULL, SMALL, Scale, SpeedCase, op_cases
from kernels.benchmarks.speed.figure import draw
from kernels.benchmarks.speed.op import matmul, op
from kernels.benchmarks.speed.timing import Contender, DeviceLost, repeated, time_contenders

RESULTS = pathlib.Path(__file__).parent / "results" / "prefill.json"
# The contenders of a case, from the best kernels of the op by side and name, and their options.
Build = Callable[[SpeedCase, documents.Known], list[Contender]]


@dataclasses.dataclass(frozen=True)
class SpeedOptions:
    """What the commands that time devices share."""

    json: pathlib.Path | None = None
    """The results; None: prefill.json in the folder `results` beside the command, or, of small
    sizes, in `runs`."""
    budget_minutes: float | None = None
    """Begin no case that would end later."""
    rounds: int = 7
    """Measurements of each contender."""
    small: bool = False
    """Small sizes, as on a CPU."""
    lengths: tuple[int, ...] = ()
    """Only these lengths."""
    without: tuple[str, ...] = ()
    """Names of contenders to leave out."""

    def __post_init__(self) -> None:
        if self.rounds < 2:
            raise ValueError(f"rounds is {self.rounds}; a spread needs at least 2")
        if self.budget_minutes is not None and self.budget_minutes <= 0:
            raise ValueError(f"budget_minutes is {self.budget_minutes}; it must be positive")


@dataclasses.dataclass(frozen=True)
class PrefillOptions(SpeedOptions):
    """Time the attention op."""

    levels: tuple[Literal["op", "blocks"], ...] = ("op",)
    """The op by all kernels, or by this project's GPU kernel at several block sizes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "blocks" in self.levels and jax.default_backend() != "gpu":
            raise ValueError("levels has blocks, which are a GPU kernel's; there is no GPU here")


def run(
    options: SpeedOptions,
    command: str,
    scale: Scale,
    cases: Sequence[SpeedCase],
    contenders: Build,
    results: pathlib.Path = RESULTS,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Times the cases that the results lack, and prints a row for each."""
    begun = clock()
    default = pathlib.Path("runs/prefill_small.json") if is_small(options) else results
    path = options.json or default
    settings = {
        "rounds": options.rounds,
        "tokens": scale.tokens,
        "matmul": scale.matmul,
        "dtype": scale.dtype,
    }
    try:
        document = documents.load(path, documents.header(command, settings))
    except documents.DocumentError as error:
        sys.exit(f"error: {error}")
    wanted = [case for case in cases if not options.lengths or case.length in options.lengths]
    known = {case["case"] for case in document["cases"]}
    missing = [case for case in wanted if case.name not in known]
    print(f"{len(wanted)} cases, {len(missing)} to do: {path}", file=sys.stderr, flush=True)
    print(documents.HEADING, flush=True)
    deadline = begun + 60 * options.budget_minutes if options.budget_minutes else None
    yardstick = matmul(scale.matmul, jnp.dtype(scale.dtype))
    speed = _rate(yardstick) if missing else 0.0
    longest = 0.0
    for number, case in enumerate(missing, 1):
        start = clock()
        if deadline and start + longest > deadline:
            left = len(missing) - number + 1
            print(f"the budget is spent; {left} cases are left: run again", file=sys.stderr)
            break
        say = _progress(f"[{number}/{len(missing)}] {case.name}")
        found = contenders(case, documents.best_options(document, case))
        found = [one for one in found if one.name not in options.without]
        try:
            outcomes = time_contenders(
                [*found, yardstick],
                rounds=options.rounds,
                seconds=scale.seconds,
                flops_per_second=speed / 2,
                progress=say,
            )
        except DeviceLost as error:
            sys.exit(f"error: {error}\nrun again, --without it, for what is missing")
        longest = max(longest, clock() - start)
        record = documents.record(case, outcomes, clock() - start)
        del found, outcomes  # their arrays, before the next case has its own
        document["cases"].append(record)
        documents.save(path, document)
        draw(path.with_suffix(".png"), document)
        say("")
        print(documents.row(record), flush=True)


def is_small(options: SpeedOptions) -> bool:
    """Whether the sizes are the small ones."""
    return options.small or jax.default_backend() == "cpu"


def _rate(product: Contender) -> float:
    """FLOP/s, roughly: it decides how often a measurement repeats its work."""
    program = jax.jit(repeated(lambda a, b: a @ b, 3))
    jax.block_until_ready(program(*product.arguments))
    start = time.perf_counter()
    jax.block_until_ready(program(*product.arguments))
    return 3 * product.flops / (time.perf_counter() - start)


def _progress(case: str) -> Callable[[str], Any]:
    """Shows what is under way: on a terminal in a line that is overwritten, else once a case."""
    if sys.stderr.isatty():
        return lambda text: print(
            f"\r\033[K{case}: {text}" if text else "\r\033[K", end="", file=sys.stderr, flush=True
        )
    print(case, file=sys.stderr, flush=True)
    return lambda _: None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    prog = "kernels.benchmarks.prefill"
    options = tyro.cli(
        PrefillOptions, prog=f"python -m {prog}", args=arguments, description=__doc__
    )
    scale = SMALL if is_small(options) else FULL
    cases = [case for case in op_cases(scale) if case.level in options.levels]
    platform = jax.default_backend()
    run(options, typed(prog, arguments), scale, cases, lambda case, _: op(case, scale, platform))


if __name__ == "__main__":
    main()
