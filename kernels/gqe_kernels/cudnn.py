"""Attention by cuDNN, through `jax.nn.dot_product_attention`: of all heads or the selected ones."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gqe_kernels import reference


@functools.cache
def available() -> bool:
    """Whether this process has a GPU: JAX asks cuDNN for its version while tracing."""
    return any(device.platform == "gpu" for device in jax.devices())


def unsupported(
    query, key, *, scale, causal, q_segment_ids, kv_segment_ids, q_offset
) -> str | None:
    """The argument that cuDNN cannot take, with the reason; None if it takes them all."""
    head_dim = query.shape[-1]
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"query: dtype {query.dtype}, where bfloat16 or float16 is needed"
    if head_dim > 128 or head_dim % 8:
        return f"query: head_dim {head_dim}, where a multiple of 8 up to 128 is needed"
    if q_segment_ids is not None:
        return "q_segment_ids: only as a quadratic mask"
    if causal and not (isinstance(q_offset, int) and q_offset == 0):
        return "q_offset: only 0"
    return None


def dense_attention(
    query: Float[Array, "batch q_len group expert head_dim"],
    key: Float[Array, "batch kv_len group head_dim"],
    value: Float[Array, "batch kv_len group head_dim"],
    **masking,
) -> Float[Array, "batch q_len slot head_dim"]:
    """As `reference.dense_attention`, for the arguments that cuDNN takes."""
    _check(query, key, masking)
    batch, q_len, *_, head_dim = query.shape
    return _attend(query.reshape(batch, q_len, -1, head_dim), key, value, masking)


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
    """As `reference.routed_attention`: one call for the selected heads, one for the shared head."""
    _check(query, key, masking)
    selected = reference.select_experts(query, expert_index)
    batch, q_len, *_, head_dim = selected.shape
    hard = _attend(selected.reshape(batch, q_len, -1, head_dim), key, value, masking)
    shared = None
    if shared_query is not None:
        if shared_key is None:
            shared_key, shared_value = (
                jnp.mean(x.astype(jnp.float32), axis=2).astype(x.dtype) for x in (key, value)
            )
        one_head = (x[:, :, None] for x in (shared_query, shared_key, shared_value))
        shared = _attend(*one_head, masking)[:, :, 0]
    return reference.concatenate_slots(
        hard.reshape(selected.shape), slot_weight, shared, query.dtype
    )


def _check(query, key, masking) -> None:
    reason = unsupported(query, key, **masking)
    if reason is not None:
        raise NotImplementedError(f"implementation='cudnn' does not take {reason}")


def _attend(
    query: Float[Array, "batch q_len head head_dim"],
    key: Float[Array, "batch kv_len group head_dim"],
    value: Float[Array, "batch kv_len group head_dim"],
    masking,
) -> Float[Array, "batch q_len head head_dim"]:
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=masking["scale"],
        is_causal=masking["causal"],
        implementation="cudnn",
    )
