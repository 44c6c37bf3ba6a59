"""Grouped Query Experts for JAX: layers to import into a Flax model, and a language model."""

from gqe_jax.config import (
    AttentionConfig,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)
from gqe_jax.model.attention import AttentionAux, GroupedQueryAttention, GroupedQueryExperts
from gqe_jax.model.cache import KVCache
from gqe_jax.model.transformer import Transformer

__all__ = [
    "AttentionAux",
    "AttentionConfig",
    "ConfigError",
    "DataConfig",
    "GroupedQueryAttention",
    "GroupedQueryExperts",
    "KVCache",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "Transformer",
]
