"""The forward kernel: two warpgroups of queries over a pipeline of keys and values."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gqe_kernels.contract import AnyArray, Mask
from gqe_kernels.pallas_gpu.blocks import SLOTS, WARPGROUPS, BlockSizes
from gqe_kernels.pallas_gpu.heads import ByHead, Heads
from gqe_kernels.pallas_gpu.items import Items, free_slot, launch, multiprocessors, share_out
from gqe_kernels.pallas_gpu.tables import Visits
from gqe_kernels.pallas_gpu.tile import (
    LOG2E,
    MASKED,
    NOTHING_SEEN,
    TRANSFORMS,
    add_product,
    visible,
)


def _kernel(
    refs: Any,  # ByHead, of references
    table_ref,
    mask: Any,  # Mask, of references
    out_ref,
    logsumexp_ref,
    selected_ref,
    buffers,
    fetched,
    consumed,
    turn,
    *,
    heads: Heads,
    scale: float,
    kv_len: int,
    blocks: BlockSizes,
    items: Items,
):
    warpgroup = lax.axis_index("warpgroup")
    q_smem, others_smem, k_smem, v_smem, staging_smem = buffers
    q_fetched, k_fetched, v_fetched = fetched
    q_consumed, k_consumed, v_consumed, others_consumed = consumed
    head_dim, dtype, experts = refs.query.shape[-1], refs.query.dtype, heads.experts
    kv_end = kv_len if kv_len % blocks.kv else None

    def rows_of(tile, warpgroup):
        return pl.ds((tile * WARPGROUPS + warpgroup) * blocks.q, blocks.q)

    def fetch_item(number, tile, batch, head, done):
        own = free_slot(number, q_consumed)
        if others_smem is not None:
            pl.when(number > 0)(lambda: plgpu.barrier_wait(others_consumed))

        def queries(of_expert):
            for i, m in itertools.product(range(WARPGROUPS), range(experts)):
                target = q_smem.at[own, i] if m == 0 else others_smem.at[i, m - 1]
                source = of_expert(rows_of(tile, i), m)
                plgpu.copy_gmem_to_smem(source, target, q_fetched.at[own])

        def of_group():
            start = head if experts == 1 else heads.group_of(head) * experts
            queries(lambda rows, m: refs.query.at[batch, rows, start + m])

        if refs.shared_query is None:
            of_group()
        else:  # whichever expert is selected, it is the shared one
            heads.choose(
                head, of_group, lambda: queries(lambda rows, _: refs.shared_query.at[batch, rows])
            )
        visit = Visits.read(table_ref, batch, tile)

        def keys_and_values(k, v):
            @pl.loop(0, visit.steps)
            def step(i):
                slot = lax.rem(done + i, jnp.int32(blocks.stages))
                again = done + i >= blocks.stages
                rows = pl.ds(visit.block(i) * blocks.kv, blocks.kv)
                pl.when(again)(lambda: plgpu.barrier_wait(k_consumed.at[slot]))
                plgpu.copy_gmem_to_smem(k(rows), k_smem.at[slot], k_fetched.at[slot])
                pl.when(again)(lambda: plgpu.barrier_wait(v_consumed.at[slot]))
                plgpu.copy_gmem_to_smem(v(rows), v_smem.at[slot], v_fetched.at[slot])

        shared = refs.shared_key, refs.shared_value
        heads.read(batch, head, (refs.key, refs.value), shared, keys_and_values)
        return done + visit.steps

    def attend(number, tile, batch, head, done):
        own = lax.rem(number, jnp.int32(SLOTS))
        own_q = q_smem.at[own, warpgroup]
        visit = Visits.read(table_ref, batch, tile)
        rows = rows_of(tile, warpgroup)
        plgpu.barrier_wait(q_fetched.at[own])
        if experts > 1:
            index = plgpu.load(
                refs.expert_index.at[batch, rows, jnp.minimum(head, heads.hard - 1)],
                layout=plgpu.Layout.WGMMA.reduce(1),
                optimized=False,
            )
            index = lax.broadcast_in_dim(index, own_q.shape, [0])
            chosen = plgpu.load(own_q, layout=plgpu.Layout.WGMMA)
            for m in range(1, experts):
                other = plgpu.load(others_smem.at[warpgroup, m - 1], layout=plgpu.Layout.WGMMA)
                chosen = jnp.where(index == m, other, chosen)
            own_q[...] = chosen
            plgpu.commit_smem()
            plgpu.barrier_arrive(others_consumed)
        if selected_ref is not None:
            plgpu.copy_smem_to_gmem(own_q, selected_ref.at[batch, rows, head])

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def filled(shape, value, layout):
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        def step(i, carry, masked: bool):
            acc, row_max, row_sum = carry
            slot = lax.rem(done + i, jnp.int32(blocks.stages))
            plgpu.barrier_wait(k_fetched.at[slot])

            def product_with_keys(ref):
                plgpu.wgmma(ref, own_q, k_smem.at[slot].transpose((1, 0)))
                take_turns()
                return ref[...]

            shape = (blocks.q, blocks.kv)
            logits = pl.run_scoped(product_with_keys, plgpu.ACC(shape, jnp.float32))
            plgpu.barrier_arrive(k_consumed.at[slot])
            if masked:
                seen = visible(
                    mask,
                    shape,
                    q_axis=0,
                    batch=batch,
                    q_start=rows.start,
                    kv_start=visit.block(i) * blocks.kv,
                    position=visit.position,
                    kv_end=kv_end,
                )
                logits = jnp.where(seen, logits, MASKED)
            new_max = jnp.maximum(row_max, jnp.max(logits, axis=1) * (scale * LOG2E))
            rescale = jnp.exp2(row_max - new_max)
            weights = jnp.exp2(logits * (scale * LOG2E) - lax.broadcast_in_dim(new_max, shape, [0]))
            row_sum = row_sum * rescale + jnp.sum(weights, axis=1)
            weights = weights.astype(dtype)
            plgpu.barrier_arrive(turn)  # the other warpgroup's products may run meanwhile
            plgpu.barrier_wait(v_fetched.at[slot])
            plgpu.barrier_wait(turn)

            def product_with_values(ref):
                staging = None if staging_smem is None else staging_smem.at[warpgroup]
                add_product(ref, weights, v_smem.at[slot], staging)
                return ref[...]

            more = pl.run_scoped(product_with_values, plgpu.ACC((blocks.q, head_dim), jnp.float32))
            plgpu.barrier_arrive(v_consumed.at[slot])
            acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [0]) + more
            return acc, new_max, row_sum

        carry = (
            filled((blocks.q, head_dim), 0.0, plgpu.Layout.WGMMA),
            filled((blocks.q,), NOTHING_SEEN, plgpu.Layout.WGMMA.reduce(1)),
            filled((blocks.q,), 0.0, plgpu.Layout.WGMMA.reduce(1)),
        )
        pl.when(warpgroup == 1)(take_turns)
        carry = lax.fori_loop(0, visit.whole, functools.partial(step, masked=False), carry)
        if mask.hides_any or kv_end is not None:
            masked = functools.partial(step, masked=True)
            carry = lax.fori_loop(visit.whole, visit.steps, masked, carry)
        pl.when(warpgroup == 0)(take_turns)
        acc, row_max, row_sum = carry
        # A row that has seen a key has seen its maximum, and its sum is 1 at least.
        seen = row_sum > 0.5
        inverse = 1.0 / jnp.maximum(row_sum, 0.5)
        if selected_ref is not None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        own_q[...] = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(dtype)
        logsumexp = row_max + jnp.log(jnp.maximum(row_sum, 0.5)) * LOG2E
        logsumexp_ref[batch, head, rows] = jnp.where(seen, logsumexp, -NOTHING_SEEN)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_q, out_ref.at[batch, rows, heads.slot(head)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(q_consumed.at[own])
        return done + visit.steps

    share_out(items, fetch_item, attend)


class Forward(NamedTuple):
    """What the forward pass finds; lengths are padded to whole blocks.

    Attributes:
      slots: the hard slots, one that is not written if `heads.weighted`, and the shared one.
      logsumexp: in base 2.
      selected: the queries of every head, if asked for.
    """

    slots: Float[Array, "batch q_len slot head_dim"]
    logsumexp: Float[Array, "batch head q_len"]
    selected: Float[Array, "batch q_len head head_dim"] | None


def forward(
    operands: ByHead,
    mask: Mask,
    table: Int[AnyArray, "batch q_tile 5"],
    *,
    heads: Heads,
    scale: float,
    lengths: tuple[int, int],
    blocks: BlockSizes,
    keep_selected: bool = False,
) -> Forward:
    """Attention of each head.

    Args:
      heads: the heads of the launch.
      table: the visits of `Tables.forward`.
      lengths: queries and keys before padding.
      keep_selected: also return the queries of every head as the kernel selects them.
    """
    batch, q_len, _, head_dim = operands.query.shape
    dtype = operands.query.dtype
    experts = heads.experts
    tile_rows = WARPGROUPS * blocks.q
    items = Items(
        tiles=q_len // tile_rows,
        batch=batch,
        heads=heads.number,
        descending=True,  # where causal, the last queries see the most keys
        programs=blocks.programs or multiprocessors(),
    )

    def shared_memory(*shape, width=head_dim):
        return plgpu.SMEM((*shape, width), dtype, transforms=TRANSFORMS)

    def of_queries(number):
        return jax.ShapeDtypeStruct((batch, q_len, number, head_dim), dtype)

    body = functools.partial(_kernel, heads=heads, scale=scale, kv_len=lengths[1], blocks=blocks)
    consumed = functools.partial(plgpu.Barrier, num_arrivals=WARPGROUPS)
    others = None if experts == 1 else shared_memory(WARPGROUPS, experts - 1, blocks.q)
    found = launch(
        body,
        items,
        name="gqe_forward",
        out_type=(
            of_queries(heads.slots),
            jax.ShapeDtypeStruct((batch, heads.number, q_len), jnp.float32),
            of_queries(heads.number) if keep_selected else None,
        ),
        scratch_types=(
            (
                shared_memory(SLOTS, WARPGROUPS, blocks.q),
                others,
                shared_memory(blocks.stages, blocks.kv),
                shared_memory(blocks.stages, blocks.kv),
                shared_memory(WARPGROUPS, blocks.q, width=blocks.kv) if blocks.staged else None,
            ),
            (
                plgpu.Barrier(num_arrivals=WARPGROUPS * experts, num_barriers=SLOTS),
                plgpu.Barrier(num_barriers=blocks.stages),
                plgpu.Barrier(num_barriers=blocks.stages),
            ),
            (
                consumed(num_barriers=SLOTS),
                consumed(num_barriers=blocks.stages),
                consumed(num_barriers=blocks.stages),
                None if experts == 1 else consumed(),
            ),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
    )(operands, table, mask)
    return Forward(*found)
