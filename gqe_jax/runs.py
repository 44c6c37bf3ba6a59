"""Run directories: their configurations, and the one way to load a trained model.

    run = Run.find("runs/mine", "best")
    model = run.model(make_mesh(run.mesh()))

Everything that reads a run follows these rules:

- configuration: the checkpoint's, as it was trained.
- step: a number, `latest`, or `best`, which has the lowest held-out loss.
- mesh: the one that the user named; else the run's own, where that fits the devices; else all
  devices share the batch.
- parameters: read directly onto that mesh, whatever mesh wrote them; their average, where the run
  keeps one (`optimizer.average_decay`).
- tokenizer: the one that the user named; else `tokenizer.json` in the run's directory; else that of
  the corpus it was trained on.
- attention kernel: held-out text is scored with the one that the user named; else with the run's
  own, where this platform has it. Everything else takes the best kernel for each call, because
  generation needs kernels that take a cache.
"""

import dataclasses
import importlib
import json
import os
import types
from collections.abc import Mapping

import jax
from flax import nnx
from jax.sharding import Mesh

from gqe_jax.config import ConfigError, MeshConfig, RunConfig
from gqe_jax.config_json import from_dict, parse_json, to_dict
from gqe_jax.data.corpus import corpus_tokenizer, read_manifest
from gqe_jax.data.stdlib import STDLIB
from gqe_jax.data.tokenizers import BYTE, TOKENIZER_FILE, Tokenizer, load_tokenizer
from gqe_jax.errors import DataError
from gqe_jax.model.transformer import Transformer
from gqe_jax.sharding import make_mesh
from gqe_jax.storage import Location, location, write_whole
from gqe_jax.training.checkpoint import Checkpoints
from gqe_jax.training.state import lay_out_params
from gqe_jax.whole_directory import written_whole
from gqe_kernels import ImplementationName

CONFIG_FILE = "config.json"
SPREAD = MeshConfig(data=1, fsdp=-1)
"""The mesh that shards the parameters over all devices: for converting weights, not computing."""
_PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu", "cudnn": "gpu"}


def write_config(config: RunConfig, directory: Location | None = None) -> None:
    """Writes `config.json` into `directory`, by default the run's, whole or not at all."""
    path = (directory or location(config.run_dir)) / CONFIG_FILE
    write_whole(path, json.dumps(to_dict(config), indent=1) + "\n")


def load_config(run_dir: str | os.PathLike) -> RunConfig:
    """Reads the `config.json` of a run.

    Raises:
      ConfigError: it is no run's configuration.
    """
    path = location(run_dir) / CONFIG_FILE
    try:
        return from_dict(RunConfig, parse_json(path.read_bytes()))
    except (OSError, ValueError) as error:  # ConfigError is a ValueError
        raise ConfigError(f"{path} is not the configuration of a run ({error})") from error


def named_configs() -> dict[str, RunConfig]:
    """Returns `CONFIGS` of the package `configs` in the directory where a command runs.

    That package is built on this one, so it is imported only here, when a command asks for it.
    Where there is none, as outside the repository, no configuration has a name.
    """
    try:
        return importlib.import_module("configs").CONFIGS
    except ModuleNotFoundError as error:
        if error.name != "configs":
            raise
        return {}


def find_config(name: str) -> RunConfig:
    """Returns the configuration with this name, or that of the run in this directory.

    Raises:
      ConfigError: there is neither.
    """
    configs = named_configs()
    if name in configs:
        return configs[name]
    if not (location(name) / CONFIG_FILE).is_file():
        raise ConfigError(
            f"CONFIG is {name!r}; it must be one of {', '.join(configs)}, or the directory of a "
            f"run, with its {CONFIG_FILE}"
        )
    return dataclasses.replace(load_config(name), run_dir=name)


