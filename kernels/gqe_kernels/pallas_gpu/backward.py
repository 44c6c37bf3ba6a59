"""The backward pass: one kernel finds dQ, one dK and dV.

Both compute the probabilities anew, from the logsumexp of the forward pass.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from gqe_kernels.contract import Mask
from gqe_kernels.pallas_gpu.blocks import SLOTS, WARPGROUPS, BlockSizes
from gqe_kernels.pallas_gpu.d_key import d_key_kernel
from gqe_kernels.pallas_gpu.d_query import d_query_kernel
from gqe_kernels.pallas_gpu.heads import ByHead, Heads
from gqe_kernels.pallas_gpu.items import Items, launch, multiprocessors
from gqe_kernels.pallas_gpu.tables import Tables
from gqe_kernels.pallas_gpu.tile import TRANSFORMS


def backward(
    selected: Float[Array, "batch q_len head head_dim"],
    operands: ByHead,
    mask: Mask,
    tables: Tables,
    logsumexp: Float[Array, "batch head q_len"],
    delta: Float[Array, "batch slot q_len"],
    d_out: Float[Array, "batch q_len slot head_dim"],
    *,
    heads: Heads,
    scale: float,
    lengths: tuple[int, int],
    blocks: BlockSizes,
):
    """Gradients of each head's queries, and of the keys and values that each head reads.

    Args:
      selected: the queries of every head.
      operands: their keys and values.
      logsumexp: in base 2.
      delta: the sum over head_dim of each slot times its gradient.
      d_out: the gradient of the slots.

    Returns:
      d_query [batch, q_len, head, head_dim]; d_key, d_value [batch, kv_len, head, head_dim].
    """
    batch, q_len, _, head_dim = selected.shape
    kv_len, dtype = operands.key.shape[1], selected.dtype
    q_tile, kv_tile = WARPGROUPS * blocks.q, WARPGROUPS * blocks.backward_kv
    static = {
        "heads": heads,
        "scale": scale,
        "kv_len": lengths[1],
        "blocks": blocks,
    }
    read = operands.key, operands.value, operands.shared_key, operands.shared_value
    inputs = selected, *read, d_out, logsumexp, delta

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
        jax.ShapeDtypeStruct(selected.shape, dtype),
        q_len // q_tile,
        True,  # where causal, the last queries see the most keys
        (
            *(rows(*own), rows(*own), numbers(*own), numbers(*own)),
            *(rows(*of_keys), rows(*of_keys)),
            staging(blocks.q, blocks.backward_kv),
        ),
        (fetched(4 * WARPGROUPS, SLOTS), fetched(1, blocks.stages), fetched(1, blocks.stages)),
    )(*inputs, tables.d_query, mask)
    own = (SLOTS, WARPGROUPS, blocks.backward_kv)
    of_queries = (blocks.stages, blocks.backward_q)
    of_read = jax.ShapeDtypeStruct((batch, kv_len, heads.number, head_dim), dtype)
    d_key, d_value = kernel(
        d_key_kernel,
        "gqe_backward_keys",
        (of_read, of_read),
        kv_len // kv_tile,
        False,  # where causal, the most queries see the first keys
        (
            *(rows(*own), rows(*own)),
            *(rows(*of_queries), rows(*of_queries), numbers(*of_queries), numbers(*of_queries)),
            staging(blocks.backward_kv, blocks.backward_q),
        ),
        (fetched(2 * WARPGROUPS, SLOTS), fetched(4, blocks.stages)),
    )(*inputs, tables.d_key, mask)
    return d_query, d_key, d_value
