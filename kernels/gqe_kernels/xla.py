"""Attention in memory linear in the length, on any platform: blocks under `lax`, online softmax.

The forward pass keeps each row's logsumexp; the backward pass recomputes the probabilities from it.
Blocks wholly above the diagonal are not visited.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gqe_kernels import reference
from gqe_kernels.contract import Mask, Routed, Slots
from gqe_kernels.derivatives import without_derivative
from gqe_kernels.guard import guarded
from gqe_kernels.reference import Heads, Keys
from gqe_kernels.remat import ATTENTION_OPERANDS, ATTENTION_OUTPUT
from gqe_kernels.varying import vary_over, varying_axes

MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class XlaBlocks:
    """Rows of queries and of keys in one tile of logits."""

    q: int = 512
    kv: int = 512


class _Tiling(NamedTuple):
    scale: float
    blocks: XlaBlocks
    kv_len: int  # keys before padding


@guarded
def attention(
    routed: Routed, mask: Mask, scale: float, *, blocks: XlaBlocks = XlaBlocks()
) -> Slots:
    """The slots, in memory linear in the length."""
    in_blocks = functools.partial(attend, blocks=blocks)
    return reference.attention(routed, mask, scale, attend=in_blocks)


def attend(
    query: Heads, key: Keys, value: Keys, mask: Mask, scale: float, *, blocks: XlaBlocks
) -> Heads:
    """Softmax attention with operands in their own dtype, and float32 softmax and accumulation."""
    q_len, kv_len = query.shape[1], key.shape[1]
    blocks = XlaBlocks(min(blocks.q, q_len), min(blocks.kv, kv_len))
    pad_q = functools.partial(reference.pad_rows, rows=-q_len % blocks.q)
    pad_kv = functools.partial(reference.pad_rows, rows=-kv_len % blocks.kv)
    flash = functools.partial(_flash, _Tiling(scale, blocks, kv_len))
    out = without_derivative("forward-mode derivative", "xla", flash)(
        jnp.transpose(pad_q(query), (0, 2, 3, 1, 4)),
        jnp.transpose(pad_kv(key), (0, 2, 1, 3)),
        jnp.transpose(pad_kv(value), (0, 2, 1, 3)),
        mask.map_queries(pad_q).map_keys(pad_kv),
    )
    return jnp.transpose(out, (0, 3, 1, 2, 4))[:, :q_len]


# Inside, heads stand before length: query [batch, group, head, q_len, head_dim], key and value
# [batch, group, kv_len, head_dim], logsumexp [batch, group, head, q_len].


def _block(x, index, size, axis):
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _positions(tiling, mask, i):
    """The positions among the keys of the queries of block i: [1 or batch, q]."""
    in_block = i * tiling.blocks.q + jnp.arange(tiling.blocks.q, dtype=jnp.int32)
    return mask.offsets + in_block


def _visible(tiling, mask, i, j, padded_kv_len):
    """Mask of tile (i, j), broadcastable to [batch, group, head, q, kv]; None: all is visible."""
    kv_index = j * tiling.blocks.kv + jnp.arange(tiling.blocks.kv, dtype=jnp.int32)
    tests = []
    if mask.causal:
        tests.append(kv_index <= _positions(tiling, mask, i)[:, :, None])
    if mask.q_segment_ids is not None:
        q_segment = _block(mask.q_segment_ids, i, tiling.blocks.q, 1)[:, :, None]
        kv_segment = _block(mask.kv_segment_ids, j, tiling.blocks.kv, 1)[:, None, :]
        tests.append((q_segment == kv_segment) & (q_segment != 0))
    if padded_kv_len != tiling.kv_len:
        tests.append((kv_index < tiling.kv_len)[None, None])
    return functools.reduce(jnp.logical_and, tests)[:, None, None] if tests else None


def _logits(tiling, query, key, visible):
    logits = tiling.scale * jnp.einsum(
        "bghqd,bgkd->bghqk", query, key, preferred_element_type=jnp.float32
    )
    return logits if visible is None else jnp.where(visible, logits, MASKED)


def _probabilities(logits, row, visible):
    """exp(logits - row), zero where masked: a row that sees nothing must not become uniform."""
    weights = jnp.exp(logits - row[..., None])
    return weights if visible is None else jnp.where(visible, weights, 0.0)


def _last_kv_block(tiling, mask, i, num_kv):
    """One past the last block of keys that some row of query block i sees."""
    if not mask.causal or num_kv == 1:
        return num_kv
    position = jnp.max(_positions(tiling, mask, i))
    return jnp.clip(position // tiling.blocks.kv + 1, 0, num_kv)


def _first_q_block(tiling, mask, j, num_q):
    """The first block of queries in which some row sees key block j."""
    if not mask.causal or num_q == 1:
        return 0
    offset = jnp.max(_positions(tiling, mask, 0)[:, 0])
    return jnp.clip((j * tiling.blocks.kv - offset) // tiling.blocks.q, 0, num_q)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(tiling, query, key, value, mask):
    return _flash_forward(tiling, query, key, value, mask)[0]


def _flash_forward(tiling, query, key, value, mask):
    size = tiling.blocks
    num_q, num_kv = query.shape[3] // size.q, key.shape[2] // size.kv
    axes = varying_axes(query)

    def row_of_blocks(i):
        query_i = _block(query, i, size.q, 3)

        def tile(j, carry):
            acc, row_max, row_sum = carry
            visible = _visible(tiling, mask, i, j, key.shape[2])
            logits = _logits(tiling, query_i, _block(key, j, size.kv, 2), visible)
            new_max = jnp.maximum(row_max, jnp.max(logits, axis=-1))
            weights = _probabilities(logits, new_max, visible)
            rescale = jnp.exp(row_max - new_max)
            value_j = _block(value, j, size.kv, 2)
            acc = acc * rescale[..., None] + jnp.einsum(
                "bghqk,bgkd->bghqd",
                weights.astype(value.dtype),
                value_j,
                preferred_element_type=jnp.float32,
            )
            return acc, new_max, row_sum * rescale + jnp.sum(weights, axis=-1)

        rows = query_i.shape[:-1]
        start = (
            jnp.zeros(query_i.shape, jnp.float32),
            jnp.full(rows, MASKED, jnp.float32),
            jnp.zeros(rows, jnp.float32),
        )
        start = tuple(vary_over(x, axes) for x in start)
        last = _last_kv_block(tiling, mask, i, num_kv)
        acc, row_max, row_sum = lax.fori_loop(0, last, tile, start)
        out = acc / jnp.where(row_sum > 0, row_sum, 1.0)[..., None]
        # A row that saw nothing gets a logsumexp that makes every probability of it zero.
        logsumexp = jnp.where(row_sum > 0, row_max + jnp.log(jnp.maximum(row_sum, 1e-37)), -MASKED)
        return out.astype(query.dtype), logsumexp

    out, logsumexp = lax.map(row_of_blocks, jnp.arange(num_q))
    out = jnp.moveaxis(out, 0, 3).reshape(query.shape)
    logsumexp = jnp.moveaxis(logsumexp, 0, 3).reshape(query.shape[:-1])
    # Not by its bits: this gradient has a derivative.
    out, logsumexp = (checkpoint_name(x, ATTENTION_OUTPUT) for x in (out, logsumexp))
    operands = checkpoint_name((query, key, value), ATTENTION_OPERANDS)
    return out, (*operands, mask, out, logsumexp)


def _flash_backward(tiling, residuals, d_out):
    gradients = functools.partial(_gradients, tiling)
    gradients = without_derivative("gradient of its gradient", "xla", gradients)
    return *gradients(residuals, d_out), None


def _gradients(tiling, residuals, d_out):
    query, key, value, mask, out, logsumexp = residuals
    size = tiling.blocks
    num_q, num_kv = query.shape[3] // size.q, key.shape[2] // size.kv
    axes = varying_axes(query)
    # Row sums of probability × its gradient, by the identity sum_k p dp = out · d_out.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)

    def column_of_blocks(d_query, j):
        key_j, value_j = _block(key, j, size.kv, 2), _block(value, j, size.kv, 2)

        def tile(i, carry):
            d_query, d_key_j, d_value_j = carry
            query_i, d_out_i = _block(query, i, size.q, 3), _block(d_out, i, size.q, 3)
            visible = _visible(tiling, mask, i, j, key.shape[2])
            logits = _logits(tiling, query_i, key_j, visible)
            weights = _probabilities(logits, _block(logsumexp, i, size.q, 3), visible)
            d_weights = jnp.einsum(
                "bghqd,bgkd->bghqk", d_out_i, value_j, preferred_element_type=jnp.float32
            )
            d_logits = weights * (d_weights - _block(delta, i, size.q, 3)[..., None])
            d_logits = (tiling.scale * d_logits).astype(key.dtype)
            d_value_j += jnp.einsum(
                "bghqk,bghqd->bgkd",
                weights.astype(d_out.dtype),
                d_out_i,
                preferred_element_type=jnp.float32,
            )
            d_key_j += jnp.einsum(
                "bghqk,bghqd->bgkd", d_logits, query_i, preferred_element_type=jnp.float32
            )
            d_query_i = _block(d_query, i, size.q, 3) + jnp.einsum(
                "bghqk,bgkd->bghqd", d_logits, key_j, preferred_element_type=jnp.float32
            )
            d_query = lax.dynamic_update_slice_in_dim(d_query, d_query_i, i * size.q, 3)
            return d_query, d_key_j, d_value_j

        zeros = vary_over(jnp.zeros(key_j.shape, jnp.float32), axes)
        first = _first_q_block(tiling, mask, j, num_q)
        d_query, d_key_j, d_value_j = lax.fori_loop(first, num_q, tile, (d_query, zeros, zeros))
        return d_query, (d_key_j.astype(key.dtype), d_value_j.astype(value.dtype))

    start = vary_over(jnp.zeros(query.shape, jnp.float32), axes)
    d_query, (d_key, d_value) = lax.scan(column_of_blocks, start, jnp.arange(num_kv))
    d_key, d_value = (jnp.moveaxis(x, 0, 2).reshape(key.shape) for x in (d_key, d_value))
    return d_query.astype(query.dtype), d_key, d_value


_flash.defvjp(_flash_forward, _flash_backward)
