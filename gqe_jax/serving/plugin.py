"""The entry point of the group `vllm.general_plugins`, which vLLM calls in each of its processes.

Only vLLM imports this module: it needs the extra `serve`.
"""

from typing import Any

from transformers import (  # pyrefly: ignore[missing-import]
    AutoConfig,
    PretrainedConfig,
)
from vllm.model_executor.models.config import (  # pyrefly: ignore[missing-import]
    MODELS_CONFIG_MAP,
    VerifyAndUpdateConfig,
)

from gqe_jax.config import ModelConfig
from gqe_jax.config_json import from_dict
from gqe_jax.interop.import_weights import ARCHITECTURE, GQE
from gqe_jax.serving.model import GroupedQueryExpertsForCausalLM, served_config
from gqe_jax.serving.paged import cache_heads


class GQEConfig(PretrainedConfig):
    """An exported `config.json`, with the fields that the engine reads of every model."""

    model_type = GQE

    def __init__(self, model: dict[str, Any] | None = None, **fields: Any):
        if model is not None:  # transformers also makes an empty one
            ours = from_dict(ModelConfig, model)
            attention = ours.attention
            heads, head_dim = cache_heads(attention, 1)
            fields = {
                "architectures": [ARCHITECTURE],
                "vocab_size": ours.vocab_size,
                "hidden_size": attention.embed_dim,
                "intermediate_size": ours.mlp_dim,
                "num_hidden_layers": ours.num_layers,
                "num_attention_heads": attention.num_query_experts,
                "num_key_value_heads": heads,
                "head_dim": head_dim,
                "tie_word_embeddings": ours.tied_embedding,
                "dtype": ours.dtype,
            } | fields
        self.model = model
        super().__init__(**fields)


class ServedConfig(VerifyAndUpdateConfig):
    """What depends on the engine's configuration, before the engine sizes its cache."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Checks what is served, and sets the key/value heads of the cache."""
        attention = served_config(vllm_config).attention
        heads, _ = cache_heads(attention, vllm_config.parallel_config.tensor_parallel_size)
        vllm_config.model_config.hf_config.num_key_value_heads = heads


def register() -> None:
    """Tells vLLM of the model, its configuration and its cache."""
    from tpu_inference.models.common.model_loader import (  # pyrefly: ignore[missing-import]
        register_model,
    )

    AutoConfig.register(GQE, GQEConfig, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = ServedConfig
    register_model(ARCHITECTURE, GroupedQueryExpertsForCausalLM)
