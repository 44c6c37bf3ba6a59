"""The forward kernel: routed selection, online softmax and the sum of slots in one launch."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from gqe_kernels.contract import Mask
from gqe_kernels.pallas_tpu.blocks import BlockSizes, claim, forward_bytes
from gqe_kernels.pallas_tpu.cost import FORWARD_PRODUCTS, estimate, visible_pairs
from gqe_kernels.pallas_tpu.layout import (
    LANES,
    LOG2E,
    MASKED,
    NOTHING_SEEN,
    Flat,
    Layout,
    SlotWriter,
    for_row_chunks,
    half_mask,
    reciprocal,
    result_shape,
    select_query,
    swap_halves,
    widen,
)
from gqe_kernels.pallas_tpu.schedule import Tiles, Visits, visits
from gqe_kernels.pallas_tpu.tile import (
    NN,
    NT,
    dot,
    is_interior,
    mask_bias,
    runs,
    zero_beyond,
)


def _kernel(
    table: Visits,
    refs: Any,  # Flat, of references
    mask: Any,  # Mask, of references
    out_ref,
    logsumexp_ref,
    query_scr,
    acc_scr,
    max_scr,
    sum_scr,
    bias_scr,
    *,
    layout: Layout,
    tiles: Tiles,
    blocks: BlockSizes,
    scale: float,
):
    b, i, step = (pl.program_id(axis) for axis in range(3))
    if tiles.diagonal_first:
        i, step = tiles.paired(i, step)
        j = i + tiles.first_diagonal - step
        last_step = j == 0
    else:
        j = table.last[b, i] - step
        last_step = step == tiles.num_kv - 1
    row, ones_in_row = layout.row, layout.groups_per_unit == 2

    def start():
        if not tiles.diagonal_first:
            acc_scr[...] = jnp.zeros_like(acc_scr)
            max_scr[...] = jnp.full_like(max_scr, NOTHING_SEEN)
            if sum_scr is not None:
                sum_scr[...] = jnp.zeros_like(sum_scr)

        def start_rows(rows, first):
            for head in range(layout.heads):
                if head < layout.hard:
                    index = None if refs.expert_index is None else refs.expert_index.at[rows]
                    x = select_query(layout, refs.query.at[rows], index, head)
                else:
                    x = widen(layout, refs.shared_query[rows].astype(jnp.float32))
                query_scr[head, rows] = (x * (scale * LOG2E)).astype(query_scr.dtype)

        for_row_chunks(tiles.q, "start_rows", start_rows)

    def combine(head, rows, logits, value, first: bool):
        """Softmax and sum of one head's tile; `value` has the columns of ones, if any."""
        keys = logits.shape[1]
        new_max = jnp.max(logits, axis=1, keepdims=True)
        rescale: Any = None
        if first:
            new_max = jnp.broadcast_to(new_max, (logits.shape[0], LANES))
        else:
            old_max = max_scr[head, rows]
            new_max = jnp.maximum(old_max, new_max)
            rescale = jnp.exp2(old_max - new_max)
        max_scr[head, rows] = new_max
        logits -= jnp.tile(new_max, (1, keys // LANES))
        if blocks.bfloat16_exp and value.dtype == jnp.bfloat16:
            logits = logits.astype(jnp.bfloat16)
        weights = jnp.exp2(logits)
        out = dot(weights.astype(value.dtype), value[:keys], NN)
        acc = out[:, :row]
        if not first:
            acc += acc_scr[head, rows] * jnp.tile(rescale, (1, row // LANES))
        acc_scr[head, rows] = acc
        if sum_scr is None:
            return
        if blocks.row_sum_on_mxu:
            total = out[:, row:]
        else:  # by lane: the lanes are added up once, at the end
            total = sum(
                weights[:, c : c + LANES].astype(jnp.float32) for c in range(0, keys, LANES)
            )
        if not first:
            total += sum_scr[head, rows] * rescale
        sum_scr[head, rows] = total

    def beside_ones(value, half: int):
        if ones_in_row:
            return jnp.where(half_mask(value.shape, half), value, jnp.ones_like(value))
        if blocks.row_sum_on_mxu:
            return jnp.concatenate([value, jnp.ones((tiles.kv, LANES), value.dtype)], axis=1)
        return value

    def all_heads(kind: str):
        ragged = kind != "interior" and tiles.kv_ragged

        def load(ref, lanes):
            x = ref[:, lanes]
            return zero_beyond(x, j * tiles.kv, tiles.kv_len) if ragged else x

        def work() -> Iterator[Any]:
            """Heads and rows, with the keys and values that they read."""
            for u in range(layout.units):
                lanes = pl.ds(u * row, row)
                key, value = load(refs.key, lanes), load(refs.value, lanes)
                for half in range(layout.groups_per_unit):
                    value_half = beside_ones(value, half)
                    first = (u * layout.groups_per_unit + half) * layout.k
                    for head in range(first, first + layout.k):
                        yield head, key, value_half
            if layout.shared:
                every = slice(None)
                key, value = load(refs.shared_key, every), load(refs.shared_value, every)
                yield layout.hard, widen(layout, key), beside_ones(widen(layout, value), 0)

        def score(head, rows, key):
            if kind == "interior":
                return dot(query_scr[head, rows], key, NT)
            if kind == "masked":
                return dot(query_scr[head, rows], key, NT) + bias_scr[rows]
            logits = dot(query_scr[head, rows], key[: rows.stop], NT)
            below, on = logits[:, : rows.start], logits[:, rows.start :] + bias_scr[...]
            return jnp.concatenate([below, on], axis=1) if rows.start else on

        # The compiler keeps to the order written: the next product of queries and keys stands
        # before the softmax that waits for this one's, so that the MXU has work meanwhile.
        waiting: Any = None
        for head, key, value in work():
            for start in range(0, tiles.q, blocks.strip):
                rows: Any = slice(start, start + blocks.strip)
                logits = score(head, rows, key)
                if waiting is not None:
                    combine(*waiting, first=kind == "diagonal")
                waiting = head, rows, logits, value
        combine(*waiting, first=kind == "diagonal")

    def interior():
        all_heads("interior")

    def masked():
        segments = (None, None)
        if tiles.segments:
            segments = mask.q_segment_ids[...], mask.kv_segment_ids[...]
        bias_scr[...] = mask_bias(tiles, table, b, i, j, *segments, kv_axis=1)
        all_heads("masked")

    def diagonal():
        """The first tile of its queries: nothing to rescale, and no keys above the diagonal."""
        start()
        row_index, column = (
            jax.lax.broadcasted_iota(jnp.int32, bias_scr.shape, axis) for axis in (0, 1)
        )
        bias_scr[...] = jnp.where(column <= row_index, 0.0, MASKED)
        all_heads("diagonal")

    if tiles.diagonal_first:
        pl.when(step == 0)(diagonal)
        pl.when((step > 0) & (j >= 0))(interior)
    else:
        pl.when(step == 0)(start)
        run = runs(tiles, table, b, i, j, i, j)
        if tiles.ever_masked:
            all_visible = is_interior(tiles, table, b, i, j)
            pl.when(run & all_visible)(interior)
            pl.when(run & ~all_visible)(masked)
        else:
            pl.when(run)(interior)

    @pl.when(last_step)
    def finish():
        def finish_rows(rows, first):
            # Each head's total and maximum, in its own lane: one logarithm serves all heads.
            shape = (rows.size, -(-layout.heads // LANES) * LANES)
            lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            totals = maxima = jnp.zeros(shape, jnp.float32)
            weighted = jnp.zeros((rows.size, row), jnp.float32)
            writer = SlotWriter(layout, out_ref.at[rows])
            for head in range(layout.heads):
                acc = acc_scr[head, rows]
                if ones_in_row:
                    own = layout.half(head // layout.k) if head < layout.hard else 0
                    swapped, own_lanes = swap_halves(acc), half_mask(acc.shape, own)
                    total = jnp.where(own_lanes, swapped, acc)
                    acc = jnp.where(own_lanes, acc, swapped)
                elif blocks.row_sum_on_mxu:
                    total = sum_scr[head, rows]
                else:
                    total = jnp.sum(sum_scr[head, rows], axis=1, keepdims=True)
                    total = jnp.broadcast_to(total, (rows.size, LANES))
                repeats = (1, shape[1] // LANES)
                totals = jnp.where(lane == head, jnp.tile(total, repeats), totals)
                maxima = jnp.where(lane == head, jnp.tile(max_scr[head, rows], repeats), maxima)
                # A row that has seen a key has seen its maximum, and its total is 1 at least.
                inverse = reciprocal(jnp.maximum(total, 0.5), approx=out_ref.dtype == jnp.bfloat16)
                out = acc * jnp.tile(inverse, (1, row // LANES))
                if head == layout.hard:
                    writer.write(layout.shared_slot, out)
                    continue
                writer.write(head, out)
                if layout.weighted:
                    weighted += refs.slot_weight[rows, head : head + 1].astype(jnp.float32) * out
                    if head == layout.hard - 1:
                        writer.write(layout.weighted_slot, weighted)
            # A row that saw nothing gets a logsumexp that makes every probability of it zero.
            seen = totals > 0
            if tiles.q_ragged:  # the backward pass reads whole blocks
                query = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
                seen &= query < tiles.q_len - i * tiles.q - first
            logsumexp = jnp.where(seen, maxima + jnp.log2(jnp.maximum(totals, 0.5)), -NOTHING_SEEN)
            logsumexp_ref[:, rows] = logsumexp.T[: layout.padded_heads]

        for_row_chunks(tiles.q, "finish_rows", finish_rows)


def forward(
    flat: Flat, mask: Mask, *, layout: Layout, scale: float, blocks: BlockSizes
) -> tuple[Float[Array, "batch q_len slot_lanes"], Float[Array, "batch heads q_padded"]]:
    """Slots, flat, and each head's logsumexp in base 2."""
    batch, dtype = len(flat.query), flat.query.dtype
    tiles = Tiles.of(blocks.q, blocks.kv, flat, mask)
    if tiles.diagonal_first:  # the grid itself says what is visited
        offsets = jnp.full((batch, 1), mask.start, jnp.int32)
        table = Visits(offsets, None, None, None, None)
    else:
        table = visits(mask, tiles, batch, outer="q")

    def q_block(i, step):
        return tiles.paired(i, step)[0] if tiles.diagonal_first else i

    def q_rows(lanes):
        return pl.BlockSpec(
            (None, tiles.q, lanes), lambda b, i, step, table: (b, q_block(i, step), 0)
        )

    def kv_block(b, i, step, table):
        if tiles.diagonal_first:
            i, step = tiles.paired(i, step)
            return jnp.maximum(i + tiles.first_diagonal - step, 0)
        # Once its own blocks are done, a row of blocks names the next row's first, so that it is
        # fetched behind the last product; blocks that are not visited are not fetched.
        block = table.last[b, i] - step
        following = table.last[b, jnp.minimum(i + 1, tiles.num_q - 1)]
        return jnp.maximum(jnp.where(block >= table.first[b, i], block, following), 0)

    def kv_rows(lanes):
        return pl.BlockSpec(
            (None, tiles.kv, lanes), lambda b, i, j, table: (b, kv_block(b, i, j, table), 0)
        )

    def rows(x, spec) -> Any:
        return None if x is None else spec(x.shape[-1])

    specs = Flat(
        query=rows(flat.query, q_rows),
        key=rows(flat.key, kv_rows),
        value=rows(flat.value, kv_rows),
        expert_index=rows(flat.expert_index, q_rows),
        slot_weight=rows(flat.slot_weight, q_rows),
        shared_query=rows(flat.shared_query, q_rows),
        shared_key=rows(flat.shared_key, kv_rows),
        shared_value=rows(flat.shared_value, kv_rows),
    )
    pairs = visible_pairs(tiles.q_len, tiles.kv_len, mask)
    # Segments as they broadcast to a tile [q, kv].
    mask = dataclasses.replace(mask, offset=None).map_queries(lambda ids: ids[:, :, None])
    mask = mask.map_keys(lambda ids: ids[:, None, :])
    kv_segments = pl.BlockSpec(
        (None, 1, tiles.kv), lambda b, i, j, table: (b, 0, kv_block(b, i, j, table))
    )
    mask_specs = mask.map_queries(lambda _: q_rows(1)).map_keys(lambda _: kv_segments)
    sums = None
    if layout.groups_per_unit == 1:
        sums = pltpu.VMEM((layout.heads, tiles.q, LANES), jnp.float32)
    bias = None
    if tiles.ever_masked:
        shape = (blocks.strip, blocks.strip) if tiles.diagonal_first else (tiles.q, tiles.kv)
        bias = pltpu.VMEM(shape, jnp.float32)
    padded = tiles.num_q * tiles.q
    out_shape = [
        result_shape(flat.query, (batch, tiles.q_len, layout.slots * layout.head_dim), dtype),
        result_shape(flat.query, (batch, layout.padded_heads, padded), jnp.float32),
    ]
    return pl.pallas_call(
        functools.partial(_kernel, layout=layout, tiles=tiles, blocks=blocks, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, *(tiles.pairs if tiles.diagonal_first else (tiles.num_q, tiles.num_kv))),
            in_specs=[specs, mask_specs],
            out_specs=[
                q_rows(layout.slots * layout.head_dim),
                pl.BlockSpec(
                    (None, layout.padded_heads, tiles.q),
                    lambda b, i, step, table: (b, 0, q_block(i, step)),
                ),
            ],
            scratch_shapes=[
                pltpu.VMEM((layout.heads, tiles.q, layout.row), dtype),
                pltpu.VMEM((layout.heads, tiles.q, layout.row), jnp.float32),
                pltpu.VMEM((layout.heads, tiles.q, LANES), jnp.float32),
                sums,
                bias,
            ],
        ),
        out_shape=out_shape,
        cost_estimate=estimate(FORWARD_PRODUCTS, pairs, layout, batch, flat, out_shape),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=claim(
                forward_bytes(layout, blocks, dtype.itemsize), blocks.vmem_bytes
            ),
        ),
        name="gqe_forward",
    )(table, flat, mask)
