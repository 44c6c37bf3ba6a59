"""Attention by cuDNN, through `jax.nn.dot_product_attention`: all heads, or the selected ones."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from gqe_kernels import reference
from gqe_kernels.contract import Mask, Routed, Slots
from gqe_kernels.guard import guarded
from gqe_kernels.reference import Heads, Keys, pad_rows


def unsupported(query: Heads, mask: Mask) -> str | None:
    """The argument that cuDNN cannot take, with the reason; None if it takes them all."""
    head_dim = query.shape[-1]
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"query: dtype {query.dtype}, where bfloat16 or float16 is needed"
    if head_dim > 128 or head_dim % 8:
        return f"query: head_dim {head_dim}, where a multiple of 8 up to 128 is needed"
    if mask.q_segment_ids is not None:
        return "q_segment_ids: only as a quadratic mask"
    if mask.causal and mask.static_offset != 0:
        return "q_offset: only 0"
    return None


def attend(
    query: Heads,
    key: Keys,
    value: Keys,
    mask: Mask,
    scale: float,
    *,
    backend: Literal["cudnn", "xla"] = "cudnn",
) -> Heads:
    """Softmax attention of every head, for the arguments that cuDNN takes.

    Args:
      backend: the implementation of `jax.nn.dot_product_attention`; "xla" runs anywhere.

    Raises:
      NotImplementedError: names the argument that cuDNN does not take.
    """
    reason = unsupported(query, mask)
    if reason is not None:
        raise NotImplementedError(f"implementation='cudnn' does not take {reason}")
    (batch, q_len), kv_len = query.shape[:2], key.shape[1]
    # JAX has no gradient by cuDNN of sequences of odd lengths.
    out = jax.nn.dot_product_attention(
        pad_rows(query.reshape(batch, q_len, -1, query.shape[-1]), q_len % 2),
        pad_rows(key, kv_len % 2),
        pad_rows(value, kv_len % 2),
        scale=scale,
        is_causal=mask.causal,
        key_value_seq_lengths=jnp.full(batch, kv_len, jnp.int32) if kv_len % 2 else None,
        implementation=backend,
    )
    return out[:, :q_len].reshape(query.shape)


@guarded
def attention(
    routed: Routed, mask: Mask, scale: float, *, backend: Literal["cudnn", "xla"] = "cudnn"
) -> Slots:
    """The slots, each head by cuDNN."""
    with_backend = functools.partial(attend, backend=backend)
    return reference.attention(routed, mask, scale, attend=with_backend)
