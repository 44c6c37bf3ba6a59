"""Run directories as weights: read any, and write one that training begins with."""

import os
import pathlib
import shutil

from flax import nnx

from gqe_jax.config import MeshConfig, RunConfig
from gqe_jax.data.corpus import written_whole
from gqe_jax.data.tokenizers import TOKENIZER_FILE
from gqe_jax.interop.layout import abstract_params
from gqe_jax.sharding import make_mesh, shardings
from gqe_jax.storage import location
from gqe_jax.training.checkpoint import Checkpoints
from gqe_jax.training.loop import write_config
from gqe_jax.training.steps import TrainState

SPREAD = MeshConfig(data=1, fsdp=-1)  # parameters over all devices


def read_run(
    run_dir: str | os.PathLike, step: int | str = "latest"
) -> tuple[RunConfig, int, nnx.State]:
    """A run's configuration, the step that was found, and its parameters, over all devices.

    Args:
      run_dir: of `train.py` or of an import.
      step: of a checkpoint, or `latest` or `best`.

    Raises:
      CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    with Checkpoints(run_dir, read_only=True) as checkpoints:
        step = checkpoints.resolve(step)
        config, _ = checkpoints.read_run(step)
        params = abstract_params(config.model)
        layout = shardings(params, make_mesh(SPREAD))
        params = checkpoints.restore_params(
            step, TrainState(None, params, None), TrainState(None, layout, None)
        )
    return config, step, params


def write_run(config: RunConfig, params: nnx.State, tokenizer: pathlib.Path | None) -> None:
    """Writes `config.run_dir`, whole or not at all: configuration, weights of step 0, tokenizer.

    Raises:
      DataError: the directory exists.
    """
    with written_whole(location(config.run_dir)) as partial:
        with Checkpoints(partial) as checkpoints:
            checkpoints.save_weights(params, config)
        write_config(config, partial)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, partial / TOKENIZER_FILE)


def tokenizer_file(run_dir: pathlib.Path, config: RunConfig) -> pathlib.Path | None:
    """The run's tokenizer.json, or its corpus's; None where tokens are bytes or there is none."""
    paths = (directory / TOKENIZER_FILE for directory in (run_dir, location(config.data.corpus)))
    return next((path for path in paths if path.is_file()), None)
