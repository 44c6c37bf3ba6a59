"""Attention by cuDNN, through `jax.nn.dot_product_attention`: of all heads or the selected ones."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


def attend(
    query: Float[Array, "batch q_len group head head_dim"],
    key: Float[Array, "batch kv_len group head_dim"],
    value: Float[Array, "batch kv_len group head_dim"],
    **masking,
) -> Float[Array, "batch q_len group head head_dim"]:
    """As `reference.attend`, for the arguments that cuDNN takes.

    Raises:
      NotImplementedError: it does not take one.
    """
    reason = unsupported(query, key, **masking)
    if reason is not None:
        raise NotImplementedError(f"implementation='cudnn' does not take {reason}")
    out = jax.nn.dot_product_attention(
        query.reshape(*query.shape[:2], -1, query.shape[-1]),
        key,
        value,
        scale=masking["scale"],
        is_causal=masking["causal"],
        implementation="cudnn",
    )
    return out.reshape(query.shape)


routed_attention = functools.partial(reference.routed_attention, attend=attend)
dense_attention = functools.partial(reference.dense_attention, attend=attend)
