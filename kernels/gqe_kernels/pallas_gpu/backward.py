"""The backward kernels: one finds dQ over a pipeline of keys, one dK and dV over one of queries.

Both compute the probabilities anew, from the logsumexp of the forward pass.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from gqe_kernels.pallas_gpu.blocks import SLOTS, WARPGROUPS, BlockSizes
from gqe_kernels.pallas_gpu.heads import Heads
from gqe_kernels.pallas_gpu.items import Items, for_each, free_slot, multiprocessors
from gqe_kernels.pallas_gpu.mask import LOG2E, MASKED, TRANSFORMS, add_product, visible
from gqe_kernels.pallas_gpu.tables import Masking, Tables, Visits


def _products(*pairs):
    """`left @ right.T`, float32, of pairs of blocks in shared memory; all are begun at once."""

    def compute(*accs):
        for acc, (left, right) in zip(accs, pairs, strict=True):
            plgpu.wgmma(acc, left, right.transpose((1, 0)))
        return [acc[...] for acc in accs]

    shapes = [(left.shape[0], right.shape[0]) for left, right in pairs]
    return pl.run_scoped(compute, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def _probabilities(logits, logsumexp, *, axis: int, scale: float, counts):
    """Of a tile; `logsumexp` is a number a query, which stands along `axis`."""
    exponent = logits * (scale * LOG2E) - lax.broadcast_in_dim(logsumexp, logits.shape, [axis])
    return jnp.exp2(exponent if counts is None else jnp.where(counts, exponent, MASKED))


def _d_query_kernel(
    q_ref,
    k_ref,
    v_ref,
    shared_k_ref,
    shared_v_ref,
    d_out_ref,
    logsumexp_ref,
    delta_ref,
    table_ref,
    q_segment_ref,
    kv_segment_ref,
    d_q_ref,
    buffers,
    fetched,
    consumed,
    *,
    heads: Heads,
    causal: bool,
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
    kv_ragged = kv_len % kv != 0

    def rows_of(tile, warpgroup):
        return pl.ds((tile * WARPGROUPS + warpgroup) * blocks.q, blocks.q)

    @pl.when(warpgroup == WARPGROUPS)
    def fetch():
        plgpu.set_max_registers(24, action="decrease")

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

        for_each(items, fetch_item, jnp.int32(0))

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
                logits, d_weights = _products(
                    (own_q, k_smem.at[slot]), (own_d_out, v_smem.at[slot])
                )
                counts = None
                if masked:
                    counts = visible(
                        shape,
                        q_axis=0,
                        batch=batch,
                        q_start=rows.start,
                        kv_start=visit.block(i) * kv,
                        position=visit.position,
                        causal=causal,
                        kv_len=kv_len,
                        kv_ragged=kv_ragged,
                        q_segment_ref=q_segment_ref,
                        kv_segment_ref=kv_segment_ref,
                    )
                weights = _probabilities(logits, logsumexp, axis=0, scale=scale, counts=counts)
                d_logits = weights * (d_weights - lax.broadcast_in_dim(delta, shape, [0]))
                add_product(d_q_acc, d_logits.astype(dtype), k_smem.at[slot], staging)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(kv_consumed.at[slot])

            pl.loop(0, visit.whole)(functools.partial(step, masked=False))
            if causal or q_segment_ref is not None or kv_ragged:
                pl.loop(visit.whole, visit.steps)(functools.partial(step, masked=True))
            return d_q_acc[...]

        d_q = pl.run_scoped(over_keys, plgpu.ACC((blocks.q, q_ref.shape[-1]), jnp.float32))
        own_q[...] = (d_q * scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_q, d_q_ref.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(own_consumed.at[own])
        return done + visit.steps

    @pl.when(warpgroup < WARPGROUPS)
    def compute():
        plgpu.set_max_registers(240, action="increase")
        for_each(items, d_query, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _d_key_kernel(
    q_ref,
    k_ref,
    v_ref,
    shared_k_ref,
    shared_v_ref,
    d_out_ref,
    logsumexp_ref,
    delta_ref,
    table_ref,
    q_segment_ref,
    kv_segment_ref,
    d_k_ref,
    d_v_ref,
    buffers,
    fetched,
    consumed,
    *,
    heads: Heads,
    causal: bool,
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
    kv_ragged = kv_len % (WARPGROUPS * kv) != 0

    def rows_of(tile, warpgroup):
        return pl.ds((tile * WARPGROUPS + warpgroup) * kv, kv)

    @pl.when(warpgroup == WARPGROUPS)
    def fetch():
        plgpu.set_max_registers(24, action="decrease")

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

        for_each(items, fetch_item, jnp.int32(0))

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
                (logits,) = _products((own_k, q_smem.at[slot]))
                counts = None
                if masked:
                    # Read again: beside both sums, what was kept from without would be spilled.
                    visit = Visits.read(table_ref, batch, tile)
                    counts = visible(
                        shape,
                        q_axis=1,
                        batch=batch,
                        q_start=visit.block(i) * q,
                        kv_start=kv_start,
                        position=visit.position,
                        causal=causal,
                        kv_len=kv_len,
                        kv_ragged=kv_ragged,
                        q_segment_ref=q_segment_ref,
                        kv_segment_ref=kv_segment_ref,
                    )

                def a_query(ref):
                    return plgpu.load(ref.at[slot], layout=plgpu.Layout.WGMMA.reduce(0))

                logsumexp = a_query(logsumexp_smem)
                weights = _probabilities(logits, logsumexp, axis=1, scale=scale, counts=counts)
                add_product(d_v_acc, weights.astype(dtype), d_out_smem.at[slot], staging)
                (d_weights,) = _products((own_v, d_out_smem.at[slot]))
                d_weights -= lax.broadcast_in_dim(a_query(delta_smem), shape, [1])
                d_logits = weights * d_weights
                add_product(d_k_acc, d_logits.astype(dtype), q_smem.at[slot], staging)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(q_consumed.at[slot])

            pl.loop(0, visit.whole)(functools.partial(step, masked=False))
            if causal or q_segment_ref is not None or kv_ragged:
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

    @pl.when(warpgroup < WARPGROUPS)
    def compute():
        plgpu.set_max_registers(240, action="increase")
        for_each(items, d_key_and_value, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def backward(
    query,
    key,
    value,
    shared_key,
    shared_value,
    masking: Masking,
    tables: Tables,
    logsumexp,
    delta,
    d_out,
    *,
    heads: Heads,
    causal: bool,
    scale: float,
    lengths: tuple[int, int],
    blocks: BlockSizes,
):
    """Gradients of the queries, and of what each head reads: [batch, kv_len, head, head_dim].

    Args:
      query: of every head, [batch, q_len, head, head_dim].
      logsumexp: of each head and query, [batch, head, q_len].
      delta: of each slot and query, [batch, slot, q_len], the output times its gradient.
      d_out: the gradient of the slots; the others as in `forward`.
    """
    batch, q_len, _, head_dim = query.shape
    kv_len, dtype = key.shape[1], query.dtype
    q_tile, kv_tile = WARPGROUPS * blocks.q, WARPGROUPS * blocks.backward_kv
    static = {
        "heads": heads,
        "causal": causal,
        "scale": scale,
        "kv_len": lengths[1],
        "blocks": blocks,
    }
    operands = query, key, value, shared_key, shared_value, d_out, logsumexp, delta

    def rows(*shape):
        return plgpu.SMEM((*shape, head_dim), dtype, transforms=TRANSFORMS)

    def numbers(*shape):
        return plgpu.SMEM(shape, jnp.float32)

    def staging(*shape):
        if not blocks.staged:
            return None
        return plgpu.SMEM((WARPGROUPS, *shape), dtype, transforms=TRANSFORMS)

    def kernel(body, name, out_type, tiles, descending, buffers, fetched):
        programs = blocks.programs or multiprocessors()
        items = Items(tiles, batch, heads.number, descending, programs)
        consumed = tuple(
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=number)
            for number in (SLOTS, blocks.stages)
        )
        return plgpu.kernel(
            functools.partial(body, items=items, **static),
            out_type=out_type,
            grid=items.grid,
            grid_names=("program",),
            num_threads=WARPGROUPS + 1,
            thread_name="warpgroup",
            scratch_types=(buffers, fetched, consumed),
            compiler_params=plgpu.CompilerParams(approx_math=True),
            kernel_name=name,
        )

    def fetched(copies, number):
        return plgpu.Barrier(num_arrivals=copies, num_barriers=number)

    own = (SLOTS, WARPGROUPS, blocks.q)
    of_keys = (blocks.stages, blocks.backward_kv)
    d_query = kernel(
        _d_query_kernel,
        "gqe_backward_queries",
        jax.ShapeDtypeStruct(query.shape, dtype),
        q_len // q_tile,
        True,  # the last queries see the most keys
        (
            *(rows(*own), rows(*own), numbers(*own), numbers(*own)),
            *(rows(*of_keys), rows(*of_keys)),
            staging(blocks.q, blocks.backward_kv),
        ),
        (fetched(4 * WARPGROUPS, SLOTS), fetched(1, blocks.stages), fetched(1, blocks.stages)),
    )(*operands, tables.d_query, masking.q_segment, masking.kv_segment)
    own = (SLOTS, WARPGROUPS, blocks.backward_kv)
    of_queries = (blocks.stages, blocks.backward_q)
    of_read = jax.ShapeDtypeStruct((batch, kv_len, heads.number, head_dim), dtype)
    d_key, d_value = kernel(
        _d_key_kernel,
        "gqe_backward_keys",
        (of_read, of_read),
        kv_len // kv_tile,
        False,  # the first keys are seen by the most queries
        (
            *(rows(*own), rows(*own)),
            *(rows(*of_queries), rows(*of_queries), numbers(*of_queries), numbers(*of_queries)),
            staging(blocks.backward_kv, blocks.backward_q),
        ),
        (fetched(2 * WARPGROUPS, SLOTS), fetched(4, blocks.stages)),
    )(*operands, tables.d_key, masking.q_segment, masking.kv_segment)
    return d_query, d_key, d_value
