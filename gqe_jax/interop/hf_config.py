"""Conversion between Hugging Face's config.json of Llama and Qwen3 and a `gqa` ModelConfig."""

import json
import pathlib
from typing import Any

from gqe_jax.config import AttentionConfig, ConfigError, Dtype, ModelConfig, RopeScaling
from gqe_jax.interop.tensors import WeightsError

CONFIG_FILE = "config.json"
LLAMA, QWEN3 = "llama", "qwen3"

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
        values = json.loads(path.read_text())
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{path} must be an object of fields")
    return values


def to_model_config(values: dict[str, Any], *, dtype: Dtype) -> ModelConfig:
    """The ModelConfig of a Llama or Qwen3 model.

    Args:
      values: the fields of config.json.
      dtype: dtype of activations and matrix products.

    Raises:
      WeightsError: a field is missing, or has a value that our model does not support; names it.
    """
    kind = values.get("model_type")
    if kind not in (LLAMA, QWEN3):
        raise WeightsError(f"model_type is {kind!r}; it must be {LLAMA} or {QWEN3}")
    for field, required in _REQUIRED.items():
        if (value := values.get(field, required)) != required and value is not None:
            raise WeightsError(f"{field} is {value!r}; our model supports only {required!r}")
    other = sorted(set(values.get("layer_types") or []) - {"full_attention"})
    if other:
        raise WeightsError(f"layer_types has {other[0]!r}; our model supports only full_attention")

    def integer(field: str, default: int | None = None) -> int:
        value = values.get(field)
        value = default if value is None else value
        if type(value) is not int:
            raise WeightsError(f"{field} is {value!r}; it must be an integer")
        return value

    width, heads = integer("hidden_size"), integer("num_attention_heads")
    epsilon = values.get("rms_norm_eps", 1e-6)
    theta, scaling = _rope(values, integer("max_position_embeddings", 2048))
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
            tied_embedding=values.get("tie_word_embeddings", False),
            norm_epsilon=epsilon,
            embedding_init_std=values.get("initializer_range", 0.02),
            dtype=dtype,
        )
    except ConfigError as error:
        raise WeightsError(str(error)) from error


def _rope(values: dict[str, Any], max_positions: int) -> tuple[float, RopeScaling]:
    """RoPE's theta and scaling, from the fields of transformers 4 or 5."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = rope.get("rope_theta", values.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    try:
        if kind == "default":
            return float(theta), RopeScaling()
        if kind == "linear":
            return float(theta), RopeScaling("linear", float(rope["factor"]))
        if kind == "llama3":
            scaling = RopeScaling(
                "llama3",
                float(rope["factor"]),
                float(rope["low_freq_factor"]),
                float(rope["high_freq_factor"]),
                rope.get("original_max_position_embeddings", max_positions),
            )
            return float(theta), scaling
    except KeyError as error:
        raise WeightsError(f"rope_scaling of type {kind} lacks {error.args[0]}") from None
    raise WeightsError(f"rope_scaling is of type {kind!r}; it must be default, linear or llama3")


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
