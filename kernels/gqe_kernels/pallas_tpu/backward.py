"""The backward kernel: dQ, dK and dV in one pass over the tiles.

Tiles are held transposed, [kv, q], so that a query's logsumexp and delta lie in the lanes, and no
product needs a transposed tile: dQ is summed transposed, in VMEM, for all queries of the launch,
which is what bounds their number; longer sequences take several launches.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gqe_kernels.pallas_tpu.layout import (
    Layout,
    expand_query,
    for_row_chunks,
    half_mask,
    result_shape,
    swap_halves,
)
from gqe_kernels.pallas_tpu.schedule import Visits
from gqe_kernels.pallas_tpu.tile import NN, NT, Tiles, dot, is_interior, mask_bias, runs


def _kernel(
    table: Visits,
    selected_ref,
    d_out_ref,
    logsumexp_ref,
    delta_ref,
    key_ref,
    value_ref,
    shared_key_ref,
    shared_value_ref,
    q_segment_ref,
    kv_segment_ref,
    index_ref,
    d_query_ref,
    d_shared_query_ref,
    d_key_ref,
    d_value_ref,
    d_shared_key_ref,
    d_shared_value_ref,
    d_query_scr,
    d_key_scr,
    d_value_scr,
    key_t_scr,
    bias_scr,
    *,
    layout: Layout,
    tiles: Tiles,
    scale: float,
    first_block: int,
    num_q: int,
):
    b, j, local_i = (pl.program_id(axis) for axis in range(3))
    i = first_block + local_i
    row, dtype = layout.row, key_ref.dtype

    def rows_of_kv():
        """Each unit's number, its keys and values, and the heads that read them."""
        for u in range(layout.units):
            first = u * layout.groups_per_unit * layout.k
            lanes = slice(u * row, (u + 1) * row)
            heads = range(first, first + layout.groups_per_unit * layout.k)
            yield u, key_ref, value_ref, lanes, heads
        if layout.shared:
            every = slice(None)
            yield layout.units, shared_key_ref, shared_value_ref, every, (layout.hard,)

    @pl.when(local_i == 0)
    def start_keys():
        d_key_scr[...] = jnp.zeros_like(d_key_scr)
        d_value_scr[...] = jnp.zeros_like(d_value_scr)
        for u, keys, _, lanes, _ in rows_of_kv():
            key = keys[:, lanes].astype(jnp.float32)
            if tiles.kv_ragged:
                row_index = jax.lax.broadcasted_iota(jnp.int32, key.shape, 0)
                key = jnp.where(row_index < tiles.kv_len - j * tiles.kv, key, 0.0)
            key_t_scr[u] = key.T.astype(dtype)

    @pl.when(j == 0)
    def start_queries():
        d_query_scr[local_i] = jnp.zeros_like(d_query_scr[local_i])

    def all_heads(mask: bool):
        if mask:
            segments = (None, None)
            if tiles.segments:
                segments = q_segment_ref[...], kv_segment_ref[...]
            bias_scr[...] = mask_bias(tiles, table, b, i, j, *segments, kv_axis=0)

        for u, keys, values, lanes, heads in rows_of_kv():
            key, value = keys[:, lanes], values[:, lanes]
            for head in heads:
                own = slice(head * row, (head + 1) * row)
                query, d_out = selected_ref[:, own], d_out_ref[:, own]
                logits = dot(key, query, NT)
                if mask:
                    logits += bias_scr[...]
                weights = jnp.exp2(logits - logsumexp_ref[head : head + 1, :])
                d_value_scr[u] += dot(weights.astype(dtype), d_out, NN)
                d_logits = weights * (dot(value, d_out, NT) - delta_ref[head : head + 1, :])
                if mask and tiles.kv_ragged:
                    # Keys beyond the last hold anything, NaN too, and dQ sums over them.
                    exists = jax.lax.broadcasted_iota(jnp.int32, d_logits.shape, 0)
                    exists = exists < tiles.kv_len - j * tiles.kv
                    d_logits = jnp.where(exists, d_logits, 0.0)
                d_logits = d_logits.astype(dtype)
                d_key_scr[u] += dot(d_logits, query, NN)
                d_query_scr[local_i, head] += dot(key_t_scr[u], d_logits, NN)

    def interior():
        all_heads(mask=False)

    def masked():
        all_heads(mask=True)

    run = runs(tiles, table, b, i, j, j, i)
    if tiles.ever_masked:
        all_visible = is_interior(tiles, table, b, i, j)
        pl.when(run & all_visible)(interior)
        pl.when(run & ~all_visible)(masked)
    else:
        pl.when(run)(interior)

    @pl.when(local_i == num_q - 1)
    def finish_keys():
        for u in range(layout.units):
            lanes = slice(u * row, (u + 1) * row)
            # The queries carry log2(e) beside the scale; the gradient of a logit does not.
            d_key_ref[:, lanes] = (d_key_scr[u] * math.log(2.0)).astype(d_key_ref.dtype)
            d_value_ref[:, lanes] = d_value_scr[u].astype(d_value_ref.dtype)
        if layout.shared:
            d_shared = d_key_scr[layout.units] * math.log(2.0)
            d_shared_key_ref[...] = d_shared.astype(d_shared_key_ref.dtype)
            d_shared_value_ref[...] = d_value_scr[layout.units].astype(d_shared_value_ref.dtype)

    @pl.when(j == tiles.num_kv - 1)
    def finish_queries():
        def finish_rows(rows, first):

            def gradient(head):
                x = d_query_scr[local_i, head, :, rows].T * scale
                if layout.groups_per_unit == 1:
                    return x
                half = layout.half(head // layout.k)
                return jnp.where(half_mask(x.shape, half), x, swap_halves(x))

            def write(column, x):
                lanes = slice(column * row, (column + 1) * row)
                d_query_ref[rows, lanes] = x.astype(d_query_ref.dtype)

            expand_query(layout, functools.cache(gradient), index_ref.at[rows], write)
            if layout.shared:
                x = d_query_scr[local_i, layout.hard, :, rows].T * scale
                d_shared_query_ref[rows] = x[:, : layout.head_dim].astype(d_shared_query_ref.dtype)

        for_row_chunks(tiles.q, "finish_rows", finish_rows)


def backward(
    operands,
    index,
    masking,
    table: Visits,
    selected,
    d_out,
    logsumexp,
    delta,
    *,
    layout: Layout,
    tiles: Tiles,
    scale: float,
    vmem_bytes: int,
    launch: int,
    first_block: int,
    num_q: int,
    sum_dtype,
):
    """Gradients from the queries of `num_q` blocks: of those queries, and of all keys and values.

    Returns:
      d_query, d_shared_query (of the launch's rows), d_key, d_value, d_shared_key, d_shared_value
      (in `sum_dtype`).
    """
    o = operands
    batch, kv_len, _ = o.key.shape
    q_rows_total = min(num_q * tiles.q, tiles.q_len - first_block * tiles.q)
    last_j = tiles.num_kv - 1

    def q_block(b, j, i, table):
        # Blocks that are not visited name their neighbour, so that nothing is fetched for them.
        first, last = table.first[b, j], jnp.maximum(table.last[b, j], table.first[b, j])
        low, high = first_block, first_block + num_q - 1
        return jnp.clip(jnp.clip(first_block + i, first, last), low, high)

    def q_rows(x):
        return pl.BlockSpec(
            (None, tiles.q, x.shape[-1]), lambda b, j, i, table: (b, q_block(b, j, i, table), 0)
        )

    def q_lanes(heads):
        return pl.BlockSpec(
            (None, heads, tiles.q), lambda b, j, i, table: (b, 0, q_block(b, j, i, table))
        )

    def at_the_end(lanes, base):
        """Blocks of queries that only the last pass over them reads or writes."""
        return pl.BlockSpec(
            (None, tiles.q, lanes),
            lambda b, j, i, table: (b, base + jnp.where(j == last_j, i, 0), 0),
        )

    def kv_rows(lanes):
        return pl.BlockSpec((None, tiles.kv, lanes), lambda b, j, i, table: (b, j, 0))

    def maybe(x, spec):
        return None if x is None else spec(x.shape[-1])

    def like(x, length, dtype):
        return None if x is None else result_shape(o.query, (batch, length, x.shape[-1]), dtype)

    q_segment, kv_segment = masking.q_segment, masking.kv_segment
    q_segment_spec = kv_segment_spec = None
    if tiles.segments:
        q_segment, kv_segment = q_segment[:, None, :], kv_segment[:, :, None]
        q_segment_spec, kv_segment_spec = q_lanes(1), kv_rows(1)
    rows = layout.units + layout.shared
    return pl.pallas_call(
        functools.partial(
            _kernel, layout=layout, tiles=tiles, scale=scale, first_block=first_block, num_q=num_q
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, tiles.num_kv, num_q),
            in_specs=[
                q_rows(selected),
                q_rows(d_out),
                q_lanes(layout.padded_heads),
                q_lanes(layout.padded_heads),
                kv_rows(o.key.shape[-1]),
                kv_rows(o.value.shape[-1]),
                maybe(o.shared_key, kv_rows),
                maybe(o.shared_value, kv_rows),
                q_segment_spec,
                kv_segment_spec,
                at_the_end(layout.hard, first_block),
            ],
            out_specs=[
                at_the_end(o.query.shape[-1], 0),
                maybe(o.shared_query, lambda lanes: at_the_end(lanes, 0)),
                kv_rows(o.key.shape[-1]),
                kv_rows(o.value.shape[-1]),
                maybe(o.shared_key, kv_rows),
                maybe(o.shared_value, kv_rows),
            ],
            scratch_shapes=[
                pltpu.VMEM((num_q, layout.heads, layout.row, tiles.q), jnp.float32),
                pltpu.VMEM((rows, tiles.kv, layout.row), jnp.float32),
                pltpu.VMEM((rows, tiles.kv, layout.row), jnp.float32),
                pltpu.VMEM((rows, layout.row, tiles.kv), o.key.dtype),
                pltpu.VMEM((tiles.kv, tiles.q), jnp.float32) if tiles.ever_masked else None,
            ],
        ),
        out_shape=[
            like(o.query, q_rows_total, o.query.dtype),
            like(o.shared_query, q_rows_total, o.query.dtype),
            like(o.key, kv_len, sum_dtype),
            like(o.value, kv_len, sum_dtype),
            like(o.shared_key, kv_len, sum_dtype),
            like(o.shared_value, kv_len, sum_dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        name=f"gqe_backward_{launch}",
    )(
        table,
        selected,
        d_out,
        logsumexp,
        delta,
        o.key,
        o.value,
        o.shared_key,
        o.shared_value,
        q_segment,
        kv_segment,
        index,
    )
