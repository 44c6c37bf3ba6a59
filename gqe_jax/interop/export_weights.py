"""Exports a run's weights for other projects.

    python -m gqe_jax.interop.export_weights runs/mine --output DIR

DIR receives config.json, safetensors files and the run's tokenizer.json. A model with variant `gqa`
becomes a Llama, or with QK-norm a Qwen3, that `transformers` loads. In a routed model the attention
has the authors' tensor names and the rest Llama's; config.json holds our ModelConfig, and
`gqe_jax.serving` serves it.
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
from gqe_jax.data.special_tokens import GENERATION_FILE, IMPORTED_FILE, companions, to_json
from gqe_jax.data.tokenizers import TOKENIZER_FILE
from gqe_jax.errors import DataError
from gqe_jax.interop import hf_config
from gqe_jax.interop.import_weights import ARCHITECTURE, GQE
from gqe_jax.interop.layout import torch_reader, torch_shapes
from gqe_jax.interop.tensors import write_tensors
from gqe_jax.runs import SPREAD, Run
from gqe_jax.sharding import make_mesh
from gqe_jax.storage import location, write_whole
from gqe_jax.whole_directory import written_whole

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
    averaged: bool = True
    """Export the average of the parameters, where the run keeps one."""
    dtype: Dtype = "float32"
    """Dtype of the files; float32 is exact, bfloat16 is exact for weights imported in bfloat16."""
    max_position_embeddings: int | None = None
    """Maximum sequence length in config.json; None: the longer of the run's sequence_length and
    that of the imported model."""
    end_of_document: str | None = None
    """Token that ends a text, `eos_token_id` in config.json; None: those of the imported model, or
    of the run's tokenizer."""
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
    found = Run.find(config.run_dir, config.step, averaged=config.averaged)
    run, tokenizer = found.config, found.tokenizer_file()
    files = companions(location(config.run_dir))
    kept = json.loads(files.pop(IMPORTED_FILE, b"{}"))
    special = _special_fields(config, found, kept)
    _, params = found.load(make_mesh(SPREAD))
    if run.model.attention.variant == "gqa":
        values = hf_config.from_model_config(
            run.model,
            dtype=config.dtype,
        )
    else:
        values: dict[str, Any] = {"architectures": [ARCHITECTURE], "model_type": GQE}
        values["model"] = to_dict(run.model)
        special = {name: value for name, value in special.items() if value is not None}
        if "eos_token_id" in special and GENERATION_FILE not in files:  # where engines look for it
            ends = {name: special[name] for name in special if name.endswith("_token_id")}
            files[GENERATION_FILE] = to_json(ends)
    values |= special
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
        for name, content in files.items():
            write_whole(partial / name, content)
    name = values["architectures"][0]
    print(f"{config.output}: {name}, {config.dtype}, of {config.run_dir} at step {found.step}")


def _special_fields(config: ExportConfig, run: Run, kept: dict[str, Any]) -> dict[str, Any]:
    """The fields of config.json that are no part of our configuration.

    Args:
      config: what to export.
      run: the run.
      kept: those of the model that the run was imported from.
    """
    lengths = (run.config.sequence_length, kept.get("max_position_embeddings") or 0)
    bos, ends = kept.get("bos_token_id"), kept.get("eos_token_id")
    if run.tokenizer_file() is not None and (ends is None or config.end_of_document is not None):
        try:
            special = run.tokenizer(end_of_document=config.end_of_document).special
        except DataError:
            if config.end_of_document is not None:
                raise
        else:
            ends = special.ends[0] if len(special.ends) == 1 else list(special.ends)
            bos = special.prefix[0] if bos is None and special.prefix else bos
    return {
        "max_position_embeddings": config.max_position_embeddings or max(lengths),
        "bos_token_id": bos,
        "eos_token_id": ends,
    }


def main() -> None:
    """The command line."""
    config = parse(ExportConfig, sys.argv[1:], prog="export_weights", description=__doc__)
    run_command(lambda: export_weights(config))


if __name__ == "__main__":
    main()
