"""Floating-point operations that the answer needs: a multiply and an add are two.

Only what is unmasked and active counts. A backward pass of attention is 2.5 forward passes, as is
usual: logits once more, however often a kernel computes them.
"""

from gqe_jax.config import AttentionConfig, ModelConfig
from gqe_jax.model.flops import matmul_flops_per_token, projection_flops_per_token


def attention(heads: int, head_dim: int, length: int, batch: int, *, training: bool) -> int:
    """Of causal attention by `heads` heads.

    Two products for each pair of a query and a key that it sees; backward five more: the logits
    again, dV, dP, dQ and dK.
    """
    pairs = length * (length + 1) // 2
    return 2 * (7 if training else 2) * head_dim * pairs * heads * batch


def layer(config: AttentionConfig, length: int, batch: int, *, training: bool) -> int:
    """Of an attention layer: its projections, router and heads."""
    heads, head_dim = config.num_active_heads, config.resolved_head_dim
    products = length * batch * projection_flops_per_token(config) * (3 if training else 1)
    return products + attention(heads, head_dim, length, batch, training=training)


def model(config: ModelConfig, length: int, batch: int, *, training: bool) -> float:
    """Of a model's loss and gradients, as `train.py` counts them; or of a prefill, whose logits are
    those of the last token alone."""
    flops = length * batch * matmul_flops_per_token(config, length)
    if training:
        return 3 * flops
    return flops - 2 * config.embed_dim * config.vocab_size * (length - 1) * batch


def projection(embed: int, head_dim: int, heads: int, tokens: int, *, training: bool) -> int:
    """Of the queries of `heads` heads."""
    return 2 * tokens * embed * head_dim * heads * (3 if training else 1)
