"""What the command lines share: flags from dataclasses, and errors without a traceback."""

import dataclasses
import importlib.metadata
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import tyro

from gqe_jax import processes
from gqe_jax.compile_for import DoesNotFitError
from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.data import DataError
from gqe_jax.interop.tensors import WeightsError
from gqe_jax.storage import location
from gqe_jax.training.checkpoint import CheckpointError
from gqe_jax.training.loop import CONFIG_FILE, NonFiniteLossError, read_config

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


def run_config(name: str, configs: Mapping[str, RunConfig]) -> RunConfig:
    """The configuration of this name, or that of the run whose directory it is.

    Raises:
      ConfigError: it is neither.
    """
    if name in configs:
        return configs[name]
    if not (location(name) / CONFIG_FILE).is_file():
        raise ConfigError(
            f"CONFIG is {name!r}; it must be one of {', '.join(configs)}, or the directory of a "
            f"run, with its {CONFIG_FILE}"
        )
    return dataclasses.replace(read_config(name), run_dir=name)


def run_command(function: Callable[[], Any], *, all_processes: bool = False) -> Any:
    """Calls `function`; an error of ours ends the program with its message and status 1.

    Args:
      function: what the command does.
      all_processes: all processes of a job run it together (`processes.join`). Any error then ends
        this process at once: the others miss it, and end too.
    """
    _pass_over_libtpu_without_tpu()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of checkpoints without metrics
    try:
        if all_processes:
            processes.join()
        return function()
    except _REFUSALS as error:
        if not jax.distributed.is_initialized():
            sys.exit(f"error: {error}")
        _end_now(f"error: {error}")
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        _end_now(
            f"error: {type(error).__name__}; if another process died before, its output has the "
            "cause. The same command on all goes on from the last checkpoint"
        )


def _end_now(message: str) -> NoReturn:
    """Ends a process of a job without waiting for the others, which may be dead or wait for us."""
    print(f"{processes.describe()}{message}", file=sys.stderr, flush=True)
    os._exit(1)


def _pass_over_libtpu_without_tpu() -> None:
    """libtpu, with which the tests compile, complains at length where there is no TPU."""
    other_plugins = importlib.metadata.entry_points(group="jax_plugins")
    if "JAX_PLATFORMS" not in os.environ and not processes.has_tpu() and not other_plugins:
        jax.config.update("jax_platforms", "cpu")
