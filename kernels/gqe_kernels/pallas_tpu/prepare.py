"""The first kernel of the backward pass: what every tile of it needs, once for each query.

Per head, the selected and scaled query, the gradient of its output (its hard slot's plus its share
of the weighted slot's), and delta = sum over lanes of output × gradient; also d(slot_weight).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gqe_kernels.pallas_tpu.layout import (
    LANES,
    LOG2E,
    Layout,
    read_slot,
    result_shape,
    select_query,
)


def _kernel(
    query_ref,
    index_ref,
    weight_ref,
    shared_query_ref,
    slots_ref,
    d_slots_ref,
    selected_ref,
    d_out_ref,
    delta_ref,
    d_weight_ref,
    *,
    layout: Layout,
    scale: float,
    q_len: int,
):
    q, row = index_ref.shape[0], layout.row
    # Beyond the last query an edge block holds anything; its rows must add nothing to dK and dV.
    exists = pl.program_id(1) * q + jax.lax.broadcasted_iota(jnp.int32, (q, 1), 0) < q_len
    lane = jax.lax.broadcasted_iota(jnp.int32, (q, -(-layout.heads // LANES) * LANES), 1)
    deltas = jnp.zeros(lane.shape, jnp.float32)
    d_weights = jnp.zeros(lane.shape, jnp.float32)

    for head in range(layout.heads):
        if head < layout.hard:
            group = head // layout.k
            half = layout.half(group)
            selected = select_query(layout, query_ref, index_ref[:, head : head + 1], group, half)
            slot = head
        else:
            half, slot = 0, layout.shared_slot
            selected = shared_query_ref[...].astype(jnp.float32)
            if layout.groups_per_unit == 2:
                selected = jnp.concatenate([selected, jnp.zeros_like(selected)], axis=1)
        out = read_slot(layout, slots_ref, slot, half)
        d_out = read_slot(layout, d_slots_ref, slot, half)
        if layout.weighted and head < layout.hard:
            d_weighted = read_slot(layout, d_slots_ref, layout.weighted_slot, half)
            d_out += weight_ref[:, head : head + 1].astype(jnp.float32) * d_weighted
            d_weight = jnp.sum(out * d_weighted, axis=1, keepdims=True)
            d_weights = jnp.where(lane == head, d_weight, d_weights)
        delta = jnp.sum(out * d_out, axis=1, keepdims=True)
        deltas = jnp.where((lane == head) & exists, delta, deltas)
        lanes = slice(head * row, (head + 1) * row)
        selected = jnp.where(exists, selected * (scale * LOG2E), 0.0)
        selected_ref[:, lanes] = selected.astype(selected_ref.dtype)
        d_out_ref[:, lanes] = jnp.where(exists, d_out, 0.0).astype(d_out_ref.dtype)
    delta_ref[...] = deltas.T[: layout.padded_heads]
    if layout.weighted:
        d_weight_ref[...] = d_weights[:, : layout.hard].astype(d_weight_ref.dtype)


def prepare(query, index, weight, shared_query, slots, d_slots, *, layout, scale, q, vmem_bytes):
    """selected and d_out [batch, q_padded, heads * row], delta [batch, heads, q_padded], d_weight.

    Rows beyond the last query are zero.
    """
    batch, q_len, _ = query.shape
    num_q = -(-q_len // q)

    def rows(x):
        return None if x is None else pl.BlockSpec((None, q, x.shape[-1]), lambda b, i: (b, i, 0))

    heads = result_shape(query, (batch, num_q * q, layout.heads * layout.row), query.dtype)
    delta = result_shape(query, (batch, layout.padded_heads, num_q * q), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, layout=layout, scale=scale, q_len=q_len),
        grid=(batch, num_q),
        in_specs=[rows(x) for x in (query, index, weight, shared_query, slots, d_slots)],
        out_specs=[
            rows(heads),
            rows(heads),
            pl.BlockSpec((None, layout.padded_heads, q), lambda b, i: (b, 0, i)),
            rows(weight),
        ],
        out_shape=[
            heads,
            heads,
            delta,
            None if weight is None else result_shape(query, weight.shape, weight.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem_bytes
        ),
        name="gqe_backward_prepare",
    )(query, index, weight, shared_query, slots, d_slots)
