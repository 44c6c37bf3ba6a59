"""Routed attention on Hopper GPUs: what is around the kernels, and their vjp.

The forward kernel selects the experts where their tiles of queries fit into shared memory. Else,
and in the gradients, selecting is elementwise work beside the kernels, as are the mean over groups
and the weighted slot.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gqe_kernels import reference
from gqe_kernels.pallas_gpu.backward import backward
from gqe_kernels.pallas_gpu.blocks import DEFAULTS, WARPGROUPS, BlockSizes, block_sizes
from gqe_kernels.pallas_gpu.forward import forward
from gqe_kernels.pallas_gpu.heads import Heads
from gqe_kernels.pallas_gpu.tables import Masking, Tables, tables


class _Static(NamedTuple):
    heads: Heads
    causal: bool
    scale: float
    lengths: tuple[int, int]
    blocks: BlockSizes


class _Operands(NamedTuple):
    """As `forward` takes them."""

    query: Float[Array, "batch q_len expert head_dim"]
    index: Int[Array, "batch q_len head"] | None
    shared_query: Float[Array, "batch q_len head_dim"] | None
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
    device = jax.devices()[0]
    if device.platform == "gpu" and device.compute_capability != "9.0":
        return f"the GPU here: compute capability {device.compute_capability}, where 9.0 is needed"
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
    batch, q_len, group, experts, head_dim = query.shape
    if shared_query is not None and shared_key is None:
        shared_key, shared_value = (reference.mean_over_groups(x) for x in (key, value))
    heads = Heads(
        group=group,
        per_group=expert_index.shape[3],
        shared=shared_query is not None,
        weighted=slot_weight is not None,
    )
    if 1 < experts <= block_sizes(head_dim).most_experts(head_dim):
        heads = heads._replace(experts=experts)
        query = query.reshape(batch, q_len, -1, head_dim)
        index = expert_index.reshape(batch, q_len, -1).astype(jnp.int32)
    else:
        query = reference.select_experts(query, expert_index).reshape(batch, q_len, -1, head_dim)
        if shared_query is not None:
            query = jnp.concatenate([query, shared_query[:, :, None]], axis=2)
        index = shared_query = None
    operands = _Operands(query, index, shared_query, key, value, shared_key, shared_value)
    slots = _attend(operands, heads, scale=scale, **masking)
    if slot_weight is None:
        return slots
    hard = slots[:, :, : heads.hard].reshape(*expert_index.shape, head_dim).astype(jnp.float32)
    weighted = jnp.sum(slot_weight.astype(jnp.float32)[..., None] * hard, axis=(2, 3))
    return slots.at[:, :, heads.hard].set(weighted.astype(slots.dtype))


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
    heads = Heads(group=query.shape[2], per_group=query.shape[3])
    query = query.reshape(*query.shape[:2], -1, query.shape[-1])
    operands = _Operands(query, None, None, key, value, None, None)
    return _attend(operands, heads, scale=scale, **masking)


def _check(query, key, scale) -> None:
    reason = unsupported(query, key, scale=scale)
    if reason is not None:
        raise NotImplementedError(f"implementation='pallas_gpu' does not take {reason}")


def _attend(
    operands: _Operands,
    heads: Heads,
    *,
    scale: float,
    causal: bool,
    q_segment_ids: Int[Array, "batch q_len"] | None,
    kv_segment_ids: Int[Array, "batch kv_len"] | None,
    q_offset: int | Int[Array, ""] | Int[Array, "batch"],
) -> Float[Array, "batch q_len slot head_dim"]:
    """The slots of all heads; of `operands` as they are without padding."""
    batch, q_len, _, head_dim = operands.query.shape
    kv_len = operands.key.shape[1]
    blocks = block_sizes(head_dim)
    q_pad = -q_len % max(WARPGROUPS * blocks.q, blocks.backward_q)
    kv_pad = -kv_len % max(blocks.kv, WARPGROUPS * blocks.backward_kv)

    def padded(x, rows):
        if x is None or rows == 0:
            return x
        return jnp.pad(x, ((0, 0), (0, rows)) + ((0, 0),) * (x.ndim - 2))

    static = _Static(
        heads=heads,
        causal=causal,
        scale=float(scale),
        lengths=(q_len, kv_len),
        blocks=blocks,
    )
    int32 = lambda x: None if x is None else x.astype(jnp.int32)  # noqa: E731
    xp = jnp if isinstance(q_offset, jax.Array) else np
    masking = Masking(
        xp.broadcast_to(xp.asarray(q_offset, np.int32), (batch,)),
        padded(int32(q_segment_ids), q_pad),
        padded(int32(kv_segment_ids), kv_pad),
    )
    query, index, shared_query, *of_keys = operands
    operands = _Operands(
        padded(query, q_pad),
        padded(index, q_pad),
        padded(shared_query, q_pad),
        *(padded(x, kv_pad) for x in of_keys),
    )
    visited = tables(masking, causal=causal, lengths=static.lengths, blocks=blocks)
    return _attention(static, operands, masking, visited)[:, :q_len]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, operands: _Operands, masking: Masking, visited: Tables):
    return forward(*operands, masking, visited.forward, **static._asdict()).slots


def _attention_forward(static, operands, masking, visited):
    selects = operands.index is not None
    found = forward(*operands, masking, visited.forward, keep_selected=selects, **static._asdict())
    if not selects:
        found = found._replace(selected=operands.query)
    operands = operands._replace(query=None, shared_query=None)
    return found.slots, (operands, masking, visited, found)


def _attention_backward(static, residuals, d_slots):
    operands, masking, visited, found = residuals
    heads = static.heads
    delta = jnp.einsum(
        "bthd,bthd->bht", found.slots.astype(jnp.float32), d_slots.astype(jnp.float32)
    )
    d_query, d_key, d_value = backward(
        found.selected,
        *operands[3:],
        masking,
        visited,
        found.logsumexp,
        delta,
        d_slots,
        **static._asdict(),
    )

    def of_groups(x):
        if heads.per_group == 1:
            return x[:, :, : heads.hard]
        parts = x[:, :, : heads.hard].reshape(*x.shape[:2], heads.group, heads.per_group, -1)
        return jnp.sum(parts.astype(jnp.float32), axis=3).astype(x.dtype)

    shared = (None, None)
    if heads.shared:
        shared = d_key[:, :, heads.hard], d_value[:, :, heads.hard]
    d_shared_query = None
    if operands.index is not None:
        d_shared_query = d_query[:, :, heads.hard] if heads.shared else None
        d_query = _of_experts(d_query[:, :, : heads.hard], operands.index, heads)
    d_operands = _Operands(
        d_query, None, d_shared_query, of_groups(d_key), of_groups(d_value), *shared
    )
    return d_operands, None, None


def _of_experts(
    d_selected: Float[Array, "batch q_len head head_dim"],
    index: Int[Array, "batch q_len head"],
    heads: Heads,
) -> Float[Array, "batch q_len expert head_dim"]:
    """The transpose of selecting: what was not selected has no gradient."""
    batch, q_len, _, head_dim = d_selected.shape
    index = index.reshape(batch, q_len, heads.group, heads.per_group, 1)
    parts = d_selected.reshape(batch, q_len, heads.group, heads.per_group, 1, head_dim)
    chosen = index == jnp.arange(heads.experts)
    d_query = jnp.sum(jnp.where(chosen[..., None], parts, 0), axis=3)
    return d_query.reshape(batch, q_len, -1, head_dim)


_attention.defvjp(_attention_forward, _attention_backward)
