"""Routed attention on TPU: the contract's arguments, laid flat for the kernels, and their vjp."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gqe_kernels.pallas_tpu.backward import backward
from gqe_kernels.pallas_tpu.blocks import BlockSizes, default_block_sizes
from gqe_kernels.pallas_tpu.cost import visible_pairs
from gqe_kernels.pallas_tpu.forward import forward
from gqe_kernels.pallas_tpu.layout import LANES, Layout, takes
from gqe_kernels.pallas_tpu.prepare import prepare
from gqe_kernels.pallas_tpu.schedule import Masking, visits
from gqe_kernels.pallas_tpu.tile import Tiles


class _Static(NamedTuple):
    layout: Layout
    causal: bool
    static_offset: int | None
    scale: float
    blocks: BlockSizes


class _Operands(NamedTuple):
    """The differentiable operands, flat: [batch, length, heads * head_dim]."""

    query: Float[Array, "batch q_len experts_lanes"]
    key: Float[Array, "batch kv_len kv_lanes"]
    value: Float[Array, "batch kv_len kv_lanes"]
    weight: Float[Array, "batch q_len hard"] | None
    shared_query: Float[Array, "batch q_len head_dim"] | None
    shared_key: Float[Array, "batch kv_len row"] | None
    shared_value: Float[Array, "batch kv_len row"] | None


def _layout(query, expert_index, slot_weight, shared_query) -> Layout:
    """Of the arrays as the kernels see them: a head that no row fits is padded."""
    *_, group, expert, head_dim = query.shape
    return Layout(
        group=group,
        expert=expert,
        k=expert_index.shape[-1],
        head_dim=head_dim if takes(group, head_dim) else -(-head_dim // LANES) * LANES,
        weighted=slot_weight is not None,
        shared=shared_query is not None,
    )


def _pieces(q_offset) -> int:
    return q_offset.shape[1] if jnp.ndim(q_offset) == 2 else 1


def _mean_over_groups(x: Float[Array, "batch kv_len group head_dim"]):
    """By slices of the flat array: a reduction makes XLA lay out, and copy, all of K and V anew."""
    group, head_dim = x.shape[2:]
    flat = x.reshape(*x.shape[:2], -1)
    heads = [flat[:, :, g * head_dim : (g + 1) * head_dim] for g in range(group)]
    return (sum(head.astype(jnp.float32) for head in heads) / group).astype(x.dtype)


def unsupported(
    query, key, expert_index, slot_weight=None, shared_query=None, *, q_offset=0
) -> str | None:
    """The argument that the kernels cannot take, with the reason; None if they take them all."""
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"query: dtype {query.dtype}, where bfloat16 or float32 is needed"
    if query.shape[-1] % 64:
        return f"query: head_dim {query.shape[-1]}, where a multiple of 64 is needed"
    if query.size == 0 or key.size == 0:
        return "query, key: an array without entries"
    pieces = _pieces(q_offset)
    if pieces > 1 and query.shape[1] // pieces % LANES:
        rows = query.shape[1] // pieces
        return f"q_offset: pieces of {rows} queries, where a multiple of {LANES} is needed"
    layout = _layout(query, expert_index, slot_weight, shared_query)
    lengths = query.shape[1], key.shape[1]
    if default_block_sizes(layout, *lengths, query.dtype.itemsize, pieces=pieces) is None:
        return f"query: shape {query.shape}, of which no block fits in VMEM"
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
    causal: bool,
    q_segment_ids: Int[Array, "batch q_len"] | None,
    kv_segment_ids: Int[Array, "batch kv_len"] | None,
    q_offset: int | Int[Array, ""] | Int[Array, "batch"] | Int[Array, "batch piece"],
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "batch q_len slot head_dim"]:
    """As `reference.routed_attention`, for the arguments that the kernels take."""
    reason = unsupported(query, key, expert_index, slot_weight, shared_query, q_offset=q_offset)
    if reason is not None:
        raise NotImplementedError(f"implementation='pallas_tpu' does not take {reason}")
    batch, q_len, _, _, head_dim = query.shape
    kv_len, pieces = key.shape[1], _pieces(q_offset)
    layout = _layout(query, expert_index, slot_weight, shared_query)
    width = layout.head_dim
    if shared_query is not None and shared_key is None:
        shared_key, shared_value = _mean_over_groups(key), _mean_over_groups(value)

    def flat(x, lanes=None):
        """Heads side by side in the lanes: no copy, unless a head is padded."""
        if x is None:
            return None
        pad = (width if lanes is None else lanes) - head_dim
        if pad:
            x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, pad),))
        return x.reshape(*x.shape[:2], -1)

    operands = _Operands(
        query=flat(query),
        key=flat(key),
        value=flat(value),
        weight=None if slot_weight is None else slot_weight.reshape(batch, q_len, -1),
        shared_query=flat(shared_query),
        shared_key=flat(shared_key, layout.row),
        shared_value=flat(shared_value, layout.row),
    )
    masking = Masking(
        jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32).T, (pieces, batch)).T,
        None if q_segment_ids is None else q_segment_ids.astype(jnp.int32),
        None if kv_segment_ids is None else kv_segment_ids.astype(jnp.int32),
    )
    itemsize = query.dtype.itemsize
    blocks = block_sizes or default_block_sizes(layout, q_len, kv_len, itemsize, pieces=pieces)
    index = expert_index.astype(jnp.int32).reshape(batch, q_len, -1)
    offset = int(q_offset) if isinstance(q_offset, int | np.integer) else None
    static = _Static(layout, causal, offset, float(scale), blocks)
    slots = _attention(static, operands, index, masking)
    return slots.reshape(batch, q_len, layout.slots, width)[..., :head_dim]


def _every_expert(query):
    """The routing of dense attention: each token takes all experts, in order."""
    batch, q_len, group, expert, _ = query.shape
    return jax.lax.broadcasted_iota(jnp.int32, (batch, q_len, group, expert), 3)


def dense_unsupported(query, key, *, q_offset=0) -> str | None:
    """As `unsupported`, of `dense_attention`."""
    every_expert = jax.ShapeDtypeStruct(query.shape[:-1], jnp.int32)
    return unsupported(query, key, every_expert, q_offset=q_offset)


def dense_attention(
    query: Float[Array, "batch q_len group expert head_dim"],
    key: Float[Array, "batch kv_len group head_dim"],
    value: Float[Array, "batch kv_len group head_dim"],
    **masking,
) -> Float[Array, "batch q_len slot head_dim"]:
    """As `reference.dense_attention`: the routed kernel with every expert chosen."""
    no_other_slots = (None,) * 4
    return routed_attention(query, key, value, _every_expert(query), *no_other_slots, **masking)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, operands: _Operands, index, masking: Masking):
    return _attention_forward(static, operands, index, masking)[0]


def _attention_forward(static, operands, index, masking):
    o = operands
    slots, logsumexp = forward(
        o.query,
        o.key,
        o.value,
        index,
        o.weight,
        o.shared_query,
        o.shared_key,
        o.shared_value,
        masking,
        **static._asdict(),
    )
    return slots, (operands, index, masking, slots, logsumexp)


def _attention_backward(static, residuals, d_slots):
    operands, index, masking, slots, logsumexp = residuals
    o, layout, blocks = operands, static.layout, static.blocks
    q_len, kv_len = o.query.shape[1], o.key.shape[1]
    tiles = Tiles(
        blocks.backward_q,
        blocks.backward_kv,
        q_len,
        kv_len,
        static.causal,
        segments=masking.q_segment is not None,
    )
    selected, d_out, delta, d_weight = prepare(
        o.query,
        index,
        o.weight,
        o.shared_query,
        slots,
        d_slots,
        layout=layout,
        scale=static.scale,
        q=tiles.q,
        vmem_bytes=blocks.vmem_bytes,
    )
    beyond = tiles.num_q * tiles.q - logsumexp.shape[2]
    if beyond > 0:
        logsumexp = jnp.pad(logsumexp, ((0, 0), (0, 0), (0, beyond)))
    launches, num_q = blocks.backward_launches(layout, tiles.num_q)
    d_query, d_shared_query, of_read = backward(
        operands,
        index,
        masking,
        visits(masking, static.causal, q_len, kv_len, tiles.q, tiles.kv, outer="kv"),
        selected,
        d_out,
        logsumexp,
        delta,
        layout=layout,
        tiles=tiles,
        pairs=visible_pairs(q_len, kv_len, static.causal, static.static_offset),
        scale=static.scale,
        vmem_bytes=blocks.vmem_bytes,
        launches=launches,
        num_q=num_q,
    )
    gradients = _Operands(
        d_query,
        of_read.key,
        of_read.value,
        d_weight,
        d_shared_query,
        of_read.shared_key,
        of_read.shared_value,
    )
    return gradients, None, None


_attention.defvjp(_attention_forward, _attention_backward)
