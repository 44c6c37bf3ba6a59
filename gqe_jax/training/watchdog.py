"""Prints what every thread does when a run no longer makes progress."""

import faulthandler
import sys
import time

_REARM_SECONDS = 1.0


class Watchdog:
    """Prints the stacks of all threads when `alive` is not called for a time; a context manager.

    Each process of a job has its own: where one hangs, the others wait for it, and all print.

    Args:
      seconds: the time; None: nothing is watched.
      end: end this process then, and with it the job.
    """

    def __init__(self, seconds: float | None, *, end: bool = False):
        # The original stream has a file descriptor, which the printing thread of C writes to.
        self._file = sys.__stderr__
        self._seconds = None if self._file is None else seconds
        self._end, self._armed = end, 0.0

    def __enter__(self) -> "Watchdog":
        self._arm()
        return self

    def __exit__(self, *_: object) -> None:
        if self._seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        """Notes that the run makes progress."""
        if time.monotonic() - self._armed > min(_REARM_SECONDS, (self._seconds or 1.0) / 10):
            self._arm()

    def _arm(self) -> None:
        if self._seconds is None or self._file is None:
            return
        self._armed = time.monotonic()
        faulthandler.dump_traceback_later(
            self._seconds, repeat=not self._end, file=self._file, exit=self._end
        )
