"""The backward kernel: dQ, dK and dV in one pass over the tiles.

Tiles are held transposed, [kv, q], so that a query's logsumexp and delta lie in the lanes, and no
product needs a transposed tile: dQ is summed transposed, in VMEM, for all queries of the launch,
which is what bounds their number. Longer sequences take several launches, each of which adds to the
dK and dV of those before it.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from gqe_kernels.contract import Mask
from gqe_kernels.pallas_tpu.cost import BACKWARD_PRODUCTS, estimate
from gqe_kernels.pallas_tpu.layout import (
    Flat,
    Layout,
    expand_query,
    for_row_chunks,
    half_mask,
    result_shape,
    swap_halves,
    widen,
)
from gqe_kernels.pallas_tpu.schedule import Tiles, Visits
from gqe_kernels.pallas_tpu.tile import NN, NT, dot, is_interior, mask_bias, runs


class KeyOperands(NamedTuple):
    """What the queries attend to, or its gradients, which are float32 while they are summed.

    Each is [batch, kv_len, lanes], a reference to that, or its block specification.
    """

    key: Any
    value: Any
    shared_key: Any
    shared_value: Any


class _Prefetched(NamedTuple):
    table: Visits
    first_block: Int[Array, "1"]  # of the launch's queries


def _kernel(
    prefetched: _Prefetched,
    selected_ref,
    d_out_ref,
    logsumexp_ref,
    delta_ref,
    read: KeyOperands,
    mask: Any,  # Mask, of references
    index_ref,
    sums: KeyOperands | None,
    d_query_ref,
    d_shared_query_ref,
    gradients: KeyOperands,
    d_query_scr,
    d_key_scr,
    d_value_scr,
    key_t_scr,
    bias_scr,
    *,
    layout: Layout,
    tiles: Tiles,
    scale: float,
    num_q: int,
):
    b, j, local_i = (pl.program_id(axis) for axis in range(3))
    table, i = prefetched.table, prefetched.first_block[0] + local_i
    row, dtype = layout.row, read.key.dtype

    def rows_of_kv():
        """Each unit's number, functions that read its keys and values, and the heads that do."""

        def reader(ref, u):
            return lambda: ref[:, u * row : (u + 1) * row]

        def shared_reader(ref):
            return lambda: widen(layout, ref[...])

        for u in range(layout.units):
            first = u * layout.groups_per_unit * layout.k
            heads = range(first, first + layout.groups_per_unit * layout.k)
            yield u, reader(read.key, u), reader(read.value, u), heads
        if layout.shared:
            key, value = shared_reader(read.shared_key), shared_reader(read.shared_value)
            yield layout.units, key, value, (layout.hard,)

    @pl.when(local_i == 0)
    def start_keys():
        d_key_scr[...] = jnp.zeros_like(d_key_scr)
        d_value_scr[...] = jnp.zeros_like(d_value_scr)
        for u, keys, _, _ in rows_of_kv():
            key = keys().astype(jnp.float32)
            if tiles.kv_ragged:
                row_index = jax.lax.broadcasted_iota(jnp.int32, key.shape, 0)
                key = jnp.where(row_index < tiles.kv_len - j * tiles.kv, key, 0.0)
            key_t_scr[u] = key.T.astype(dtype)

    @pl.when(j == 0)
    def start_queries():
        d_query_scr[local_i] = jnp.zeros_like(d_query_scr[local_i])

    def all_heads(masks: bool):
        if masks:
            segments = (None, None)
            if tiles.segments:
                segments = mask.q_segment_ids[...], mask.kv_segment_ids[...]
            bias_scr[...] = mask_bias(tiles, table, b, i, j, *segments, kv_axis=0)

        for u, keys, values, heads in rows_of_kv():
            key, value = keys(), values()
            for head in heads:
                own = slice(head * row, (head + 1) * row)
                query, d_out = selected_ref[:, own], d_out_ref[:, own]
                logits = dot(key, query, NT)
                if masks:
                    logits += bias_scr[...]
                weights = jnp.exp2(logits - logsumexp_ref[head : head + 1, :])
                d_value_scr[u] += dot(weights.astype(dtype), d_out, NN)
                d_logits = weights * (dot(value, d_out, NT) - delta_ref[head : head + 1, :])
                if masks and tiles.kv_ragged:
                    # Keys beyond the last hold anything, NaN too, and dQ sums over them.
                    exists = jax.lax.broadcasted_iota(jnp.int32, d_logits.shape, 0)
                    exists = exists < tiles.kv_len - j * tiles.kv
                    d_logits = jnp.where(exists, d_logits, 0.0)
                d_logits = d_logits.astype(dtype)
                d_key_scr[u] += dot(d_logits, query, NN)
                d_query_scr[local_i, head] += dot(key_t_scr[u], d_logits, NN)

    def interior():
        all_heads(masks=False)

    def masked():
        all_heads(masks=True)

    run = runs(tiles, table, b, i, j, j, i)  # not beyond the last block of queries
    if tiles.ever_masked:
        all_visible = is_interior(tiles, table, b, i, j)
        pl.when(run & all_visible)(interior)
        pl.when(run & ~all_visible)(masked)
    else:
        pl.when(run)(interior)

    @pl.when(local_i == num_q - 1)
    def finish_keys():
        def write(name, lanes, x):
            ref = getattr(gradients, name)
            x = x[:, : ref.shape[1]]  # the shared head fills half a row, where a row holds two
            if sums is not None:
                x += getattr(sums, name)[:, lanes]
            ref[:, lanes] = x.astype(ref.dtype)

        for u in range(layout.units + layout.shared):
            unit = u < layout.units
            lanes = slice(u * row, (u + 1) * row) if unit else slice(None)
            # The queries carry log2(e) beside the scale; the gradient of a logit does not.
            write("key" if unit else "shared_key", lanes, d_key_scr[u] * math.log(2.0))
            write("value" if unit else "shared_value", lanes, d_value_scr[u])

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

            index: Any = None
            if index_ref is not None:

                def index(head):
                    return index_ref[rows, head : head + 1]

            expand_query(layout, functools.cache(gradient), index, write)
            if layout.shared:
                x = d_query_scr[local_i, layout.hard, :, rows].T * scale
                d_shared_query_ref[rows] = x[:, : layout.head_dim].astype(d_shared_query_ref.dtype)

        for_row_chunks(tiles.q, "finish_rows", finish_rows)


