"""What a run's wall time is spent on, over all of its starts."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

SPENT = ("steps", "starting", "compiling", "data", "evaluating", "saving", "restarting")
"""What time is spent on. `data` is the time for which the devices waited for a batch, `starting` is
the time before the first step. `restarting` is what a start that died without notice cost: from its
last checkpoint to the next start, the steps that are done again included."""
_COMPILING = "/jax/core/compile/"
_PREFIX = "seconds_"


def latest(lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The last record of `Goodput.record` among those of `metrics.jsonl`."""
    return next((line for line in reversed(lines) if "goodput" in line), None)


def spent(record: dict[str, Any]) -> dict[str, float]:
    """The seconds of a record, by what they were spent on."""
    return {kind: _number(record, _PREFIX + kind) for kind in SPENT}


def _number(record: dict[str, Any], name: str) -> float:
    """A number of a record, which a user or a crash may have damaged: 0 where it is none."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e15 else 0.0


class Goodput:
    """Divides wall time; a context manager. At each moment it is spent on one thing.

    Args:
      began: when the process began, as of `time.time`; None: now.
    """

    def __init__(self, began: float | None = None):
        self.began = time.time() if began is None else began
        self._since = time.perf_counter() - (time.time() - self.began)
        self._seconds = dict.fromkeys(SPENT, 0.0)
        self._now = "starting"
        self._compiled: list[tuple[float, float]] = []  # disjoint, in order
        self._thread = threading.get_ident()
        self.restarts = self.lost_steps = 0
        self._compiled_before = 0.0

    def __enter__(self) -> "Goodput":
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def resume(self, lines: Sequence[dict[str, Any]], start: int) -> None:
        """Adds what earlier starts of the run spent.

        Args:
          lines: the records of `metrics.jsonl`, those of steps that run again included.
          start: the step that the run resumes from.
        """
        last = latest([line for line in lines if line["step"] <= start])
        if last is None:
            return
        for kind, seconds in spent(last).items():
            self._seconds[kind] += seconds
        self._compiled_before = spent(last)["compiling"]
        reached = max(line["step"] for line in lines)
        self.restarts = int(_number(last, "restarts")) + 1
        self.lost_steps = int(_number(last, "lost_steps")) + max(reached - start, 0)
        if not last.get("ended"):
            since = _number(last, "time") or self.began
            self._seconds["restarting"] += max(self.began - since, 0.0)

    @contextlib.contextmanager
    def spend(self, kind: str, hidden: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """The time inside is spent on `kind`; unless `hidden()` after it, then as that around it.

        Time in which JAX compiles is spent on compiling.
        """
        self._settle(self._now)
        around, self._now = self._now, kind
        try:
            yield
        finally:
            self._settle(around if hidden() else kind)
            self._now = around

    def begin_steps(self) -> None:
        """The time from here on is spent on steps."""
        self._settle(self._now)
        self._now = "steps"

    def record(self, *, ended: bool = False) -> dict[str, Any]:
        """The share of the time spent on steps, and the seconds of each kind, for the metrics.

        Args:
          ended: whether the run stops here by itself, not to be restarted at once.
        """
        self._settle(self._now)
        return {
            "goodput": self._seconds["steps"] / max(sum(self._seconds.values()), 1e-9),
            **{_PREFIX + kind: round(seconds, 3) for kind, seconds in self._seconds.items()},
            "restarts": self.restarts,
            "lost_steps": self.lost_steps,
            "ended": ended,
            "time": int(time.time()),
        }

    def describe(self) -> str:
        """A line with the shares."""
        record = self.record()
        seconds = spent(record)
        total = max(sum(seconds.values()), 1e-9)
        parts = ", ".join(f"{kind} {value / total:.1%}" for kind, value in seconds.items() if value)
        again = f"; {self.restarts} restarts, {self.lost_steps} steps lost" * bool(self.restarts)
        return f"goodput {record['goodput']:.1%} of {total:,.0f} s: {parts}{again}"

    def since_start(self) -> float:
        """Seconds since the process began."""
        return time.time() - self.began

    def compiling_since_start(self) -> float:
        """Seconds spent on compiling by this start alone."""
        self._settle(self._now)
        return self._seconds["compiling"] - self._compiled_before

    def _hear(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Notes a span of tracing or compiling, which can contain earlier ones."""
        if event.startswith(_COMPILING) and threading.get_ident() == self._thread:
            end = time.perf_counter()
            begun = max(end - duration_secs, self._since)
            while self._compiled and self._compiled[-1][0] >= begun:
                self._compiled.pop()
            if self._compiled:
                begun = max(begun, self._compiled[-1][1])
            self._compiled.append((begun, max(begun, end)))

    def _settle(self, kind: str) -> None:
        now = time.perf_counter()
        elapsed = now - self._since
        compiled = min(sum(end - begun for begun, end in self._compiled), elapsed)
        self._seconds["compiling"] += compiled
        self._seconds[kind] += elapsed - compiled
        self._since, self._compiled = now, []
