"""The backward pass: one kernel finds dQ, one dK and dV.

Both compute the probabilities anew, from the logsumexp of the forward pass.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from gqe_kernels.pallas_gpu.blocks import SLOTS, WARPGROUPS, BlockSizes
from gqe_kernels.pallas_gpu.d_key import d_key_kernel
from gqe_kernels.pallas_gpu.d_query import d_query_kernel
from gqe_kernels.pallas_gpu.heads import Heads
from gqe_kernels.pallas_gpu.items import Items, launch, multiprocessors
from gqe_kernels.pallas_gpu.tables import Masking, Tables
from gqe_kernels.pallas_gpu.tile import TRANSFORMS


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
        return launch(
            functools.partial(body, **static),
            items,
            name=name,
            out_type=out_type,
            scratch_types=(buffers, fetched, consumed),
        )

    def fetched(copies, number):
        return plgpu.Barrier(num_arrivals=copies, num_barriers=number)

    own = (SLOTS, WARPGROUPS, blocks.q)
    of_keys = (blocks.stages, blocks.backward_kv)
    d_query = kernel(
        d_query_kernel,
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
        d_key_kernel,
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
