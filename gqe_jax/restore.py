"""A trained model from its run directory, on any mesh, with its tokenizer."""

import dataclasses

from flax import nnx
from jax.sharding import Mesh

from gqe_jax.config import MeshConfig, RunConfig
from gqe_jax.data import DataError
from gqe_jax.data.corpus import read_manifest
from gqe_jax.data.tokenizers import BYTE, TOKENIZER_FILE, Tokenizer, load_tokenizer
from gqe_jax.model.transformer import Transformer
from gqe_jax.sharding import make_mesh
from gqe_jax.storage import location
from gqe_jax.training.checkpoint import Checkpoints
from gqe_jax.training.steps import make_steps


@dataclasses.dataclass(frozen=True)
class RestoredRun:
    """What a run directory holds of a checkpoint."""

    config: RunConfig
    """As it was trained."""
    step: int
    model: Transformer
    """Its parameters lie on `mesh`."""
    mesh: Mesh
    tokenizer: Tokenizer


def restore_run(
    run_dir: str,
    *,
    step: int | str = "latest",
    mesh: MeshConfig | None = None,
    tokenizer: str | None = None,
) -> RestoredRun:
    """Reads a checkpoint's parameters onto a mesh, whatever mesh trained them.

    Args:
      run_dir: of train.py.
      step: its number, `latest` or `best`.
      mesh: None: all devices share the batch.
      tokenizer: `byte` or a tokenizer.json; None: the run's own, from `RUN_DIR/tokenizer.json` or
        else from the corpus it was trained on.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
      ConfigError: the mesh does not fit the devices.
      DataError: there is no tokenizer, or it does not fit the model.
    """
    with Checkpoints(run_dir, read_only=True) as checkpoints:
        number = checkpoints.resolve(step)
        config, _ = checkpoints.read_run(number)
        loaded = find_tokenizer(run_dir, config, tokenizer)
        devices = make_mesh(mesh or MeshConfig())
        steps = make_steps(config, devices)
        params = checkpoints.restore_params(number, steps.abstract_state, steps.state_sharding)
    return RestoredRun(config, number, nnx.merge(steps.graphdef, params), devices, loaded)


def find_tokenizer(run_dir: str, config: RunConfig, name: str | None = None) -> Tokenizer:
    """The tokenizer of a run, or the one that `name` names.

    Raises:
      DataError: there is none, or it has more tokens than the model.
    """
    own, corpus = location(run_dir) / TOKENIZER_FILE, config.data.corpus
    end_of_document = None
    if name is None and own.is_file():
        name = str(own)
    elif name is None and corpus == "stdlib":
        name = BYTE
    elif name is None:
        try:
            manifest = read_manifest(location(corpus))
        except DataError as error:
            raise DataError(
                f"tokenizer: {own} is not there, and of the corpus that {run_dir} was trained on: "
                f"{error}. Name the tokenizer: --tokenizer byte, or a tokenizer.json"
            ) from None
        is_byte = manifest.tokenizer == BYTE
        name = BYTE if is_byte else str(location(corpus) / TOKENIZER_FILE)
        end_of_document = manifest.end_of_document
    try:
        tokenizer = load_tokenizer(name)
    except ValueError as error:
        raise DataError(str(error)) from None
    if end_of_document is not None:
        tokenizer.end_of_document = end_of_document
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"tokenizer {name} has {tokenizer.vocab_size} tokens and the model of {run_dir} "
            f"{config.model.vocab_size}; name the tokenizer it was trained with"
        )
    return tokenizer
