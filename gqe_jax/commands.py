"""Shared by the command lines: flags from dataclasses, and errors without a traceback."""

import dataclasses
import importlib.metadata
import logging
import os
import pathlib
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import tyro

from gqe_jax import processes
from gqe_jax.errors import UserError
from gqe_jax.storage import explain, location


def parse[Config](
    default: Config | type[Config], arguments: Sequence[str], *, prog: str, description: str
) -> Config:
    """Parses a command line into a dataclass; every field is a flag.

    Exits with status 2 and a line on the error stream if a value cannot work.

    Args:
      default: an instance with the default of every field, or the class.
      arguments: the command line, without the program.
      prog, description: what the help shows.
    """
    given = not isinstance(default, type)
    try:
        config = tyro.cli(
            type(default) if given else default,
            default=default if given else None,
            args=list(arguments),
            prog=prog,
            description=description,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        )
        return _expand_home(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _expand_home(value: Any) -> Any:
    """The value, with `~` expanded in its paths: a shell leaves it in `--flag=~/x`."""
    if isinstance(value, pathlib.Path):
        return location(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        new = {name: _expand_home(each) for name, each in old.items()}
        return value if new == old else dataclasses.replace(value, **new)
    if isinstance(value, tuple):
        return tuple(map(_expand_home, value))
    return list(map(_expand_home, value)) if isinstance(value, list) else value


def run_command(function: Callable[[], Any], *, all_processes: bool = False) -> Any:
    """Calls `function`; a `UserError` ends the program with its message and status 1.

    So does a failure of files that a user can mend, such as a full disk (`storage.explain`).
    SIGINT ends it with a line and status 130; so does a `KeyboardInterrupt`, with its own message.

    Args:
      function: what the command does.
      all_processes: whether all processes of a job run it together (`processes.join`). Then any
        error ends this process at once, and the others end when its heartbeat stops.
    """
    _pass_over_libtpu_without_tpu()
    _quieten_orbax()
    try:
        if all_processes:
            processes.join()
        return function()
    except KeyboardInterrupt as error:
        print(str(error) or "SIGINT: stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        mendable = str(error) if isinstance(error, UserError) else explain(error)
        if mendable is not None:
            if not jax.distributed.is_initialized():
                sys.exit(f"error: {mendable}")
            _end_now(f"error: {mendable}")
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        _end_now(
            f"error: {type(error).__name__}; if another process died before, its output has the "
            "cause. The same command on all goes on from the last checkpoint"
        )


def _quieten_orbax() -> None:
    """Hides what Orbax's threads print besides the error that its caller gets.

    It warns of checkpoints without metrics. After a failed write every thread logs a traceback, and
    TensorStore prints one for each write whose event loop has ended by then.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # writes that failed beside the first
    hook = sys.unraisablehook

    def unless_of_a_closed_loop(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = unless_of_a_closed_loop


def _end_now(message: str) -> NoReturn:
    """Ends a process of a job without waiting for the others, which may be dead or waiting."""
    print(f"{processes.describe()}{message}", file=sys.stderr, flush=True)
    if processes.is_first():
        time.sleep(1)  # without this process the others end at once, before their own message
    os._exit(1)


def _pass_over_libtpu_without_tpu() -> None:
    """Selects the CPU where an installed libtpu would only log that there is no TPU."""
    other_plugins = importlib.metadata.entry_points(group="jax_plugins")
    if "JAX_PLATFORMS" not in os.environ and not processes.has_tpu() and not other_plugins:
        jax.config.update("jax_platforms", "cpu")
