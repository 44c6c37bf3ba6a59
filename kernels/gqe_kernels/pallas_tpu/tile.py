"""What the forward and the backward kernel share: products and masks of a tile of logits."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gqe_kernels.pallas_tpu.layout import MASKED
from gqe_kernels.pallas_tpu.schedule import Tiles, Visits

NT = (((1,), (1,)), ((), ()))  # x @ y.T
NN = (((1,), (0,)), ((), ()))  # x @ y


def dot(x: jax.Array, y: jax.Array, dimensions) -> jax.Array:
    """Float32 result; float32 operands are not rounded to bfloat16."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, y, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def runs(tiles: Tiles, visits: Visits, b, i, j, outer, inner) -> jax.Array:
    """Whether some query of block i can see some key of block j."""
    run = (visits.first[b, outer] <= inner) & (inner <= visits.last[b, outer])
    if visits.q is not None and visits.kv is not None:
        run &= visits.q.low[b, i] <= visits.kv.high[b, j]
        run &= visits.kv.low[b, j] <= visits.q.high[b, i]
    return run


def is_interior(tiles: Tiles, visits: Visits, b, i, j) -> jax.Array:
    """Whether every query of block i sees every key of block j."""
    interior = jnp.bool_(True)
    if tiles.causal:
        interior &= (j + 1) * tiles.kv - 1 <= visits.position[b, i]
    if tiles.kv_ragged:
        interior &= j < tiles.num_kv - 1
    if visits.q is not None and visits.kv is not None:
        segment = visits.q.high[b, i]
        for other in (visits.q.lowest[b, i], visits.kv.lowest[b, j], visits.kv.high[b, j]):
            interior &= segment == other
    return interior


def mask_bias(tiles: Tiles, visits: Visits, b, i, j, q_segment, kv_segment, kv_axis: int):
    """Zero where the query sees the key, MASKED where it does not: float32, added to the logits.

    Args:
      q_segment, kv_segment: that broadcast to the tile, or None.
      kv_axis: 1 for a tile [q, kv], 0 for [kv, q].
    """
    shape = (tiles.q, tiles.kv) if kv_axis == 1 else (tiles.kv, tiles.q)
    key = lax.broadcasted_iota(jnp.int32, shape, kv_axis)
    visible: Any = None
    if tiles.causal:
        query = lax.broadcasted_iota(jnp.int32, shape, 1 - kv_axis)
        visible = key - query <= visits.position[b, i] - j * tiles.kv
    if tiles.kv_ragged:
        exists = key < tiles.kv_len - j * tiles.kv
        visible = exists if visible is None else visible & exists
    if tiles.segments:
        same = (q_segment == kv_segment) & (q_segment != 0)
        visible = same if visible is None else visible & same
    return jnp.where(visible, 0.0, MASKED)


def zero_beyond(x: jax.Array, start, length: int) -> jax.Array:
    """Rows start + r >= length of an edge block hold anything, NaN too: make them zero."""
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row < length - start, x, jnp.zeros_like(x))
