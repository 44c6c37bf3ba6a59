"""The kernel of dQ: two warpgroups of queries over a pipeline of keys and values."""

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


def d_query_kernel(
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
    d_q_ref,
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
    q_smem, d_out_smem, logsumexp_smem, delta_smem, k_smem, v_smem, staging_smem = buffers
    own_fetched, k_fetched, v_fetched = fetched
    own_consumed, kv_consumed = consumed
    dtype, kv = q_ref.dtype, blocks.backward_kv
    kv_end = kv_len if kv_len % kv else None

    def rows_of(tile, warpgroup):
        return pl.ds((tile * WARPGROUPS + warpgroup) * blocks.q, blocks.q)

    def fetch_item(number, tile, batch, head, done):
        own = free_slot(number, own_consumed)
        for i in range(WARPGROUPS):
            rows, slot = rows_of(tile, i), heads.slot(head)
            for source, target in (
                (q_ref.at[batch, rows, head], q_smem),
                (d_out_ref.at[batch, rows, slot], d_out_smem),
                (logsumexp_ref.at[batch, head, rows], logsumexp_smem),
                (delta_ref.at[batch, slot, rows], delta_smem),
            ):
                plgpu.copy_gmem_to_smem(source, target.at[own, i], own_fetched.at[own])
        visit = Visits.read(table_ref, batch, tile)

        def keys_and_values(k, v):
            @pl.loop(0, visit.steps)
            def step(i):
                slot = lax.rem(done + i, jnp.int32(blocks.stages))
                rows, again = pl.ds(visit.block(i) * kv, kv), done + i >= blocks.stages
                pl.when(again)(lambda: plgpu.barrier_wait(kv_consumed.at[slot]))
                plgpu.copy_gmem_to_smem(k(rows), k_smem.at[slot], k_fetched.at[slot])
                plgpu.copy_gmem_to_smem(v(rows), v_smem.at[slot], v_fetched.at[slot])

        shared = shared_k_ref, shared_v_ref
        heads.read(batch, head, (k_ref, v_ref), shared, keys_and_values)
        return done + visit.steps

    def d_query(number, tile, batch, head, done):
        own = lax.rem(number, jnp.int32(SLOTS))
        own_q, own_d_out = q_smem.at[own, warpgroup], d_out_smem.at[own, warpgroup]
        visit = Visits.read(table_ref, batch, tile)
        rows = rows_of(tile, warpgroup)
        plgpu.barrier_wait(own_fetched.at[own])
        logsumexp, delta = (
            plgpu.load(ref.at[own, warpgroup], layout=plgpu.Layout.WGMMA.reduce(1))
            for ref in (logsumexp_smem, delta_smem)
        )
        staging = None if staging_smem is None else staging_smem.at[warpgroup]
        shape = (blocks.q, kv)

        def over_keys(d_q_acc):
            def step(i, masked: bool):
                slot = lax.rem(done + i, jnp.int32(blocks.stages))
                plgpu.barrier_wait(k_fetched.at[slot])
                plgpu.barrier_wait(v_fetched.at[slot])
                logits, d_weights = products((own_q, k_smem.at[slot]), (own_d_out, v_smem.at[slot]))
                seen = None
                if masked:
                    seen = visible(
                        mask,
                        shape,
                        q_axis=0,
                        batch=batch,
                        q_start=rows.start,
                        kv_start=visit.block(i) * kv,
                        position=visit.position,
                        kv_end=kv_end,
                    )
                weights = probabilities(logits, logsumexp, axis=0, scale=scale, seen=seen)
                d_logits = weights * (d_weights - lax.broadcast_in_dim(delta, shape, [0]))
                add_product(d_q_acc, d_logits.astype(dtype), k_smem.at[slot], staging)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(kv_consumed.at[slot])

            pl.loop(0, visit.whole)(functools.partial(step, masked=False))
            if mask.hides_any or kv_end is not None:
                pl.loop(visit.whole, visit.steps)(functools.partial(step, masked=True))
            return d_q_acc[...]

        d_q = pl.run_scoped(over_keys, plgpu.ACC((blocks.q, q_ref.shape[-1]), jnp.float32))
        own_q[...] = (d_q * scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_q, d_q_ref.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(own_consumed.at[own])
        return done + visit.steps

    share_out(items, fetch_item, d_query)
