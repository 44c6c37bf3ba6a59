"""The forward kernel: two warpgroups of queries over a pipeline of keys and values."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gqe_kernels.pallas_gpu.blocks import WARPGROUPS, BlockSizes
from gqe_kernels.pallas_gpu.items import (
    SLOTS,
    Items,
    fetch_own,
    for_each,
    multiprocessors,
    of_head,
)
from gqe_kernels.pallas_gpu.mask import (
    LOG2E,
    MASKED,
    NOTHING_SEEN,
    TRANSFORMS,
    add_product,
    visible,
)
from gqe_kernels.pallas_gpu.tables import Masking, Visits, visits


def _kernel(
    q_ref,
    k_ref,
    v_ref,
    shared_k_ref,
    shared_v_ref,
    table_ref,
    position_ref,
    q_segment_ref,
    kv_segment_ref,
    out_ref,
    logsumexp_ref,
    buffers,
    fetched,
    consumed,
    turn,
    *,
    heads_per_group: int,
    hard: int,
    causal: bool,
    scale: float,
    kv_len: int,
    blocks: BlockSizes,
    items: Items,
):
    warpgroup = lax.axis_index("warpgroup")
    q_smem, k_smem, v_smem, logsumexp_smem, staging_smem = buffers
    q_fetched, k_fetched, v_fetched = fetched
    q_consumed, k_consumed, v_consumed = consumed
    head_dim, dtype = q_ref.shape[-1], q_ref.dtype
    kv_ragged = kv_len % blocks.kv != 0

    def rows_of(tile, warpgroup):
        return pl.ds((tile * WARPGROUPS + warpgroup) * blocks.q, blocks.q)

    @pl.when(warpgroup == WARPGROUPS)
    def fetch():
        plgpu.set_max_registers(24, action="decrease")

        def fetch_item(number, tile, batch, head, done):
            def queries(slot):
                for i in range(WARPGROUPS):
                    yield q_ref.at[batch, rows_of(tile, i), head], q_smem.at[slot, i]

            fetch_own(number, queries, q_fetched, q_consumed)
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

            shared = shared_k_ref, shared_v_ref
            of_head(batch, head, hard, heads_per_group, (k_ref, v_ref), shared, keys_and_values)
            return done + visit.steps

        for_each(items, fetch_item, jnp.int32(0))

    def attend(number, tile, batch, head, done):
        own = lax.rem(number, jnp.int32(SLOTS))
        own_q, own_logsumexp = q_smem.at[own, warpgroup], logsumexp_smem.at[warpgroup]
        visit = Visits.read(table_ref, batch, tile)
        position = position_ref[batch]
        rows = rows_of(tile, warpgroup)
        plgpu.barrier_wait(q_fetched.at[own])

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
                counts = visible(
                    shape,
                    q_axis=0,
                    batch=batch,
                    q_start=rows.start,
                    kv_start=visit.block(i) * blocks.kv,
                    position=position,
                    causal=causal,
                    kv_len=kv_len,
                    kv_ragged=kv_ragged,
                    q_segment_ref=q_segment_ref,
                    kv_segment_ref=kv_segment_ref,
                )
                logits = jnp.where(counts, logits, MASKED)
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
        if causal or q_segment_ref is not None or kv_ragged:
            masked = functools.partial(step, masked=True)
            carry = lax.fori_loop(visit.whole, visit.steps, masked, carry)
        pl.when(warpgroup == 0)(take_turns)
        acc, row_max, row_sum = carry
        # A row that has seen a key has seen its maximum, and its sum is 1 at least.
        seen = row_sum > 0.5
        inverse = 1.0 / jnp.maximum(row_sum, 0.5)
        own_q[...] = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(dtype)
        logsumexp = row_max + jnp.log(jnp.maximum(row_sum, 0.5)) * LOG2E
        own_logsumexp[...] = jnp.where(seen, logsumexp, -NOTHING_SEEN)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_q, out_ref.at[batch, rows, head])
        plgpu.copy_smem_to_gmem(own_logsumexp, logsumexp_ref.at[batch, head, rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(q_consumed.at[own])
        return done + visit.steps

    @pl.when(warpgroup < WARPGROUPS)
    def compute():
        plgpu.set_max_registers(240, action="increase")
        for_each(items, attend, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def forward(
    query: Float[Array, "batch q_len head head_dim"],
    key: Float[Array, "batch kv_len group head_dim"],
    value: Float[Array, "batch kv_len group head_dim"],
    shared_key: Float[Array, "batch kv_len head_dim"] | None,
    shared_value: Float[Array, "batch kv_len head_dim"] | None,
    masking: Masking,
    *,
    heads_per_group: int,
    causal: bool,
    scale: float,
    lengths: tuple[int, int],
    blocks: BlockSizes,
) -> tuple[Float[Array, "batch q_len head head_dim"], Float[Array, "batch head q_len"]]:
    """Each head's output, and its logsumexp in base 2.

    Args:
      query, key, value, shared_key, shared_value: padded to whole blocks; the last query head is
        the shared one, if there are shared keys.
      heads_per_group: query heads that read one head of `key`.
      lengths: queries and keys before padding.
    """
    batch, q_len, heads, head_dim = query.shape
    tile_rows = WARPGROUPS * blocks.q
    table = visits(masking, causal=causal, lengths=lengths, rows=(tile_rows, blocks.kv), outer="q")

    def shared_memory(*shape):
        return plgpu.SMEM((*shape, head_dim), query.dtype, transforms=TRANSFORMS)

    items = Items(
        tiles=q_len // tile_rows,
        batch=batch,
        heads=heads,
        descending=True,  # the last queries see the most keys
        programs=blocks.programs or multiprocessors(),
    )
    staging = plgpu.SMEM((WARPGROUPS, blocks.q, blocks.kv), query.dtype, transforms=TRANSFORMS)
    kernel = functools.partial(
        _kernel,
        heads_per_group=heads_per_group,
        hard=heads - (shared_key is not None),
        causal=causal,
        scale=scale,
        kv_len=lengths[1],
        blocks=blocks,
        items=items,
    )
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, q_len), jnp.float32),
        ),
        grid=items.grid,
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=(
            (
                shared_memory(SLOTS, WARPGROUPS, blocks.q),
                shared_memory(blocks.stages, blocks.kv),
                shared_memory(blocks.stages, blocks.kv),
                plgpu.SMEM((WARPGROUPS, blocks.q), jnp.float32),
                staging if blocks.staged else None,
            ),
            (
                plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=SLOTS),
                plgpu.Barrier(num_barriers=blocks.stages),
                plgpu.Barrier(num_barriers=blocks.stages),
            ),
            tuple(
                plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=number)
                for number in (SLOTS, blocks.stages, blocks.stages)
            ),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="gqe_forward",
    )(query, key, value, shared_key, shared_value, table, masking.position, *masking[1:])
