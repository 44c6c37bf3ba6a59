"""Floating-point operations that a model needs for one token, a multiply and an add as two.

Only matrix products count, as is usual for model FLOPs: norms, rotary embedding, softmax and
recomputation are left out, and so is what a causal mask hides. A backward pass has twice as many.
"""

from gqe_jax.config import AttentionConfig, ModelConfig


def projection_flops_per_token(config: AttentionConfig) -> int:
    """Returns the FLOPs of a layer's products with weights, for one token."""
    heads = config.num_query_experts + 2 * config.num_kv_heads + config.num_slots
    if config.variant == "gqe":
        heads += 3 if config.shared_kv == "own" else 1
    columns = config.resolved_head_dim * heads
    if config.variant != "gqa":
        columns += config.num_query_experts  # the router
    return 2 * config.embed_dim * columns


def attention_flops_per_token(config: AttentionConfig, sequence_length: int) -> int:
    """Returns the FLOPs of a layer's attention, QK and PV, for one token: the mean over positions.

    A token attends to half of the sequence.
    """
    return 2 * config.num_active_heads * config.resolved_head_dim * sequence_length


def matmul_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Returns the FLOPs of the model's forward pass for one token, logits included."""
    layer = projection_flops_per_token(config.attention) + attention_flops_per_token(
        config.attention, sequence_length
    )
    layer += 2 * 3 * config.embed_dim * config.mlp_dim
    return float(config.num_layers * layer + 2 * config.embed_dim * config.vocab_size)
