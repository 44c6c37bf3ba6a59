"""Compiles contenders, finds the best options of each, and times them in alternation."""

import contextlib
import dataclasses
import functools
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

SCREEN = 3  # calls of a contender after its first, of which the fastest decides whether it stays
SCREEN_SECONDS = 2.0  # after so long the second call of a slow contender is the last
HANGING = 120  # seconds, after which a contender's trial is taken not to end
HOPELESS = 2.0  # times the best of its side: such a contender is not timed further


class DeviceLost(RuntimeError):
    """A contender failed in a way that leaves the device of no use to this process."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """A program to time, and what it is compared by.

    Attributes:
      name: the kernel or implementation.
      side: contenders of one side compete; a case's ratio is that of its sides' best.
      function: does the work once. If `stateful`, it is a compiled step, which has `lower`, donates
        its first argument, and returns the next one as its first result.
      arguments: what the function takes.
      flops: floating-point operations that the work needs, done once.
      options: block sizes and flags. Of contenders that differ in these alone, the fastest is kept.
      compiler_options: XLA's flags for this program.
      slots: picks from the result what is compared with other contenders of the same side.
    """

    name: str
    side: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    flops: float
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stateful: bool = False
    slots: Callable[[Any], jax.Array] | None = None

    def lower(self, times: int) -> jax.stages.Lowered:
        """A lowered program that does the work so many times; if stateful, once."""
        if self.stateful:
            return self.function.lower(*self.arguments)
        return jax.jit(repeated(self.function, times)).lower(*self.arguments)

    @property
    def described(self) -> str:
        """The name with side and options, for messages."""
        options = "".join(f", {name} {value}" for name, value in self.options.items())
        return f"{self.name} ({self.side}{options})"


@dataclasses.dataclass
class Outcome:
    """A contender's timings, or the error that it failed with.

    Attributes:
      error: why it did not run.
      screened: seconds, the least of the trials before the rounds.
      seconds: one value for each round; none if the contender was hopeless.
      memory: bytes of the program's arguments, results and temporaries.
      slots: the result, to compare.
      run: takes one measurement.
    """

    contender: Contender
    error: str | None = None
    screened: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    memory: int | None = None
    slots: jax.Array | None = None
    run: Callable[[], float] | None = None


def repeated(function: Callable[..., Any], times: int) -> Callable[..., Any]:
    """A program that calls `function` `times` times, so that launching it costs next to nothing.

    Each call waits for a number of the result before it, through a barrier that XLA cannot look
    into; else XLA would do the work once. The program returns the last result, and the sum of these
    numbers.
    """

    def run(*arguments):
        def again(_, carry):
            out, total = carry
            number = jax.tree.leaves(out)[0].reshape(-1)[0].astype(jnp.float32)
            tied, number = jax.lax.optimization_barrier((arguments, number))
            return function(*tied), total + number

        if times == 1:
            return function(*arguments), jnp.zeros(())
        like = jax.eval_shape(function, *arguments)
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), jnp.zeros(())
        return jax.lax.fori_loop(0, times, again, start)

    return run


def time_contenders(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    seconds: float,
    flops_per_second: float,
    progress: Callable[[str], None],
    clock: Callable[[], float] = time.perf_counter,
    probe: Callable[[], Any] = lambda: jax.block_until_ready(jnp.zeros(8) + 1),
) -> list[Outcome]:
    """Times all contenders that run, in alternation.

    Args:
      seconds: that one measurement of one contender should take.
      flops_per_second: a guess of their speed, which decides how often the work is repeated.
      progress: called with what is under way.
      clock: seconds.
      probe: a little work, which fails where the device does none any more.

    Returns:
      One outcome for each contender; of those that differ in their options alone, only the fastest
      has rounds.

    Raises:
      DeviceLost: the device does no work any more, which says nothing of the contenders after.
    """
    outcomes = [Outcome(one) for one in contenders]
    times = [max(1, min(100, round(seconds * flops_per_second / one.flops))) for one in contenders]
    attempt = functools.partial(_attempt, probe)
    lowered = []
    for outcome, repeats in zip(outcomes, times, strict=True):
        progress(f"compiling {len(lowered) + 1}/{len(outcomes)}: {outcome.contender.name}")
        lowered.append(attempt(outcome, outcome.contender.lower, repeats))
    with ThreadPoolExecutor(8) as pool:
        compiled = list(pool.map(functools.partial(_compile, attempt), outcomes, lowered))
    for number, (outcome, program) in enumerate(zip(outcomes, compiled, strict=True), 1):
        if program is not None:
            progress(f"trying {number}/{len(outcomes)}: {outcome.contender.name}")
            with watched(outcome.contender):
                attempt(outcome, _screen, outcome, program, times[number - 1], clock)
    chosen = _chosen(outcomes)
    for number in range(rounds):
        progress(f"round {number + 1}/{rounds}")
        start = number % max(1, len(chosen))
        for outcome in chosen[start:] + chosen[:start]:
            outcome.seconds.append(outcome.run())
    return outcomes


def _attempt(
    probe: Callable[[], Any], outcome: Outcome, function: Callable[..., Any], *arguments: Any
) -> Any:
    """What `function(*arguments)` returns; None, and the outcome's error, if it fails.

    Other people's kernels fail in ways of their own, which is a result like any other. But after an
    illegal access all work on a GPU fails, so the device is probed.

    Raises:
      DeviceLost: the probe failed.
    """
    try:
        return function(*arguments)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        outcome.error = f"{type(error).__name__}: {lines[0]}"[:500]
        outcome.run = outcome.slots = None
        try:
            probe()
        except Exception as lost:
            raise DeviceLost(
                f"the device does no work after {outcome.contender.described}: {outcome.error}"
            ) from lost
        return None


@contextlib.contextmanager
def watched(
    contender: Contender, seconds: float = HANGING, leave: Callable[[int], Any] = os._exit
) -> Iterator[None]:
    """Ends the process if a kernel hangs, for nothing else can; written results are kept."""

    def end() -> None:
        print(
            f"error: {contender.described} has not ended in {seconds} seconds; continue with "
            f"--without {contender.name}",
            file=sys.stderr,
            flush=True,
        )
        leave(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _compile(attempt, outcome: Outcome, lowered: jax.stages.Lowered | None):
    flags = dict(outcome.contender.compiler_options)
    return lowered and attempt(outcome, lowered.compile, flags or None)


def _screen(
    outcome: Outcome, program: jax.stages.Compiled, repeats: int, clock: Callable[[], float]
) -> None:
    contender = outcome.contender
    stats = program.memory_analysis()
    if stats is not None:
        outcome.memory = stats.argument_size_in_bytes + stats.output_size_in_bytes
        outcome.memory += stats.temp_size_in_bytes - stats.alias_size_in_bytes
    arguments = list(contender.arguments)

    def run() -> tuple[float, Any]:
        start = clock()
        for _ in range(repeats if contender.stateful else 1):
            result = program(*arguments)
            if contender.stateful:
                arguments[0] = result[0]
        jax.block_until_ready(result)
        return (clock() - start) / repeats, result

    first, result = run()
    if contender.slots is not None:
        outcome.slots = contender.slots(result[0])
    del result
    trials = [run()[0]]
    while len(trials) < SCREEN and (first + sum(trials)) * repeats < SCREEN_SECONDS:
        trials.append(run()[0])
    outcome.screened = min(trials)
    outcome.run = lambda: run()[0]


def _chosen(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The fastest contender of each name, without those that are hopeless."""
    ran = [outcome for outcome in outcomes if outcome.run is not None]
    best: dict[tuple[str, str], Outcome] = {}
    of_side: dict[str, float] = {}
    for outcome in ran:
        side, key = outcome.contender.side, (outcome.contender.side, outcome.contender.name)
        if key not in best or outcome.screened < best[key].screened:
            best[key] = outcome
        of_side[side] = min(of_side.get(side, outcome.screened), outcome.screened)
    return [
        outcome
        for (side, _), outcome in best.items()
        if outcome.screened <= HOPELESS * of_side[side]
    ]


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return dict(zip(("q1", "median", "q3"), quartiles, strict=True))
