"""Routed attention on Hopper GPUs: what is fused around the kernels, and their vjp.

Selecting experts, the mean over groups, the weighted slot and the gradients of these are XLA's, as
elementwise work that it fuses: on a GPU the selected queries are read by tiles, and each tile of
selected queries would have to be gathered from all experts of the group anew.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gqe_kernels import reference
from gqe_kernels.pallas_gpu.backward import backward
from gqe_kernels.pallas_gpu.blocks import DEFAULTS, WARPGROUPS, BlockSizes
from gqe_kernels.pallas_gpu.forward import forward
from gqe_kernels.pallas_gpu.tables import Masking


class _Static(NamedTuple):
    heads_per_group: int
    causal: bool
    scale: float
    lengths: tuple[int, int]
    blocks: BlockSizes


class _Operands(NamedTuple):
    """Padded to whole blocks; the last head of `query` is the shared one, if there is one."""

    query: Float[Array, "batch q_len head head_dim"]
    key: Float[Array, "batch kv_len group head_dim"]
    value: Float[Array, "batch kv_len group head_dim"]
    shared_key: Float[Array, "batch kv_len head_dim"] | None
    shared_value: Float[Array, "batch kv_len head_dim"] | None


def unsupported(query, key, *, scale=1.0, **_) -> str | None:
    """The argument that the kernels cannot take, with the reason; None if they take them all."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"query: dtype {query.dtype}, where bfloat16 or float16 is needed"
    if query.shape[-1] not in DEFAULTS:
        return f"query: head_dim {query.shape[-1]}, where {' or '.join(map(str, DEFAULTS))} is"
    if query.size == 0 or key.size == 0:
        return "query, key: an array without entries"
    if not scale > 0:
        return f"scale: {scale}, where a positive number is needed"
    return None


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
    scale: float,
    **masking,
) -> Float[Array, "batch q_len slot head_dim"]:
    """As `reference.routed_attention`, for the arguments that the kernels take."""
    _check(query, key, scale)
    selected = reference.select_experts(query, expert_index)
    batch, q_len, group, k, head_dim = selected.shape
    if shared_query is not None and shared_key is None:
        shared_key, shared_value = (
            jnp.mean(x.astype(jnp.float32), axis=2).astype(x.dtype) for x in (key, value)
        )
    heads = selected.reshape(batch, q_len, group * k, head_dim).astype(query.dtype)
    if shared_query is not None:
        heads = jnp.concatenate([heads, shared_query[:, :, None]], axis=2)
    out = _attend(heads, key, value, shared_key, shared_value, scale=scale, **masking)
    hard = out[:, :, : group * k].reshape(selected.shape)
    shared = None if shared_query is None else out[:, :, -1]
    return reference.concatenate_slots(hard, slot_weight, shared, query.dtype)


def dense_attention(
    query: Float[Array, "batch q_len group expert head_dim"],
    key: Float[Array, "batch kv_len group head_dim"],
    value: Float[Array, "batch kv_len group head_dim"],
    *,
    scale: float,
    **masking,
) -> Float[Array, "batch q_len slot head_dim"]:
    """As `reference.dense_attention`: the same kernels on every head."""
    _check(query, key, scale)
    heads = query.reshape(*query.shape[:2], -1, query.shape[-1])
    return _attend(heads, key, value, None, None, scale=scale, **masking)


def _check(query, key, scale) -> None:
    reason = unsupported(query, key, scale=scale)
    if reason is not None:
        raise NotImplementedError(f"implementation='pallas_gpu' does not take {reason}")


def _attend(
    query: Float[Array, "batch q_len head head_dim"],
    key,
    value,
    shared_key,
    shared_value,
    *,
    scale: float,
    causal: bool,
    q_segment_ids: Int[Array, "batch q_len"] | None,
    kv_segment_ids: Int[Array, "batch kv_len"] | None,
    q_offset: int | Int[Array, ""] | Int[Array, "batch"],
) -> Float[Array, "batch q_len head head_dim"]:
    """Each head attends to its group's keys, the last, if they are given, to the shared ones."""
    batch, q_len, heads, head_dim = query.shape
    kv_len, group = key.shape[1:3]
    blocks = block_sizes(head_dim)
    q_pad = -q_len % max(WARPGROUPS * blocks.q, blocks.backward_q)
    kv_pad = -kv_len % max(blocks.kv, WARPGROUPS * blocks.backward_kv)

    def padded(x, rows):
        if x is None or rows == 0:
            return x
        return jnp.pad(x, ((0, 0), (0, rows)) + ((0, 0),) * (x.ndim - 2))

    static = _Static(
        heads_per_group=(heads - (shared_key is not None)) // group,
        causal=causal,
        scale=float(scale),
        lengths=(q_len, kv_len),
        blocks=blocks,
    )
    of_keys = (padded(x, kv_pad) for x in (key, value, shared_key, shared_value))
    int32 = lambda x: None if x is None else x.astype(jnp.int32)  # noqa: E731
    masking = Masking(
        jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (batch,)),
        padded(int32(q_segment_ids), q_pad),
        padded(int32(kv_segment_ids), kv_pad),
    )
    return _attention(static, _Operands(padded(query, q_pad), *of_keys), masking)[:, :q_len]


def block_sizes(head_dim: int) -> BlockSizes:
    """The defaults."""
    return DEFAULTS[head_dim]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, operands: _Operands, masking: Masking):
    return _attention_forward(static, operands, masking)[0]


def _attention_forward(static, operands, masking):
    out, logsumexp = forward(*operands, masking, **static._asdict())
    return out, (operands, masking, out, logsumexp)


def _attention_backward(static, residuals, d_out):
    operands, masking, out, logsumexp = residuals
    delta = jnp.einsum("bthd,bthd->bht", out.astype(jnp.float32), d_out.astype(jnp.float32))
    d_query, d_key, d_value = backward(
        *operands, masking, logsumexp, delta, d_out, **static._asdict()
    )
    group, hard = operands.key.shape[2], operands.key.shape[2] * static.heads_per_group

    def of_groups(x):
        if static.heads_per_group == 1:
            return x[:, :, :hard]
        parts = x[:, :, :hard].reshape(*x.shape[:2], group, static.heads_per_group, -1)
        return jnp.sum(parts.astype(jnp.float32), axis=3).astype(x.dtype)

    shared = (None, None)
    if operands.shared_key is not None:
        shared = d_key[:, :, hard], d_value[:, :, hard]
    return _Operands(d_query, of_groups(d_key), of_groups(d_value), *shared), None


_attention.defvjp(_attention_forward, _attention_backward)
