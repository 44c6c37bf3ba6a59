"""Exports a run's weights for other projects.

    python -m gqe_jax.interop.export_weights runs/mine --output DIR

DIR receives config.json, safetensors files and the run's tokenizer.json. A model with variant `gqa`
becomes a Llama, or with QK-norm a Qwen3, that `transformers` loads. In a routed model the attention
has the authors' tensor names and the rest Llama's; config.json holds our ModelConfig.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any, Literal

import ml_dtypes
import numpy as np
import tyro

from gqe_jax.commands import parse, run_command
from gqe_jax.config import ConfigError, Dtype
from gqe_jax.config_json import to_dict
from gqe_jax.data.corpus import written_whole
from gqe_jax.data.tokenizers import TOKENIZER_FILE, load_tokenizer
from gqe_jax.interop import hf_config
from gqe_jax.interop.import_weights import GQE
from gqe_jax.interop.layout import torch_reader, torch_shapes
from gqe_jax.interop.tensors import write_tensors
from gqe_jax.runs import SPREAD, Run
from gqe_jax.sharding import make_mesh
from gqe_jax.storage import Location, write_whole

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Export a run's weights for other projects."""

    run_dir: tyro.conf.Positional[pathlib.Path]
    """Directory of the run."""
    output: pathlib.Path
    """Directory to create."""
    step: int | Literal["latest", "best"] = "latest"
    """The checkpoint; `best` has the lowest held-out loss in training."""
    dtype: Dtype = "float32"
    """Dtype of the files; float32 is exact, bfloat16 is exact for weights imported in bfloat16."""
    max_position_embeddings: int | None = None
    """Maximum sequence length in config.json; None: the run's sequence_length."""
    max_shard_bytes: int = 5_000_000_000
    """Maximum bytes of a file; larger weights are split into several files."""

    def __post_init__(self) -> None:
        for field in ("max_position_embeddings", "max_shard_bytes"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ConfigError(f"{field} is {value}; it must be positive")


def export_weights(config: ExportConfig) -> None:
    """Writes the output directory.

    Raises:
      CheckpointError: the run has no such checkpoint.
      WeightsError: the model has no counterpart in Hugging Face's layout.
      DataError: the output exists.
    """
    found = Run.find(config.run_dir, config.step)
    run, tokenizer = found.config, found.tokenizer_file()
    _, params = found.load(make_mesh(SPREAD))
    if run.model.attention.variant == "gqa":
        values = hf_config.from_model_config(
            run.model,
            max_positions=config.max_position_embeddings or run.sequence_length,
            dtype=config.dtype,
            end_of_document=_end_of_document(tokenizer),
        )
    else:
        values: dict[str, Any] = {"model_type": GQE, "model": to_dict(run.model)}
    with written_whole(config.output) as partial:
        (partial / hf_config.CONFIG_FILE).write_text(json.dumps(values, indent=1) + "\n")
        write_tensors(
            partial,
            torch_shapes(run.model),
            torch_reader(run.model, params),
            _DTYPES[config.dtype],
            max_shard_bytes=config.max_shard_bytes,
        )
        if tokenizer is not None:
            write_whole(partial / TOKENIZER_FILE, tokenizer.read_bytes())
    layout = values.get("architectures", ["the authors' layout"])[0]
    print(f"{config.output}: {layout}, {config.dtype}, of {config.run_dir} at step {found.step}")


def _end_of_document(tokenizer: Location | None) -> int | None:
    """The end-of-document token; None if the tokenizer has none of the common ones."""
    try:
        return None if tokenizer is None else load_tokenizer(tokenizer).end_of_document
    except ValueError:
        return None


def main() -> None:
    """The command line."""
    config = parse(ExportConfig, sys.argv[1:], prog="export_weights", description=__doc__)
    run_command(lambda: export_weights(config))


if __name__ == "__main__":
    main()
