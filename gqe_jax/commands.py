"""What the command lines share: flags from dataclasses, and errors without a traceback."""

import glob
import importlib.metadata
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import tyro

from gqe_jax.checkpoint import CheckpointError
from gqe_jax.compile_for import DoesNotFitError
from gqe_jax.config import ConfigError
from gqe_jax.data import DataError
from gqe_jax.interop.tensors import WeightsError
from gqe_jax.trainer import NonFiniteLossError

# What a user can mend: the message is the whole answer.
_REFUSALS = (
    ConfigError,
    DataError,
    CheckpointError,
    NonFiniteLossError,
    WeightsError,
    DoesNotFitError,
)


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
    _pass_over_libtpu_without_tpu()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of checkpoints without metrics
    try:
        return function()
    except _REFUSALS as error:
        sys.exit(f"error: {error}")


def _pass_over_libtpu_without_tpu() -> None:
    """libtpu, with which the tests compile, complains at length where there is no TPU."""
    tpus = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    other_plugins = importlib.metadata.entry_points(group="jax_plugins")
    if "JAX_PLATFORMS" not in os.environ and not tpus and not other_plugins:
        jax.config.update("jax_platforms", "cpu")
