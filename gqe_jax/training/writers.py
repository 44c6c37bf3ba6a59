"""Where metrics are written: each place is a `Writer`."""

import importlib
import importlib.util
import json
import math
import os
import pathlib
import secrets
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TextIO, runtime_checkable

import numpy as np
import tensorboardX

from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.config_json import to_dict
from gqe_jax.errors import UserError
from gqe_jax.storage import Location, write_whole


@runtime_checkable
class Writer(Protocol):
    """A place for the records of a run."""

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Writes one record; its values are numbers, booleans, and lists or objects of them."""

    def flush(self) -> None:
        """Returns when what was written is on the disk."""

    def close(self) -> None:
        """Ends the writing."""


class JsonLines:
    """A line of JSON for each record, at once.

    Args:
      path: the file.
      kept: its content before the first record.
    """

    def __init__(self, path: pathlib.Path, kept: str):
        write_whole(path, kept)
        self._file: TextIO = path.open("a")

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **record}) + "\n")
        self._file.flush()

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Curves of the scalars.

    Args:
      directory: where the events are written.
      start: the step that the run resumes from; TensorBoard hides earlier events of later steps.
    """

    def __init__(self, directory: pathlib.Path, start: int):
        self._board = tensorboardX.SummaryWriter(
            str(directory),
            purge_step=start + 1,
            flush_secs=30,
            filename_suffix=f".from-{start}",
        )

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record):
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which later starts of the run continue.

    Args:
      project: the project's name.
      directory: where its files are written, in `wandb/`.
      config: the run, whose directory has the identity of its run there, in `wandb_id`.
      identity: that file.

    Raises:
      UserError: the run cannot be started.
    """

    def __init__(
        self, project: str, directory: pathlib.Path, config: RunConfig, identity: Location
    ):
        wandb = importlib.import_module("wandb")  # an extra
        if not identity.exists():
            write_whole(identity, secrets.token_hex(8))
        try:
            self._run = wandb.init(
                project=project,
                dir=str(directory),
                id=identity.read_text().strip(),
                name=os.path.basename(config.run_dir.rstrip("/")),
                config=to_dict(config),
                resume="allow",
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise UserError(
                f"wandb is {project!r}, and its run cannot be started ({error}); set "
                "WANDB_API_KEY, or WANDB_MODE=offline"
            ) from None
        # Steps that run again after a crash are written again, which its own count of them refuses.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **dict(scalars(record))})

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


def check_wandb(project: str | None) -> None:
    """Checks that the package is installed, where there is a project.

    Raises:
      ConfigError: it is not.
    """
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"wandb is {project!r}, which needs a missing package: pip install 'gqe-jax[wandb]'"
        )


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields the finite floats of a record, and each layer's greatest load and mean entropy."""
    for name, value in record.items():
        if isinstance(value, float) and math.isfinite(value):
            yield name, value
    for layer, load in enumerate(record.get("expert_load", ())):
        yield f"max_expert_load/layer_{layer}", float(np.max(load))
    for layer, entropy in enumerate(record.get("router_entropy", ())):
        yield f"router_entropy/layer_{layer}", float(np.mean(entropy))
