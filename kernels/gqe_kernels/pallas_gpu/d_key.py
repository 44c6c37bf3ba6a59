"""The kernel of dK and dV: two warpgroups of keys over a pipeline of queries."""

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from gqe_kernels.pallas_gpu.blocks import SLOTS, WARPGROUPS, BlockSizes
from gqe_kernels.pallas_gpu.heads import Heads
from gqe_kernels.pallas_gpu.items import Items, free_slot, share_out
from gqe_kernels.pallas_gpu.tables import Visits
from gqe_kernels.pallas_gpu.tile import add_product, probabilities, products, visible


def d_key_kernel(
    q_ref,
    k_ref,
    v_ref,
    shared_k_ref,
    shared_v_ref,
    d_out_ref,
    logsumexp_ref,
    delta_ref,
    table_ref,
    mask: Any,  # Mask, of references
    d_k_ref,
    d_v_ref,
    buffers,
    fetched,
    consumed,
    *,
    heads: Heads,
    scale: float,
    kv_len: int,
    blocks: BlockSizes,
    items: Items,
):
    warpgroup = lax.axis_index("warpgroup")
    k_smem, v_smem, q_smem, d_out_smem, logsumexp_smem, delta_smem, staging_smem = buffers
    own_fetched, q_fetched = fetched
    own_consumed, q_consumed = consumed
    dtype, q, kv = q_ref.dtype, blocks.backward_q, blocks.backward_kv
    kv_end = kv_len if kv_len % (WARPGROUPS * kv) else None

    def rows_of(tile, warpgroup):
        return pl.ds((tile * WARPGROUPS + warpgroup) * kv, kv)

    def fetch_item(number, tile, batch, head, done):
        own = free_slot(number, own_consumed)

        def keys_and_values(k, v):
            for i in range(WARPGROUPS):
                rows = rows_of(tile, i)
                plgpu.copy_gmem_to_smem(k(rows), k_smem.at[own, i], own_fetched.at[own])
                plgpu.copy_gmem_to_smem(v(rows), v_smem.at[own, i], own_fetched.at[own])

        shared = shared_k_ref, shared_v_ref
        heads.read(batch, head, (k_ref, v_ref), shared, keys_and_values)
        visit = Visits.read(table_ref, batch, tile)

        @pl.loop(0, visit.steps)
        def step(i):
            slot = lax.rem(done + i, jnp.int32(blocks.stages))
            rows, again = pl.ds(visit.block(i) * q, q), done + i >= blocks.stages
            pl.when(again)(lambda: plgpu.barrier_wait(q_consumed.at[slot]))
            sources = (
                (q_ref.at[batch, rows, head], q_smem),
                (d_out_ref.at[batch, rows, heads.slot(head)], d_out_smem),
                (logsumexp_ref.at[batch, head, rows], logsumexp_smem),
                (delta_ref.at[batch, heads.slot(head), rows], delta_smem),
            )
            for source, target in sources:
                plgpu.copy_gmem_to_smem(source, target.at[slot], q_fetched.at[slot])

        return done + visit.steps

    def d_key_and_value(number, tile, batch, head, done):
        own = lax.rem(number, jnp.int32(SLOTS))
        own_k, own_v = k_smem.at[own, warpgroup], v_smem.at[own, warpgroup]
        visit = Visits.read(table_ref, batch, tile)
        rows = rows_of(tile, warpgroup)
        kv_start = rows.start
        plgpu.barrier_wait(own_fetched.at[own])
        staging = None if staging_smem is None else staging_smem.at[warpgroup]
        shape = (kv, q)

        def over_queries(d_k_acc, d_v_acc):
            def step(i, masked: bool):
                slot = lax.rem(done + i, jnp.int32(blocks.stages))
                plgpu.barrier_wait(q_fetched.at[slot])
                (logits,) = products((own_k, q_smem.at[slot]))
                seen = None
                if masked:
                    # Read again: beside both sums, what was kept from without would be spilled.
                    visit = Visits.read(table_ref, batch, tile)
                    seen = visible(
                        mask,
                        shape,
                        q_axis=1,
                        batch=batch,
                        q_start=visit.block(i) * q,
                        kv_start=kv_start,
                        position=visit.position,
                        kv_end=kv_end,
                    )

                def a_query(ref):
                    return plgpu.load(ref.at[slot], layout=plgpu.Layout.WGMMA.reduce(0))

                logsumexp = a_query(logsumexp_smem)
                weights = probabilities(logits, logsumexp, axis=1, scale=scale, seen=seen)
                add_product(d_v_acc, weights.astype(dtype), d_out_smem.at[slot], staging)
                (d_weights,) = products((own_v, d_out_smem.at[slot]))
                d_weights -= lax.broadcast_in_dim(a_query(delta_smem), shape, [1])
                d_logits = weights * d_weights
                add_product(d_k_acc, d_logits.astype(dtype), q_smem.at[slot], staging)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(q_consumed.at[slot])

            pl.loop(0, visit.whole)(functools.partial(step, masked=False))
            if mask.hides_any or kv_end is not None:
                pl.loop(visit.whole, visit.steps)(functools.partial(step, masked=True))
            own_k[...] = (d_k_acc[...] * scale).astype(dtype)
            own_v[...] = d_v_acc[...].astype(dtype)

        accumulator = plgpu.ACC((kv, q_ref.shape[-1]), jnp.float32)
        pl.run_scoped(over_queries, accumulator, accumulator)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_k, d_k_ref.at[batch, rows, head])
        plgpu.copy_smem_to_gmem(own_v, d_v_ref.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(own_consumed.at[own])
        return done + visit.steps

    share_out(items, fetch_item, d_key_and_value)
