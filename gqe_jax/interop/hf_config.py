"""Conversion between Hugging Face's config.json of Llama and Qwen3 and a `gqa` ModelConfig."""

import pathlib
from typing import Any

import numpy as np

from gqe_jax.config import MAX_SIZE, AttentionConfig, ConfigError, Dtype, ModelConfig, RopeScaling
from gqe_jax.config_json import read_object
from gqe_jax.interop.tensors import WeightsError

CONFIG_FILE = "config.json"
LLAMA, QWEN3 = "llama", "qwen3"

_SMALLEST, _LARGEST = (float(x) for x in (np.finfo("f4").tiny, np.finfo("f4").max))

_ROPE_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}

# Values with which our model computes the same; an absent field has Hugging Face's default.
_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def read_config(directory: pathlib.Path) -> dict[str, Any]:
    """The fields of a directory's `config.json`.

    Raises:
      WeightsError: the file cannot be read or is not a JSON object.
    """
    path = directory / CONFIG_FILE
    try:
        return read_object(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise WeightsError(str(error)) from None


def to_model_config(values: dict[str, Any], *, dtype: Dtype) -> ModelConfig:
    """The ModelConfig of a Llama or Qwen3 model.

    Args:
      values: the fields of config.json.
      dtype: dtype of activations and matrix products.

    Raises:
      WeightsError: a field is missing, or has a value that our model does not support; names it.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in (LLAMA, QWEN3):
        raise WeightsError(f"model_type is {kind!r}; it must be {LLAMA} or {QWEN3}")
    for field, required in _REQUIRED.items():
        _check_supported(values, field, required)
    types = values.get("layer_types")
    for each in types if isinstance(types, list) else [] if types is None else [types]:
        if each != "full_attention":
            raise WeightsError(f"layer_types has {each!r}; our model supports only full_attention")

    def integer(field: str, default: int | None = None) -> int:
        return _integer(values, field, default)

    width, heads = integer("hidden_size"), integer("num_attention_heads")
    epsilon = _number(values, "rms_norm_eps", 1e-6)
    theta, scaling = _rope(values, integer("max_position_embeddings", 2048))
    initialised = values.get("initializer_range") != 0
    tied = values.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        raise WeightsError(f"tie_word_embeddings is {tied!r}; it must be true or false")
    try:
        return ModelConfig(
            attention=AttentionConfig(
                variant="gqa",
                embed_dim=width,
                num_query_experts=heads,
                num_kv_heads=integer("num_key_value_heads", heads),
                head_dim=integer("head_dim", width // heads if kind == LLAMA else 128),
                rope_theta=theta,
                rope_scaling=scaling,
                qk_norm=kind == QWEN3,
                qk_norm_epsilon=epsilon if kind == QWEN3 else 1e-6,
            ),
            num_layers=integer("num_hidden_layers"),
            mlp_dim=integer("intermediate_size"),
            vocab_size=integer("vocab_size"),
            tied_embedding=bool(tied),
            norm_epsilon=epsilon,
            embedding_init_std=_number(values, "initializer_range", 0.02) if initialised else 0.0,
            dtype=dtype,
        )
    except ConfigError as error:
        raise WeightsError(str(error)) from error


def _integer(values: dict[str, Any], field: str, default: int | None, where: str = "") -> int:
    """A positive integer; null is the default, as in Hugging Face's configurations."""
    value = values.get(field)
    value = default if value is None else value
    if type(value) is not int or not 0 < value <= MAX_SIZE:
        raise WeightsError(
            f"{where}{field} is {value!r}; it must be an integer from 1 to {MAX_SIZE}"
        )
    return value


def _number(values: dict[str, Any], field: str, default: float | None, where: str = "") -> float:
    """A positive number that float32 holds; null is the default."""
    value = values.get(field)
    value = default if value is None else value
    if type(value) not in (int, float) or value is None or not _SMALLEST <= value <= _LARGEST:
        raise WeightsError(f"{where}{field} is {value!r}; it must be a positive number")
    return float(value)


def _rope(values: dict[str, Any], max_positions: int) -> tuple[float, RopeScaling]:
    """RoPE's theta and scaling, from the fields of transformers 4 or 5."""
    name = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    rope = values.get(name) or {}
    if not isinstance(rope, dict):
        raise WeightsError(f"{name} is {rope!r}; it must be an object of fields, or null")
    if any(isinstance(value, dict) for value in rope.values()):  # by the type of a layer
        if not isinstance(rope.get("full_attention"), dict):
            raise WeightsError(
                f"{name} is {rope!r}; it must have fields for full_attention, the only type of "
                "layer that our model supports"
            )
        name, rope = f"{name}.full_attention", rope["full_attention"]
    where = f"{name}."
    _check_supported(rope, "partial_rotary_factor", 1.0, where)
    theta = _number(values, "rope_theta", 10000.0)
    theta = _number(rope, "rope_theta", theta, where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind is None or kind == "default":
        return theta, RopeScaling()
    for field in _ROPE_FIELDS.get(kind, ()) if isinstance(kind, str) else ():
        if field not in rope:
            raise WeightsError(f"{name} of type {kind} lacks {field}")
    try:
        if kind == "linear":
            return theta, RopeScaling("linear", _number(rope, "factor", None, where))
        if kind == "llama3":
            scaling = RopeScaling(
                "llama3",
                _number(rope, "factor", None, where),
                _number(rope, "low_freq_factor", None, where),
                _number(rope, "high_freq_factor", None, where),
                _integer(rope, "original_max_position_embeddings", max_positions, where),
            )
            return theta, scaling
    except ConfigError as error:
        raise WeightsError(f"{where}{error}") from None
    raise WeightsError(f"{name} is of type {kind!r}; it must be default, linear or llama3")


def _check_supported(values: dict[str, Any], field: str, required: Any, where: str = "") -> None:
    value = values.get(field)
    if value is not None and value != required:
        raise WeightsError(f"{where}{field} is {value!r}; our model supports only {required!r}")


def from_model_config(config: ModelConfig, *, dtype: Dtype) -> dict[str, Any]:
    """The fields of config.json that follow from ours: Qwen3 if the model has QK-norm, else Llama.

    The RoPE fields are those of transformers 4, which transformers 5 reads too.

    Raises:
      WeightsError: the variant is routed, or QK-norm has its own epsilon; neither model has that.
    """
    attention = config.attention
    if attention.variant != "gqa":
        raise WeightsError(f"variant is {attention.variant!r}; Llama and Qwen3 are gqa")
    if attention.qk_norm and attention.qk_norm_epsilon != config.norm_epsilon:
        raise WeightsError(
            f"qk_norm_epsilon is {attention.qk_norm_epsilon}; Qwen3 has one epsilon, so it must be "
            f"norm_epsilon ({config.norm_epsilon})"
        )
    name, kind = ("Qwen3ForCausalLM", QWEN3) if attention.qk_norm else ("LlamaForCausalLM", LLAMA)
    return {
        "architectures": [name],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_query_experts,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.resolved_head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": attention.rope_theta,
        "rope_scaling": _rope_scaling(attention.rope_scaling),
        "tie_word_embeddings": config.tied_embedding,
        "attention_bias": False,
        "initializer_range": config.embedding_init_std,
        "torch_dtype": dtype,
    }


def _rope_scaling(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling.kind == "none":
        return None
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        fields["low_freq_factor"] = scaling.low_freq_factor
        fields["high_freq_factor"] = scaling.high_freq_factor
        fields["original_max_position_embeddings"] = scaling.original_length
    return fields
