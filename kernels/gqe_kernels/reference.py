"""The semantics of the kernels in plain float32 JAX: the oracle of every other implementation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Attend = Callable[..., Float[Array, "batch q_len group head head_dim"]]


def attention_mask(
    q_len: int,
    kv_len: int,
    *,
    causal: bool,
    q_segment_ids: Int[Array, "batch q_len"] | None,
    kv_segment_ids: Int[Array, "batch kv_len"] | None,
    q_offset: int | Int[Array, ""] | Int[Array, "batch"],
) -> Bool[Array, "#batch q_len kv_len"]:
    """Which keys each query may read: none later, and only its own segment's; id 0 is padding."""
    visible = jnp.ones((1, q_len, kv_len), bool)
    if causal:
        position = jnp.arange(q_len) + jnp.reshape(jnp.asarray(q_offset), (-1, 1))
        visible &= jnp.arange(kv_len) <= position[:, :, None]
    if q_segment_ids is not None:
        same = q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
        visible = visible & same & (q_segment_ids != 0)[:, :, None]
    return visible


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
) -> Float[Array, "batch q_len group head head_dim"]:
    """Softmax attention of every head to its group; a row that sees nothing is zero."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    mask = attention_mask(
        query.shape[1],
        key.shape[1],
        causal=causal,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        q_offset=q_offset,
    )[:, None, None]
    high = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("btghd,bsgd->bghts", query, key, precision=high) * scale
    weights = masked_softmax(logits, mask)
    return jnp.einsum("bghts,bsgd->btghd", weights, value, precision=high)


def masked_softmax(
    logits: Float[Array, "batch group head q_len kv_len"],
    mask: Bool[Array, "#batch #group #head q_len kv_len"],
) -> Float[Array, "batch group head q_len kv_len"]:
    """Softmax over the visible keys; a row that sees nothing is zero."""
    row_max = jax.lax.stop_gradient(
        jnp.max(logits, axis=-1, keepdims=True, where=mask, initial=-1e30)
    )
    weights = jnp.exp(jnp.where(mask, logits - row_max, -jnp.inf))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def select_experts(
    query: Float[Array, "batch q_len group expert head_dim"],
    expert_index: Int[Array, "batch q_len group k"],
) -> Float[Array, "batch q_len group k head_dim"]:
    """The queries of the selected experts, by masking, so that its transpose is no scatter."""
    chosen = expert_index[..., None] == jnp.arange(query.shape[3])
    return jnp.sum(jnp.where(chosen[..., None], query[:, :, :, None], 0), axis=-2)


def mean_over_groups(
    x: Float[Array, "batch kv_len group head_dim"],
) -> Float[Array, "batch kv_len head_dim"]:
    """What the shared head reads (paper.md, step 4), of keys or values; summed in float32."""
    return jnp.mean(x.astype(jnp.float32), axis=2).astype(x.dtype)


def routed_attention(
    query: Float[Array, "batch q_len group expert head_dim"],
    key: Float[Array, "batch kv_len group head_dim"],
    value: Float[Array, "batch kv_len group head_dim"],
    expert_index: Int[Array, "batch q_len group k"],
    slot_weight: Float[Array, "batch q_len group k"] | None,
    shared_query: Float[Array, "batch q_len head_dim"] | None,
    shared_key: Float[Array, "batch kv_len head_dim"] | None,
    shared_value: Float[Array, "batch kv_len head_dim"] | None,
    *,
    attend: Attend = attend,
    **masking,
) -> Float[Array, "batch q_len slot head_dim"]:
    """The slots of the layer (paper.md, steps 4 and 5); `attend` does the attention itself."""
    hard = attend(select_experts(query, expert_index), key, value, **masking)
    shared = None
    if shared_query is not None:
        if shared_key is None:
            shared_key, shared_value = mean_over_groups(key), mean_over_groups(value)
        shared = attend(
            shared_query[:, :, None, None],
            shared_key[:, :, None],
            shared_value[:, :, None],
            **masking,
        )[:, :, 0, 0]
    return concatenate_slots(hard, slot_weight, shared, query.dtype)


def concatenate_slots(
    hard: Float[Array, "batch q_len group k head_dim"],
    slot_weight: Float[Array, "batch q_len group k"] | None,
    shared: Float[Array, "batch q_len head_dim"] | None,
    dtype: jnp.dtype,
) -> Float[Array, "batch q_len slot head_dim"]:
    """Hard, weighted and shared slots, those there are, in the order of W_O (step 5)."""
    batch, q_len, *_, head_dim = hard.shape
    slots = [hard.reshape(batch, q_len, -1, head_dim)]
    if slot_weight is not None:
        weighted = jnp.sum(
            slot_weight.astype(jnp.float32)[..., None] * hard.astype(jnp.float32), axis=(2, 3)
        )
        slots.append(weighted[:, :, None])
    if shared is not None:
        slots.append(shared[:, :, None])
    return jnp.concatenate([slot.astype(dtype) for slot in slots], axis=2)


def dense_attention(
    query: Float[Array, "batch q_len group expert head_dim"],
    key: Float[Array, "batch kv_len group head_dim"],
    value: Float[Array, "batch kv_len group head_dim"],
    *,
    attend: Attend = attend,
    **masking,
) -> Float[Array, "batch q_len slot head_dim"]:
    """Grouped-query attention of all heads: the baseline."""
    batch, q_len, *_, head_dim = query.shape
    out = attend(query, key, value, **masking)
    return out.reshape(batch, q_len, -1, head_dim).astype(query.dtype)
