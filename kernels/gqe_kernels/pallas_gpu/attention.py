"""Routed attention on Hopper GPUs: the operands of the kernels, and the kernels' vjp.

The forward kernel selects the experts where the queries of all experts of a tile fit in shared
memory. Otherwise, and for the gradients, XLA selects; it also computes the mean over groups and the
weighted slot.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from gqe_kernels.contract import Mask, Routed, Slots, split_pieces
from gqe_kernels.derivatives import without_derivative
from gqe_kernels.guard import guarded
from gqe_kernels.pallas_gpu.backward import backward
from gqe_kernels.pallas_gpu.blocks import DEFAULTS, WARPGROUPS, BlockSizes
from gqe_kernels.pallas_gpu.forward import forward
from gqe_kernels.pallas_gpu.heads import ByHead, Heads
from gqe_kernels.pallas_gpu.tables import Tables, tables
from gqe_kernels.reference import pad_rows, select_experts, shared_operands
from gqe_kernels.remat import ATTENTION_OPERANDS, ATTENTION_OUTPUT, kept
from gqe_kernels.varying import varying_axes


class _Static(NamedTuple):
    heads: Heads
    scale: float
    lengths: tuple[int, int]
    blocks: BlockSizes


def unsupported(
    routed: Routed, mask: Mask, scale: float = 1.0, *, device: jax.Device | None = None
) -> str | None:
    """The argument that the kernels cannot take, with the reason; None if they take them all.

    Args:
      device: the device that runs them; None: the first of this process.
    """
    query = routed.query
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"query: dtype {query.dtype}, where bfloat16 or float16 is needed"
    if query.shape[-1] not in DEFAULTS:
        return (
            f"query: head_dim {query.shape[-1]}, where {' or '.join(map(str, DEFAULTS))} is needed"
        )
    if not scale > 0:
        return f"scale: {scale}, where a positive number is needed"
    if any(varying_axes(x) for x in jax.tree.leaves((routed, mask))):
        return "operands that vary over mesh axes: only in a jax.shard_map with check_vma=False"
    device = jax.devices()[0] if device is None else device
    if device.platform == "gpu" and device.compute_capability != "9.0":
        return f"the GPU here: compute capability {device.compute_capability}, where 9.0 is needed"
    return None


@guarded
def attention(
    routed: Routed, mask: Mask, scale: float, *, blocks: BlockSizes | None = None
) -> Slots:
    """The slots, by the kernels.

    Args:
      blocks: None: the defaults of the head_dim.

    Raises:
      NotImplementedError: names the argument that the kernels do not take.
    """
    reason = unsupported(routed, mask, scale)
    if reason is not None:
        raise NotImplementedError(f"implementation='pallas_gpu' does not take {reason}")
    if mask.pieces > 1:
        pieces = (attention(*piece, scale, blocks=blocks) for piece in split_pieces(routed, mask))
        return jnp.concatenate(list(pieces), axis=1)
    (batch, q_len, *_, head_dim), kv_len = routed.query.shape, routed.key.shape[1]
    blocks = blocks or DEFAULTS[head_dim]
    heads, operands = _by_head(routed, blocks)
    pad_q = functools.partial(pad_rows, rows=-q_len % max(WARPGROUPS * blocks.q, blocks.backward_q))
    pad_kv = functools.partial(
        pad_rows, rows=-kv_len % max(blocks.kv, WARPGROUPS * blocks.backward_kv)
    )
    operands = ByHead(
        query=pad_q(operands.query),
        key=pad_kv(operands.key),
        value=pad_kv(operands.value),
        expert_index=pad_q(operands.expert_index),
        shared_query=pad_q(operands.shared_query),
        shared_key=pad_kv(operands.shared_key),
        shared_value=pad_kv(operands.shared_value),
    )
    mask = mask.map_queries(lambda ids: pad_q(ids.astype(jnp.int32)))
    mask = mask.map_keys(lambda ids: pad_kv(ids.astype(jnp.int32)))
    static = _Static(heads, scale, (q_len, kv_len), blocks)
    visited = tables(mask, batch, lengths=static.lengths, blocks=blocks)
    kernels = without_derivative(
        "forward-mode derivative", "pallas_gpu", functools.partial(_attention, static)
    )
    slots = kernels(operands, dataclasses.replace(mask, offset=None), visited)
    return _with_weighted_slot(routed, heads, slots[:, :q_len])


def _by_head(routed: Routed, blocks: BlockSizes) -> tuple[Heads, ByHead]:
    """The heads of the launch and their operands, without padding."""
    batch, q_len, _, experts, head_dim = routed.query.shape
    shared_query, shared_key, shared_value = routed.shared_query, None, None
    if shared_query is not None:
        shared_key, shared_value = shared_operands(routed)
    heads = Heads(
        group=routed.query.shape[2],
        per_group=routed.top_k,
        shared=shared_query is not None,
        weighted=routed.slot_weight is not None,
    )
    query, index = routed.query, routed.expert_index
    if index is not None and 1 < experts <= blocks.most_experts(head_dim):
        heads = heads._replace(experts=experts)
        query = query.reshape(batch, q_len, -1, head_dim)
        index = index.reshape(batch, q_len, -1).astype(jnp.int32)
    else:
        query = select_experts(query, index).reshape(batch, q_len, -1, head_dim)
        if shared_query is not None:
            # XLA would make one loop of the concatenation and of what selects and rotates, twice
            # as long as both.
            query, shared_query = jax.lax.optimization_barrier((query, shared_query))
            query = jnp.concatenate([query, shared_query[:, :, None]], axis=2)
        index = shared_query = None
    return heads, ByHead(
        query, routed.key, routed.value, index, shared_query, shared_key, shared_value
    )


def _with_weighted_slot(routed: Routed, heads: Heads, slots: Slots) -> Slots:
    """The slots with the weighted one, which the kernels leave out, computed from the hard ones."""
    weight = routed.slot_weight
    if weight is None:
        return slots
    hard = slots[:, :, : heads.hard].reshape(*weight.shape, -1).astype(jnp.float32)
    weighted = jnp.sum(weight.astype(jnp.float32)[..., None] * hard, axis=(2, 3))
    weighted = weighted.astype(slots.dtype)[:, :, None]
    return jax.lax.dynamic_update_slice_in_dim(slots, weighted, heads.hard, axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@jax.enable_x64(False)  # the kernels' integers have 32 bits
def _attention(static: _Static, operands: ByHead, mask: Mask, visited: Tables):
    return forward(operands, mask, visited.forward, **static._asdict()).slots


@jax.enable_x64(False)
def _attention_forward(static: _Static, operands: ByHead, mask: Mask, visited: Tables):
    selects = operands.expert_index is not None
    run = functools.partial(forward, keep_selected=selects, **static._asdict())
    run = without_derivative("derivative of its gradient", "pallas_gpu", run)
    found = kept(run(operands, mask, visited.forward), ATTENTION_OUTPUT)
    if not selects:
        found = found._replace(selected=checkpoint_name(operands.query, ATTENTION_OPERANDS))
    unread: Any = None  # the selected queries stand for both
    operands = dataclasses.replace(operands, query=unread, shared_query=unread)
    operands = checkpoint_name(operands, ATTENTION_OPERANDS)
    return found.slots, (operands, mask, visited, found)


@jax.enable_x64(False)
def _attention_backward(static: _Static, residuals, d_slots):
    gradients = functools.partial(_gradients, static)
    gradients = without_derivative("derivative of its gradient", "pallas_gpu", gradients)
    return gradients(residuals, d_slots), None, None


def _gradients(static: _Static, residuals, d_slots):
    operands, mask, visited, found = residuals
    heads = static.heads
    delta = jnp.einsum(
        "bthd,bthd->bht", found.slots.astype(jnp.float32), d_slots.astype(jnp.float32)
    )
    d_query, d_key, d_value = backward(
        found.selected,
        operands,
        mask,
        visited,
        found.logsumexp,
        delta,
        d_slots,
        **static._asdict(),
    )

    def sum_in_groups(x):
        if heads.per_group == 1:
            return x[:, :, : heads.hard]
        parts = x[:, :, : heads.hard].reshape(*x.shape[:2], heads.group, heads.per_group, -1)
        return jnp.sum(parts.astype(jnp.float32), axis=3).astype(x.dtype)

    d_shared_query = None
    if operands.expert_index is not None:
        d_shared_query = d_query[:, :, heads.hard] if heads.shared else None
        d_query = _to_experts(d_query[:, :, : heads.hard], operands.expert_index, heads)
    return ByHead(
        query=d_query,
        key=sum_in_groups(d_key),
        value=sum_in_groups(d_value),
        expert_index=None,
        shared_query=d_shared_query,
        shared_key=d_key[:, :, heads.hard] if heads.shared else None,
        shared_value=d_value[:, :, heads.hard] if heads.shared else None,
    )


def _to_experts(
    d_selected: Float[Array, "batch q_len head head_dim"],
    index: Int[Array, "batch q_len head"],
    heads: Heads,
) -> Float[Array, "batch q_len expert head_dim"]:
    """The transpose of the selection: an expert that was not selected has no gradient."""
    batch, q_len, _, head_dim = d_selected.shape
    index = index.reshape(batch, q_len, heads.group, heads.per_group, 1)
    parts = d_selected.reshape(batch, q_len, heads.group, heads.per_group, 1, head_dim)
    chosen = index == jnp.arange(heads.experts)
    d_query = jnp.sum(jnp.where(chosen[..., None], parts, 0), axis=3)
    return d_query.reshape(batch, q_len, -1, head_dim)


_attention.defvjp(_attention_forward, _attention_backward)
