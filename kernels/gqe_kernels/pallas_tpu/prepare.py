"""The first kernel of the backward pass: what its tiles need of each query, computed once.

For each head, the selected and scaled query, the gradient of its output (its hard slot's plus its
share of the weighted slot's), and delta = sum over lanes of output × gradient; also d(slot_weight).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gqe_kernels.pallas_tpu.cost import estimate
from gqe_kernels.pallas_tpu.layout import (
    LANES,
    LOG2E,
    Flat,
    Layout,
    for_row_chunks,
    read_slot,
    result_shape,
    select_query,
    widen,
)


def _kernel(
    refs: Any,  # Flat, of references
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
    q, row = refs.query.shape[0], layout.row
    first_row = pl.program_id(1) * q

    def prepare_rows(rows, first):
        # Beyond the last query an edge block holds anything; its rows must add nothing to dK, dV.
        row_index = jax.lax.broadcasted_iota(jnp.int32, (rows.size, 1), 0)
        exists = first_row + first + row_index < q_len
        shape = (rows.size, -(-layout.heads // LANES) * LANES)
        lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        deltas = d_weights = jnp.zeros(shape, jnp.float32)
        for head in range(layout.heads):
            if head < layout.hard:
                slot, half = head, layout.half(head // layout.k)
                index = None if refs.expert_index is None else refs.expert_index.at[rows]
                selected = select_query(layout, refs.query.at[rows], index, head)
            else:
                slot, half = layout.shared_slot, 0
                selected = widen(layout, refs.shared_query[rows].astype(jnp.float32))
            out = read_slot(layout, slots_ref.at[rows], slot, half)
            d_out = read_slot(layout, d_slots_ref.at[rows], slot, half)
            if layout.weighted and head < layout.hard:
                d_weighted = read_slot(layout, d_slots_ref.at[rows], layout.weighted_slot, half)
                d_out += refs.slot_weight[rows, head : head + 1].astype(jnp.float32) * d_weighted
                d_weight = jnp.sum(out * d_weighted, axis=1, keepdims=True)
                d_weights = jnp.where(lane == head, d_weight, d_weights)
            delta = jnp.sum(out * d_out, axis=1, keepdims=True)
            deltas = jnp.where((lane == head) & exists, delta, deltas)
            lanes = slice(head * row, (head + 1) * row)
            selected = jnp.where(exists, selected * (scale * LOG2E), 0.0)
            selected_ref[rows, lanes] = selected.astype(selected_ref.dtype)
            d_out_ref[rows, lanes] = jnp.where(exists, d_out, 0.0).astype(d_out_ref.dtype)
        delta_ref[:, rows] = deltas.T[: layout.padded_heads]
        if layout.weighted:
            d_weight_ref[rows] = d_weights[:, : layout.hard].astype(d_weight_ref.dtype)

    for_row_chunks(q, "prepare_rows", prepare_rows)


def prepare(flat: Flat, slots, d_slots, *, layout: Layout, scale, q: int, vmem_bytes: int):
    """selected and d_out [batch, q_padded, heads * row], delta [batch, heads, q_padded], d_weight.

    Rows beyond the last query are zero.
    """
    batch, q_len, _ = flat.query.shape
    num_q, weight = -(-q_len // q), flat.slot_weight
    unread: Any = None
    flat = dataclasses.replace(
        flat, key=unread, value=unread, shared_key=unread, shared_value=unread
    )

    def rows(x):
        return pl.BlockSpec((None, q, x.shape[-1]), lambda b, i: (b, i, 0))

    heads = result_shape(
        flat.query, (batch, num_q * q, layout.heads * layout.row), flat.query.dtype
    )
    delta = result_shape(flat.query, (batch, layout.padded_heads, num_q * q), jnp.float32)
    out_shape = [
        heads,
        heads,
        delta,
        None if weight is None else result_shape(flat.query, weight.shape, weight.dtype),
    ]
    operands = (flat, slots, d_slots)
    return pl.pallas_call(
        functools.partial(_kernel, layout=layout, scale=scale, q_len=q_len),
        grid=(batch, num_q),
        in_specs=jax.tree.map(rows, operands),
        out_specs=[
            rows(heads),
            rows(heads),
            pl.BlockSpec((None, layout.padded_heads, q), lambda b, i: (b, 0, i)),
            None if weight is None else rows(weight),
        ],
        out_shape=out_shape,
        cost_estimate=estimate(0, 0, layout, batch, operands, out_shape),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem_bytes
        ),
        name="gqe_backward_prepare",
    )(*operands)
