"""Routed attention on TPU: the operands laid flat for the kernels, and the kernels' vjp."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gqe_kernels.contract import Mask, Routed, Slots
from gqe_kernels.derivatives import without_derivative
from gqe_kernels.guard import guarded
from gqe_kernels.pallas_tpu.backward import backward
from gqe_kernels.pallas_tpu.blocks import BlockSizes, default_block_sizes
from gqe_kernels.pallas_tpu.cost import visible_pairs
from gqe_kernels.pallas_tpu.forward import forward
from gqe_kernels.pallas_tpu.layout import LANES, Flat, Layout, flatten, unflatten_slots
from gqe_kernels.pallas_tpu.prepare import prepare
from gqe_kernels.pallas_tpu.schedule import visits
from gqe_kernels.pallas_tpu.tile import Tiles
from gqe_kernels.remat import ATTENTION_OPERANDS, ATTENTION_OUTPUT, kept


class _Static(NamedTuple):
    layout: Layout
    scale: float
    blocks: BlockSizes


def unsupported(routed: Routed, mask: Mask) -> str | None:
    """The argument that the kernels cannot take, with the reason; None if they take them all."""
    query, q_len = routed.query, routed.query.shape[1]
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"query: dtype {query.dtype}, where bfloat16 or float32 is needed"
    if query.shape[-1] % 64:
        return f"query: head_dim {query.shape[-1]}, where a multiple of 64 is needed"
    if mask.pieces > 1 and q_len // mask.pieces % LANES:
        rows = q_len // mask.pieces
        return f"q_offset: pieces of {rows} queries, where a multiple of {LANES} is needed"
    if _default_blocks(Layout.of(routed), routed, mask) is None:
        return f"query: shape {query.shape}, of which no block fits in VMEM"
    return None


def _default_blocks(layout: Layout, routed: Routed, mask: Mask) -> BlockSizes | None:
    query, key = routed.query, routed.key
    lengths = query.shape[1], key.shape[1]
    return default_block_sizes(layout, *lengths, query.dtype.itemsize, pieces=mask.pieces)


@guarded
def attention(
    routed: Routed, mask: Mask, scale: float, *, blocks: BlockSizes | None = None
) -> Slots:
    """The slots, by the kernels.

    Args:
      blocks: None: those of `default_block_sizes`.

    Raises:
      NotImplementedError: names the argument that the kernels do not take.
    """
    reason = unsupported(routed, mask)
    if reason is not None:
        raise NotImplementedError(f"implementation='pallas_tpu' does not take {reason}")
    layout = Layout.of(routed)
    blocks = blocks or _default_blocks(layout, routed, mask)
    assert blocks is not None  # or the shape would be unsupported
    int32 = lambda ids: ids.astype(jnp.int32)  # noqa: E731
    mask = mask.map_queries(int32).map_keys(int32)
    kernels = functools.partial(_attention, _Static(layout, scale, blocks))
    kernels = without_derivative("forward-mode derivative", "pallas_tpu", kernels)
    slots = kernels(flatten(layout, routed), mask)
    return unflatten_slots(layout, slots, routed.query.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, flat: Flat, mask: Mask):
    return _attention_forward(static, flat, mask)[0]


@jax.enable_x64(False)  # Mosaic has no 64-bit integers
def _attention_forward(static: _Static, flat: Flat, mask: Mask):
    run = functools.partial(forward, **static._asdict())
    run = without_derivative("derivative of its gradient", "pallas_tpu", run)
    slots, logsumexp = kept(run(flat, mask), ATTENTION_OUTPUT)
    return slots, (checkpoint_name(flat, ATTENTION_OPERANDS), mask, slots, logsumexp)


@jax.enable_x64(False)
def _attention_backward(static: _Static, residuals, d_slots):
    gradients = functools.partial(_gradients, static)
    gradients = without_derivative("derivative of its gradient", "pallas_tpu", gradients)
    return gradients(residuals, d_slots), None


def _gradients(static: _Static, residuals, d_slots):
    flat, mask, slots, logsumexp = residuals
    layout, scale, blocks = static
    tiles = Tiles.of(blocks.backward_q, blocks.backward_kv, flat, mask)
    selected, d_out, delta, d_weight = prepare(
        flat, slots, d_slots, layout=layout, scale=scale, q=tiles.q, vmem_bytes=blocks.vmem_bytes
    )
    beyond = tiles.num_q * tiles.q - logsumexp.shape[2]
    if beyond > 0:
        logsumexp = jnp.pad(logsumexp, ((0, 0), (0, 0), (0, beyond)))
    launches, num_q = blocks.backward_launches(layout, tiles.num_q)
    d_query, d_shared_query, d_keys = backward(
        flat,
        mask,
        visits(mask, tiles, len(flat.query), outer="kv"),
        selected,
        d_out,
        logsumexp,
        delta,
        layout=layout,
        tiles=tiles,
        pairs=visible_pairs(tiles.q_len, tiles.kv_len, mask),
        scale=scale,
        vmem_bytes=blocks.vmem_bytes,
        launches=launches,
        num_q=num_q,
    )
    return Flat(
        query=d_query,
        key=d_keys.key,
        value=d_keys.value,
        expert_index=None,
        slot_weight=d_weight,
        shared_query=d_shared_query,
        shared_key=d_keys.shared_key,
        shared_value=d_keys.shared_value,
    )


_attention.defvjp(_attention_forward, _attention_backward)
