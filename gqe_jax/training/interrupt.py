"""Signals that ask a run to save and stop."""

import os
import signal
import sys
import threading
from typing import Any

from gqe_jax.training.telemetry import Terminal


class Interrupt:
    """True after SIGINT, SIGTERM or SIGHUP, so that the loop saves and stops; a second exits.

    SIGHUP stays ignored where it is, as under nohup.
    It stays False outside the main thread, where Python delivers no signals.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "Interrupt":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.received is not None

    def _handle(self, number: int, _: Any) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        name = self.received.name
        Terminal(sys.stderr).write(f"{name}: saving after this step; once more to exit now\n")