def backward(
    flat: Flat,
    mask: Mask,
    table: Visits,
    selected,
    d_out,
    logsumexp,
    delta,
    *,
    layout: Layout,
    tiles: Tiles,
    pairs: int,
    scale: float,
    vmem_bytes: int,
    launches: int,
    num_q: int,
):
    """Gradients of all queries, keys and values.

    Args:
      pairs: of a query and a key token that one head must look at, for the cost estimate.
      launches, num_q: calls of the kernel, and blocks of queries in each.

    Returns:
      d_query, d_shared_query or None, and the gradients of what the queries attend to.
    """
    o, dtype = flat, flat.key.dtype
    batch, kv_len, _ = o.key.shape
    last_j = tiles.num_kv - 1

    def q_block(b, j, i, prefetched):
        # Blocks that are not visited name their neighbour, so that nothing is fetched for them.
        table, first_block = prefetched.table, prefetched.first_block[0]
        first, last = table.first[b, j], jnp.maximum(table.last[b, j], table.first[b, j])
        low, high = first_block, jnp.minimum(first_block + num_q, tiles.num_q) - 1
        return jnp.clip(jnp.clip(first_block + i, first, last), low, high)

    def q_rows(x):
        return pl.BlockSpec(
            (None, tiles.q, x.shape[-1]),
            lambda b, j, i, prefetched: (b, q_block(b, j, i, prefetched), 0),
        )

    def q_lanes(heads):
        return pl.BlockSpec(
            (None, heads, tiles.q),
            lambda b, j, i, prefetched: (b, 0, q_block(b, j, i, prefetched)),
        )

    def in_the_last_pass(j, i):
        return jnp.where(j == last_j, i, 0)

    def read_at_the_end(x):
        if x is None:
            return None

        def block(b, j, i, prefetched):
            this = prefetched.first_block[0] + in_the_last_pass(j, i)
            return b, jnp.minimum(this, tiles.num_q - 1), 0

        return pl.BlockSpec((None, tiles.q, x.shape[-1]), block)

    def written_at_the_end(x):
        if x is not None:
            return pl.BlockSpec(
                (None, tiles.q, x.shape[-1]),
                lambda b, j, i, prefetched: (b, in_the_last_pass(j, i), 0),
            )

    def kv_rows(x):
        if x is not None:
            return pl.BlockSpec(
                (None, tiles.kv, x.shape[-1]), lambda b, j, i, prefetched: (b, j, 0)
            )

    def like(x, length, dtype):
        if x is not None:
            return result_shape(o.query, (batch, length, x.shape[-1]), dtype)

    # Segments as they broadcast to a tile [kv, q].
    mask = dataclasses.replace(mask, offset=None).map_queries(lambda ids: ids[:, None, :])
    mask = mask.map_keys(lambda ids: ids[:, :, None])
    mask_specs = mask.map_queries(lambda _: q_lanes(1)).map_keys(kv_rows)
    read = KeyOperands(o.key, o.value, o.shared_key, o.shared_value)
    specs_of_read = KeyOperands(*map(kv_rows, read))
    rows = layout.units + layout.shared
    q_length = num_q * tiles.q if launches > 1 else tiles.q_len
    whole = tiles.num_kv * tiles.kv  # rows that are updated in place fill their blocks

    def launch(first_block, sums: KeyOperands | None):
        """Gradients of the queries of `num_q` blocks, and the sums with what they add."""
        prefetched = _Prefetched(table, first_block[None])
        inputs = (selected, d_out, logsumexp, delta, read, mask, o.expert_index)
        before, d_queries = len(jax.tree.leaves((prefetched, inputs))), 1 + layout.shared
        kv_rows_out, sum_dtype = (kv_len, dtype) if sums is None else (whole, jnp.float32)
        out_shape = [
            like(o.query, q_length, dtype),
            like(o.shared_query, q_length, dtype),
            KeyOperands(*(like(x, kv_rows_out, sum_dtype) for x in read)),
        ]
        moved = (selected, d_out, read, o.query, o.shared_query, read)
        return pl.pallas_call(
            functools.partial(_kernel, layout=layout, tiles=tiles, scale=scale, num_q=num_q),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(batch, tiles.num_kv, num_q),
                in_specs=[
                    q_rows(selected),
                    q_rows(d_out),
                    q_lanes(layout.padded_heads),
                    q_lanes(layout.padded_heads),
                    specs_of_read,
                    mask_specs,
                    read_at_the_end(o.expert_index),
                    None if sums is None else specs_of_read,
                ],
                out_specs=[
                    written_at_the_end(o.query),
                    written_at_the_end(o.shared_query),
                    specs_of_read,
                ],
                scratch_shapes=[
                    pltpu.VMEM((num_q, layout.heads, layout.row, tiles.q), jnp.float32),
                    pltpu.VMEM((rows, tiles.kv, layout.row), jnp.float32),
                    pltpu.VMEM((rows, tiles.kv, layout.row), jnp.float32),
                    pltpu.VMEM((rows, layout.row, tiles.kv), dtype),
                    pltpu.VMEM((tiles.kv, tiles.q), jnp.float32) if tiles.ever_masked else None,
                ],
            ),
            out_shape=out_shape,
            cost_estimate=estimate(
                BACKWARD_PRODUCTS, pairs, layout, batch, moved, launches=launches
            ),
            input_output_aliases={
                before + n: d_queries + n for n in range(len(jax.tree.leaves(sums)))
            },
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=vmem_bytes,
            ),
            name="gqe_backward",
        )(prefetched, *inputs, sums)

    if launches == 1:
        return launch(jnp.zeros((), jnp.int32), None)

    def step(sums, first_block):
        *of_queries, sums = launch(first_block, sums)
        return sums, of_queries

    def zeros(x):
        like_x = jnp.where(False, x, 0).astype(jnp.float32)  # varies over the mesh as x does
        return jnp.pad(like_x, ((0, 0), (0, whole - kv_len), (0, 0)))

    sums, of_queries = jax.lax.scan(
        step, jax.tree.map(zeros, read), jnp.arange(launches, dtype=jnp.int32) * num_q
    )

    def joined(x):
        return jnp.moveaxis(x, 0, 1).reshape(batch, -1, x.shape[-1])[:, : tiles.q_len]

    d_query, d_shared_query = jax.tree.map(joined, of_queries)
    return d_query, d_shared_query, jax.tree.map(lambda x: x[:, :kv_len].astype(dtype), sums)
