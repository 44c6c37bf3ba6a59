"""What the command lines share: flags from dataclasses, and errors without a traceback."""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from gqe_jax.checkpoint import CheckpointError
from gqe_jax.config import ConfigError
from gqe_jax.data import DataError
from gqe_jax.trainer import NonFiniteLossError


def parse[Config](
    default: Config | type[Config], arguments: Sequence[str], *, prog: str, description: str
) -> Config:
    """A dataclass from the command line: every field is a flag.

    Args:
      default: an instance, for the values of the fields that are not named; or the class.
      arguments: the command line, without the program.
      prog, description: for the help.

    Exits with status 2 and a line on the error stream if a value cannot work.
    """
    given = not isinstance(default, type)
    try:
        return tyro.cli(
            type(default) if given else default,
            default=default if given else None,
            args=list(arguments),
            prog=prog,
            description=description,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run_command(function: Callable[[], Any]) -> Any:
    """Calls `function`; an error of ours ends the program with its message and status 1."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of checkpoints without metrics
    try:
        return function()
    except (ConfigError, DataError, CheckpointError, NonFiniteLossError) as error:
        sys.exit(f"error: {error}")
