"""Attention of a few queries, as in decoding: each group's keys and values are read once.

The logits are whole, not in blocks. The shared head makes no mean of the cache: its query stands
beside each group's own, for q · mean(K_g) = mean(q · K_g), and likewise for the values.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gqe_kernels import reference


def attend(
    query: Float[Array, "batch q_len group head head_dim"],
    key: Float[Array, "batch kv_len group head_dim"],
    value: Float[Array, "batch kv_len group head_dim"],
    *,
    scale: float,
    causal: bool,
    q_segment_ids: Int[Array, "batch q_len"] | None,
    kv_segment_ids: Int[Array, "batch kv_len"] | None,
    q_offset: int | Int[Array, ""] | Int[Array, "batch"],
    last_reads_mean: bool = False,
) -> Float[Array, "batch q_len group head head_dim"]:
    """As `reference.attend`: operands in their own dtype, float32 softmax and accumulation.

    With `last_reads_mean`, the last head's query is the same in every group; the mean over groups
    of its outputs is its attention to the mean over groups of key and value.
    """
    mask = reference.attention_mask(
        query.shape[1],
        key.shape[1],
        causal=causal,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        q_offset=q_offset,
    )[:, None, None]
    logits = scale * jnp.einsum("btghd,bsgd->bghts", query, key, preferred_element_type=jnp.float32)
    if last_reads_mean:
        own, last = logits[:, :, :-1], logits[:, :, -1:]
        mean = jnp.broadcast_to(jnp.mean(last, axis=1, keepdims=True), last.shape)
        logits = jnp.concatenate([own, mean], axis=2)
    weights = reference.masked_softmax(logits, mask)
    return jnp.einsum(
        "bghts,bsgd->btghd",
        weights.astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )


def routed_attention(
    query: Float[Array, "batch q_len group expert head_dim"],
    key: Float[Array, "batch kv_len group head_dim"],
    value: Float[Array, "batch kv_len group head_dim"],
    expert_index: Int[Array, "batch q_len group k"],
    slot_weight: Float[Array, "batch q_len group k"] | None,
    shared_query: Float[Array, "batch q_len head_dim"] | None,
    shared_key: Float[Array, "batch kv_len head_dim"] | None,
    shared_value: Float[Array, "batch kv_len head_dim"] | None,
    **masking,
) -> Float[Array, "batch q_len slot head_dim"]:
    """As `reference.routed_attention`."""
    if shared_query is None or shared_key is not None:
        operands = (expert_index, slot_weight, shared_query, shared_key, shared_value)
        return reference.routed_attention(query, key, value, *operands, attend=attend, **masking)
    selected = reference.select_experts(query, expert_index)
    shape = (*selected.shape[:3], 1, selected.shape[4])
    shared = jnp.broadcast_to(shared_query[:, :, None, None], shape)
    heads = jnp.concatenate([selected, shared], axis=3)
    out = attend(heads, key, value, last_reads_mean=True, **masking)
    hard, shared = out[:, :, :, :-1], jnp.mean(out[:, :, :, -1], axis=2)
    return reference.concatenate_slots(hard, slot_weight, shared, query.dtype)


dense_attention = functools.partial(reference.dense_attention, attend=attend)