@dataclasses.dataclass(frozen=True)
class Run:
    """A checkpoint of a run; its arrays are read when they are asked for."""

    directory: str | os.PathLike
    step: int
    config: RunConfig
    """The configuration it was trained with."""
    averaged: bool = True
    """Read the average of the parameters, where the checkpoint has one."""

    @classmethod
    def find(
        cls,
        directory: str | os.PathLike,
        step: int | str = "latest",
        *,
        averaged: bool = True,
    ) -> "Run":
        """Finds a checkpoint and reads its configuration.

        Args:
          directory: the run's, written by training or by an import.
          step: a number, `latest` or `best`.
          averaged: read the average of the parameters, where the checkpoint has one.

        Raises:
          CheckpointError: there is no such checkpoint, or it cannot be read.
        """
        with Checkpoints(directory, read_only=True) as checkpoints:
            step = checkpoints.resolve(step)
            config, _ = checkpoints.read_run(step)
        return cls(directory, step, config, averaged)

    def mesh(self, named: MeshConfig | None = None) -> MeshConfig:
        """Returns `named`; else the run's mesh where it fits the devices; else the default."""
        if named is not None:
            return named
        try:
            self.config.mesh.resolve(jax.device_count())
        except ConfigError:
            return MeshConfig()
        return self.config.mesh

    @property
    def attention_kernel(self) -> ImplementationName | None:
        """The kernel that the run was trained with, or None where this platform lacks it."""
        kernel, platform = self.config.attention_kernel, jax.default_backend()
        needed = None if kernel is None else _PLATFORMS.get(kernel)
        return kernel if needed in (None, platform) else None

    def load(self, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
        """Reads the parameters onto a mesh, and returns the model without them, and them.

        Raises:
          CheckpointError: the checkpoint is damaged.
        """
        graphdef, abstract = lay_out_params(self.config.model, mesh)
        with Checkpoints(self.directory, read_only=True) as checkpoints:
            return graphdef, checkpoints.restore_params(self.step, abstract, averaged=self.averaged)

    def model(self, mesh: Mesh) -> Transformer:
        """Reads the model onto a mesh; errors as of `load`."""
        return nnx.merge(*self.load(mesh))

    def tokenizer_file(self) -> Location | None:
        """The `tokenizer.json` of the run or its corpus; None if tokens are bytes or it is gone."""
        corpus = self.config.data.corpus
        directories = [self.directory] if corpus == STDLIB else [self.directory, corpus]
        paths = (location(directory) / TOKENIZER_FILE for directory in directories)
        return next((path for path in paths if path.is_file()), None)

    def tokenizer(self, named: str | None = None, end_of_document: str | None = None) -> Tokenizer:
        """Loads the tokenizer.

        Args:
          named: `byte` or the path of a tokenizer.json; None: the run's own.
          end_of_document: the token that ends a document and a generated text; None: that of the
            tokenizer or the corpus.

        Raises:
          DataError: there is none, or it has more tokens than the model.
        """
        own, corpus = location(self.directory) / TOKENIZER_FILE, self.config.data.corpus
        if named is not None or own.is_file() or corpus == STDLIB:
            chosen = named or (own if own.is_file() else BYTE)
            tokenizer = load_tokenizer(chosen, end_of_document)
        else:
            try:
                directory = location(corpus)
                manifest = read_manifest(directory)
                tokenizer = corpus_tokenizer(directory, manifest, end_of_document)
            except DataError as error:
                raise DataError(
                    f"tokenizer: {own} is not there, and of the corpus that {self.directory} was "
                    f"trained on: {error}. Name the tokenizer: --tokenizer byte, or a "
                    "tokenizer.json"
                ) from None
        if tokenizer.vocab_size > self.config.model.vocab_size:
            raise DataError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model of "
                f"{self.directory} {self.config.model.vocab_size}; name the tokenizer it was "
                "trained with"
            )
        return tokenizer


@dataclasses.dataclass(frozen=True)
class RestoredRun:
    """A trained model, its mesh and its tokenizer."""

    config: RunConfig
    """The configuration it was trained with."""
    step: int
    model: Transformer
    """Its parameters lie on `mesh`."""
    mesh: Mesh
    tokenizer: Tokenizer


def restore_run(
    run_dir: str | os.PathLike,
    *,
    step: int | str = "latest",
    mesh: MeshConfig | None = None,
    tokenizer: str | None = None,
    end_of_document: str | None = None,
) -> RestoredRun:
    """Loads a trained model and its tokenizer, for generation and scoring.

    Args:
      run_dir: the run's directory.
      step: a number, `latest` or `best`.
      mesh: the devices' mesh; None: the run's, where it fits the devices.
      tokenizer: `byte` or the path of a tokenizer.json; None: the run's own.
      end_of_document: the token that ends a document; None: the tokenizer's.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
      ConfigError: the mesh does not fit the devices.
      DataError: there is no tokenizer, or it does not fit the model.
    """
    run = Run.find(run_dir, step)
    loaded = run.tokenizer(tokenizer, end_of_document)
    devices = make_mesh(run.mesh(mesh))
    return RestoredRun(run.config, run.step, run.model(devices), devices, loaded)


def write_run(
    config: RunConfig,
    params: nnx.State,
    tokenizer: Location | None,
    files: Mapping[str, bytes] = types.MappingProxyType({}),
) -> None:
    """Writes `config.run_dir`, whole or not at all: configuration, weights of step 0, tokenizer.

    Args:
      config, params: the run.
      tokenizer: its tokenizer.json, or None.
      files: other files, by name.

    Raises:
      DataError: the directory exists.
    """
    with written_whole(location(config.run_dir)) as partial:
        with Checkpoints(partial) as checkpoints:
            checkpoints.save_weights(params, config)
        write_config(config, partial)
        if tokenizer is not None:
            write_whole(partial / TOKENIZER_FILE, tokenizer.read_bytes())
        for name, content in files.items():
            write_whole(partial / name, content)
