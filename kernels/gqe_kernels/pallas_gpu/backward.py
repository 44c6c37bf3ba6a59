"""The backward kernels: one finds dQ over a pipeline of keys, one dK and dV over one of queries.

Both compute the probabilities anew, from the logsumexp of the forward pass.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from gqe_kernels.pallas_gpu.blocks import WARPGROUPS, BlockSizes
from gqe_kernels.pallas_gpu.mask import LOG2E, MASKED, TRANSFORMS, add_product, visible
from gqe_kernels.pallas_gpu.tables import Masking, visited


def _product(left_ref, right_ref):
    """`left @ right.T`, float32, of blocks in shared memory."""

    def compute(acc_ref):
        plgpu.wgmma(acc_ref, left_ref, right_ref.transpose((1, 0)))
        return acc_ref[...]

    shape = (left_ref.shape[0], right_ref.shape[0])
    return pl.run_scoped(compute, plgpu.ACC(shape, jnp.float32))


def _probabilities(logits, logsumexp, *, axis: int, scale: float, counts):
    """Of a tile; `logsumexp` is a number a query, which stands along `axis`."""
    if counts is not None:
        logits = jnp.where(counts, logits, MASKED)
    rows = lax.broadcast_in_dim(logsumexp, logits.shape, [axis])
    return jnp.exp2(logits * (scale * LOG2E) - rows)


def _of_head(head, hard: int, heads_per_group: int, refs, shared_refs, body) -> None:
    """Calls `body` with the keys and values of a head: functions of rows to a slice."""
    batch = lax.axis_index("batch")

    def of_group():
        group = lax.div(head, jnp.int32(heads_per_group))
        body(*(lambda rows, ref=ref: ref.at[batch, rows, group] for ref in refs))

    if shared_refs[0] is None:
        of_group()
    else:
        pl.when(head < hard)(of_group)
        pl.when(head == hard)(
            lambda: body(*(lambda rows, ref=ref: ref.at[batch, rows] for ref in shared_refs))
        )


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
    position_ref,
    q_segment_ref,
    kv_segment_ref,
    d_q_ref,
    buffers,
    q_fetched,
    fetched,
    consumed,
    *,
    heads_per_group: int,
    hard: int,
    causal: bool,
    scale: float,
    kv_len: int,
    blocks: BlockSizes,
):
    head, batch = lax.axis_index("head"), lax.axis_index("batch")
    tile = table_ref.shape[1] - 1 - lax.axis_index("tile")
    warpgroup = lax.axis_index("warpgroup")
    q_smem, d_out_smem, logsumexp_smem, delta_smem, k_smem, v_smem, staging_smem = buffers
    dtype = q_ref.dtype
    first, end = table_ref[batch, tile, 0], table_ref[batch, tile, 1]
    steps, kv = end - first, blocks.backward_kv

    @pl.when(warpgroup == WARPGROUPS)
    def fetch():
        plgpu.set_max_registers(24, action="decrease")

        def fetch_from(k, v):
            @pl.loop(0, steps)
            def step(i):
                slot = lax.rem(i, jnp.int32(blocks.stages))
                rows = pl.ds((first + i) * kv, kv)
                pl.when(i >= blocks.stages)(lambda: plgpu.barrier_wait(consumed.at[slot]))
                plgpu.copy_gmem_to_smem(k(rows), k_smem.at[slot], fetched[0].at[slot])
                plgpu.copy_gmem_to_smem(v(rows), v_smem.at[slot], fetched[1].at[slot])

        shared = shared_k_ref, shared_v_ref
        _of_head(head, hard, heads_per_group, (k_ref, v_ref), shared, fetch_from)

    @pl.when(warpgroup < WARPGROUPS)
    def compute():
        plgpu.set_max_registers(240, action="increase")
        q_start = (tile * WARPGROUPS + warpgroup) * blocks.q
        rows = pl.ds(q_start, blocks.q)
        own_q, own_d_out = q_smem.at[warpgroup], d_out_smem.at[warpgroup]
        own_numbers = logsumexp_smem.at[warpgroup], delta_smem.at[warpgroup]
        sources = (
            (q_ref.at[batch, rows, head], own_q),
            (d_out_ref.at[batch, rows, head], own_d_out),
            (logsumexp_ref.at[batch, head, rows], own_numbers[0]),
            (delta_ref.at[batch, head, rows], own_numbers[1]),
        )
        for source, target in sources:
            plgpu.copy_gmem_to_smem(source, target, q_fetched.at[warpgroup])
        plgpu.barrier_wait(q_fetched.at[warpgroup])
        logsumexp, delta = (
            plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1)) for ref in own_numbers
        )
        position = position_ref[batch]
        staging = None if staging_smem is None else staging_smem.at[warpgroup]
        shape = (blocks.q, kv)

        def over_keys(d_q_acc):
            def step(i, masked: bool):
                slot = lax.rem(i, jnp.int32(blocks.stages))
                plgpu.barrier_wait(fetched[0].at[slot])
                logits, counts = _product(own_q, k_smem.at[slot]), None
                if masked:
                    counts = visible(
                        shape,
                        q_axis=0,
                        batch=batch,
                        q_start=q_start,
                        kv_start=(first + i) * kv,
                        position=position,
                        causal=causal,
                        kv_len=kv_len,
                        kv_ragged=kv_len % kv != 0,
                        q_segment_ref=q_segment_ref,
                        kv_segment_ref=kv_segment_ref,
                    )
                weights = _probabilities(logits, logsumexp, axis=0, scale=scale, counts=counts)
                plgpu.barrier_wait(fetched[1].at[slot])
                d_weights = _product(own_d_out, v_smem.at[slot])
                d_logits = weights * (d_weights - lax.broadcast_in_dim(delta, shape, [0]))
                add_product(d_q_acc, d_logits.astype(dtype), k_smem.at[slot], staging)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(consumed.at[slot])

            whole = steps
            if kv_len % kv:
                whole = jnp.minimum(whole, kv_len // kv - first)
            if causal:
                seen = lax.div(jnp.maximum(q_start + position + 1, 0), jnp.int32(kv))
                whole = jnp.minimum(whole, seen - first)
            whole = jnp.int32(0) if q_segment_ref is not None else jnp.maximum(whole, 0)
            if q_segment_ref is None:
                pl.loop(0, whole)(functools.partial(step, masked=False))
            if causal or q_segment_ref is not None or kv_len % kv:
                pl.loop(whole, steps)(functools.partial(step, masked=True))
            return d_q_acc[...]

        d_q = pl.run_scoped(over_keys, plgpu.ACC((blocks.q, q_ref.shape[-1]), jnp.float32))
        own_q[...] = (d_q * scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_q, d_q_ref.at[batch, rows, head])
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
    position_ref,
    q_segment_ref,
    kv_segment_ref,
    d_k_ref,
    d_v_ref,
    buffers,
    kv_fetched,
    fetched,
    consumed,
    *,
    heads_per_group: int,
    hard: int,
    causal: bool,
    scale: float,
    kv_len: int,
    blocks: BlockSizes,
):
    head, batch = lax.axis_index("head"), lax.axis_index("batch")
    tile, warpgroup = lax.axis_index("tile"), lax.axis_index("warpgroup")
    k_smem, v_smem, q_smem, d_out_smem, logsumexp_smem, delta_smem, staging_smem = buffers
    dtype, head_dim = q_ref.dtype, q_ref.shape[-1]
    first, end = table_ref[batch, tile, 0], table_ref[batch, tile, 1]
    steps, q, kv = end - first, blocks.backward_q, blocks.backward_kv

    @pl.when(warpgroup == WARPGROUPS)
    def fetch():
        plgpu.set_max_registers(24, action="decrease")

        @pl.loop(0, steps)
        def step(i):
            slot = lax.rem(i, jnp.int32(blocks.stages))
            rows = pl.ds((first + i) * q, q)
            pl.when(i >= blocks.stages)(lambda: plgpu.barrier_wait(consumed.at[slot]))
            sources = (
                (q_ref.at[batch, rows, head], q_smem),
                (d_out_ref.at[batch, rows, head], d_out_smem),
                (logsumexp_ref.at[batch, head, rows], logsumexp_smem),
                (delta_ref.at[batch, head, rows], delta_smem),
            )
            for source, target in sources:
                plgpu.copy_gmem_to_smem(source, target.at[slot], fetched.at[slot])

    @pl.when(warpgroup < WARPGROUPS)
    def compute():
        plgpu.set_max_registers(240, action="increase")
        kv_start = (tile * WARPGROUPS + warpgroup) * kv
        rows = pl.ds(kv_start, kv)
        own_k, own_v = k_smem.at[warpgroup], v_smem.at[warpgroup]

        def fetch_own(k, v):
            plgpu.copy_gmem_to_smem(k(rows), own_k, kv_fetched.at[warpgroup])
            plgpu.copy_gmem_to_smem(v(rows), own_v, kv_fetched.at[warpgroup])

        shared = shared_k_ref, shared_v_ref
        _of_head(head, hard, heads_per_group, (k_ref, v_ref), shared, fetch_own)
        plgpu.barrier_wait(kv_fetched.at[warpgroup])
        position = position_ref[batch]
        staging = None if staging_smem is None else staging_smem.at[warpgroup]
        shape = (kv, q)

        def over_queries(d_k_acc, d_v_acc):
            def step(i, masked: bool):
                slot = lax.rem(i, jnp.int32(blocks.stages))
                plgpu.barrier_wait(fetched.at[slot])
                logits, counts = _product(own_k, q_smem.at[slot]), None
                if masked:
                    counts = visible(
                        shape,
                        q_axis=1,
                        batch=batch,
                        q_start=(first + i) * q,
                        kv_start=kv_start,
                        position=position,
                        causal=causal,
                        kv_len=kv_len,
                        kv_ragged=kv_len % (WARPGROUPS * kv) != 0,
                        q_segment_ref=q_segment_ref,
                        kv_segment_ref=kv_segment_ref,
                    )

                def a_query(ref):
                    return plgpu.load(ref.at[slot], layout=plgpu.Layout.WGMMA.reduce(0))

                logsumexp = a_query(logsumexp_smem)
                weights = _probabilities(logits, logsumexp, axis=1, scale=scale, counts=counts)
                # Kept as they are multiplied: beside the two sums, registers are few.
                weights = weights.astype(dtype)
                add_product(d_v_acc, weights, d_out_smem.at[slot], staging)
                d_weights = _product(own_v, d_out_smem.at[slot])
                d_weights -= lax.broadcast_in_dim(a_query(delta_smem), shape, [1])
                if staging is not None:
                    weights = plgpu.load(staging, layout=plgpu.Layout.WGMMA)
                d_logits = weights.astype(jnp.float32) * d_weights
                add_product(d_k_acc, d_logits.astype(dtype), q_smem.at[slot], staging)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(consumed.at[slot])

            # The first blocks of queries may see a part of the keys, those behind them see all.
            needs_mask = causal or q_segment_ref is not None or kv_len % (WARPGROUPS * kv) != 0
            # At head_dim 128 a second loop, without a mask, would spill registers.
            all_masked = q_segment_ref is not None or (needs_mask and head_dim > 64)
            partly = steps
            if not all_masked:
                partly = jnp.int32(0)
                if causal:
                    beyond = jnp.maximum(kv_start + kv - 1 - position + q - 1, 0)
                    partly = jnp.clip(lax.div(beyond, jnp.int32(q)) - first, 0, steps)
                if kv_len % (WARPGROUPS * kv):
                    partly = jnp.where(kv_start + kv > kv_len, steps, partly)
            if needs_mask:
                pl.loop(0, partly)(functools.partial(step, masked=True))
            if not all_masked:
                pl.loop(partly, steps)(functools.partial(step, masked=False))
            own_k[...] = (d_k_acc[...] * scale).astype(dtype)
            own_v[...] = d_v_acc[...].astype(dtype)

        accumulator = plgpu.ACC((kv, head_dim), jnp.float32)
        pl.run_scoped(over_queries, accumulator, accumulator)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_k, d_k_ref.at[batch, rows, head])
        plgpu.copy_smem_to_gmem(own_v, d_v_ref.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)


def backward(
    query,
    key,
    value,
    shared_key,
    shared_value,
    masking: Masking,
    logsumexp,
    delta,
    d_out,
    *,
    heads_per_group: int,
    causal: bool,
    scale: float,
    lengths: tuple[int, int],
    blocks: BlockSizes,
):
    """Gradients of the queries, and of what each head reads: [batch, kv_len, head, head_dim].

    Args:
      logsumexp, delta: of each head and query, [batch, head, q_len]; delta is the output times its
        gradient.
      d_out: the output's gradient; the others as in `forward`.
    """
    batch, q_len, heads, head_dim = query.shape
    kv_len, dtype = key.shape[1], query.dtype
    q_tile, kv_tile = WARPGROUPS * blocks.q, WARPGROUPS * blocks.backward_kv
    static = {
        "heads_per_group": heads_per_group,
        "hard": heads - (shared_key is not None),
        "causal": causal,
        "scale": scale,
        "kv_len": lengths[1],
        "blocks": blocks,
    }
    mask = {"causal": causal, "lengths": lengths}
    of_q = visited(masking, rows=(q_tile, blocks.backward_kv), outer="q", **mask)
    of_kv = visited(masking, rows=(blocks.backward_q, kv_tile), outer="kv", **mask)
    operands = query, key, value, shared_key, shared_value, d_out, logsumexp, delta

    def rows(number, size):
        return plgpu.SMEM((number, size, head_dim), dtype, transforms=TRANSFORMS)

    def numbers(number, size):
        return plgpu.SMEM((number, size), jnp.float32)

    def staging(size, width, needed=False):
        shape = (WARPGROUPS, size, width)
        return plgpu.SMEM(shape, dtype, transforms=TRANSFORMS) if needed or blocks.staged else None

    def kernel(body, name, out_type, tiles, scratch):
        return plgpu.kernel(
            functools.partial(body, **static),
            out_type=out_type,
            grid=(heads, tiles, batch),
            grid_names=("head", "tile", "batch"),
            num_threads=WARPGROUPS + 1,
            thread_name="warpgroup",
            scratch_types=scratch,
            compiler_params=plgpu.CompilerParams(approx_math=True),
            kernel_name=name,
        )

    def fetched(copies, number):
        return plgpu.Barrier(num_arrivals=copies, num_barriers=number)

    consumed = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=blocks.stages)
    own = [rows(WARPGROUPS, blocks.q)] * 2 + [numbers(WARPGROUPS, blocks.q)] * 2
    of_keys = [rows(blocks.stages, blocks.backward_kv)] * 2
    d_query = kernel(
        _d_query_kernel,
        "gqe_backward_queries",
        jax.ShapeDtypeStruct(query.shape, dtype),
        q_len // q_tile,
        (
            (*own, *of_keys, staging(blocks.q, blocks.backward_kv)),
            fetched(4, WARPGROUPS),
            (fetched(1, blocks.stages),) * 2,
            consumed,
        ),
    )(*operands, of_q, masking.position, *masking[1:])
    own = [rows(WARPGROUPS, blocks.backward_kv)] * 2
    of_queries = [rows(blocks.stages, blocks.backward_q)] * 2
    of_queries += [numbers(blocks.stages, blocks.backward_q)] * 2
    of_read = jax.ShapeDtypeStruct((batch, kv_len, heads, head_dim), dtype)
    d_key, d_value = kernel(
        _d_key_kernel,
        "gqe_backward_keys",
        (of_read, of_read),
        kv_len // kv_tile,
        (
            (*own, *of_queries, staging(blocks.backward_kv, blocks.backward_q, head_dim > 64)),
            fetched(2, WARPGROUPS),
            fetched(4, blocks.stages),
            consumed,
        ),
    )(*operands, of_kv, masking.position, *masking[1:])
    return d_query, d_key, d_value
