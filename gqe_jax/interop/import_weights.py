"""Imports weights into a run directory.

    python -m gqe_jax.interop.import_weights DIR --output runs/mine

DIR holds config.json and safetensors files: a Llama or Qwen3 in Hugging Face's format, which
becomes a model with variant `gqa`, or a GQE model written by `gqe_jax.interop.export_weights`. The
run directory is then an input of `train.py`, `eval.py` and `gqe_jax.interop.upcycle`.
"""

import dataclasses
import json
import pathlib
import sys

import jax
import tyro
from flax import nnx

from gqe_jax.commands import parse, run_command
from gqe_jax.config import ConfigError, DataConfig, Dtype, ModelConfig, RunConfig
from gqe_jax.config_json import from_dict
from gqe_jax.data.special_tokens import (
    GENERATION_FILE,
    IMPORTED_FILE,
    companions,
    read_fields,
    to_json,
)
from gqe_jax.data.tokenizers import TOKENIZER_FILE, load_tokenizer
from gqe_jax.errors import DataError
from gqe_jax.interop import hf_config
from gqe_jax.interop.layout import abstract_params, read_params
from gqe_jax.interop.tensors import Tensors, WeightsError
from gqe_jax.runs import SPREAD, write_run
from gqe_jax.sharding import make_mesh, shardings

GQE = "gqe"
"""`model_type` in config.json of a GQE model, whose ModelConfig is the field `model`."""
ARCHITECTURE = "GroupedQueryExpertsForCausalLM"
"""The name under which inference engines know the model class of `gqe_jax.serving`."""


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """Import weights into a run directory."""

    weights: tyro.conf.Positional[pathlib.Path]
    """Directory with config.json, safetensors and, optionally, tokenizer.json."""
    output: pathlib.Path
    """Run directory to create."""
    corpus: str | None = None
    """Corpus for training and evaluation, prepared with this tokenizer; None: corpora/NAME, with
    the output's name."""
    sequence_length: int | None = None
    """Tokens per window; at most the sequence length that the model was trained with. None: 2048,
    or fewer where config.json's max_position_embeddings is less."""
    end_of_document: str | None = None
    """Token that ends a document and a generated text; None: the `eos_token_id` of config.json and
    generation_config.json, the `eos_token` of tokenizer_config.json, or a common one."""
    dtype: Dtype = "bfloat16"
    """Dtype of activations and matrix products; parameters are float32."""


def read_model(directory: pathlib.Path, dtype: Dtype) -> tuple[ModelConfig, nnx.State]:
    """The configuration and parameters of a model in safetensors, sharded over all devices.

    Raises:
      WeightsError: a field or tensor cannot be used; names it and its file.
    """
    values = hf_config.read_config(directory)
    try:
        if values.get("model_type") == GQE:
            config = from_dict(ModelConfig, values.get("model"))
            config = dataclasses.replace(config, dtype=dtype)
        else:
            config = hf_config.to_model_config(values, dtype=dtype)
    except (ConfigError, WeightsError) as error:
        raise WeightsError(f"{directory / hf_config.CONFIG_FILE}: {error}") from error
    tensors = Tensors(directory)
    if config.num_layers > len(tensors):  # before a table of all layers is made
        field = "num_layers" if values.get("model_type") == GQE else "num_hidden_layers"
        raise WeightsError(
            f"{directory / hf_config.CONFIG_FILE}: {field} is {config.num_layers}; {directory} has "
            f"only {len(tensors)} tensors: correct it, or copy the files again"
        )
    layout = shardings(abstract_params(config), make_mesh(SPREAD))
    return config, read_params(config, tensors, layout)


def import_weights(config: ImportConfig) -> RunConfig:
    """Writes the run directory and returns its configuration.

    Raises:
      WeightsError: a field or tensor cannot be used; names it and its file.
      DataError: the output exists.
    """
    files, longest = _files(config)
    model, params = read_model(config.weights, config.dtype)
    run = RunConfig(
        model=model,
        data=DataConfig(corpus=config.corpus or f"corpora/{config.output.name}"),
        run_dir=str(config.output),
        sequence_length=config.sequence_length or min(2048, longest),
    )
    tokenizer = config.weights / TOKENIZER_FILE
    write_run(run, params, tokenizer if tokenizer.is_file() else None, files)
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"{config.output}: {model.attention.variant}, {count:,} parameters from {config.weights}")
    if tokenizer.is_file():
        print(
            f"to prepare its corpus: python -m gqe_jax.data.prepare --tokenizer "
            f"{config.output / TOKENIZER_FILE} --output {run.data.corpus} --input ..."
        )
    else:
        print(f"{config.weights} has no {TOKENIZER_FILE}; the corpus must use the same tokens")
    return run


def _files(config: ImportConfig) -> tuple[dict[str, bytes], int]:
    """The files to keep beside the tokenizer, and the longest sequence that the model takes."""
    files = companions(config.weights)
    kept = json.loads(files.get(IMPORTED_FILE, b"{}"))
    path = config.weights / TOKENIZER_FILE
    if config.end_of_document is not None:
        if not path.is_file():
            raise DataError(
                f"end_of_document is {config.end_of_document!r}; {config.weights} has no "
                f"{TOKENIZER_FILE}: copy it there, or leave end_of_document out"
            )
        ends = load_tokenizer(path, config.end_of_document).special.ends
        kept["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
        files[IMPORTED_FILE] = to_json(kept)
        if generation := read_fields(config.weights / GENERATION_FILE):
            files[GENERATION_FILE] = to_json(generation | {"eos_token_id": kept["eos_token_id"]})
    elif path.is_file():
        try:
            load_tokenizer(path)
        except DataError as error:
            print(f"warning: {error}", file=sys.stderr)
    longest = kept.get("max_position_embeddings")
    return files, 2048 if longest is None else longest


def main() -> None:
    """The command line."""
    config = parse(ImportConfig, sys.argv[1:], prog="import_weights", description=__doc__)
    run_command(lambda: import_weights(config))


if __name__ == "__main__":
    main()
