"""What the GPU kernels share: products and masks of a tile of logits."""

import functools
import operator
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

LOG2E = 1.4426950408889634
MASKED = -1e30
# Above every masked logit, times any scale: where nothing is seen, exp2 of the difference is zero.
NOTHING_SEEN = -1e24
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def add_product(acc_ref, left, right_ref, staging_ref) -> None:
    """Adds `left @ right` to an accumulator; `left` is in registers.

    Args:
      staging_ref: shared memory for `left`, which jax's interpreter cannot take from registers;
        None on a GPU.
    """
    if staging_ref is not None:
        staging_ref[...] = left
        plgpu.commit_smem()
        left = staging_ref
    plgpu.wgmma(acc_ref, left, right_ref)


def products(*pairs):
    """`left @ right.T`, float32, of pairs of blocks in shared memory; all are begun at once."""

    def compute(*accs):
        for acc, (left, right) in zip(accs, pairs, strict=True):
            plgpu.wgmma(acc, left, right.transpose((1, 0)))
        return [acc[...] for acc in accs]

    shapes = [(left.shape[0], right.shape[0]) for left, right in pairs]
    return pl.run_scoped(compute, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def probabilities(logits, logsumexp, *, axis: int, scale: float, seen):
    """The probabilities of a tile, from the logsumexp of its queries, which lie along `axis`."""
    exponent = logits * (scale * LOG2E) - lax.broadcast_in_dim(logsumexp, logits.shape, [axis])
    return jnp.exp2(exponent if seen is None else jnp.where(seen, exponent, MASKED))


def visible(
    mask: Any,
    shape: tuple[int, int],
    *,
    q_axis: int,
    batch,
    q_start,
    kv_start,
    position,
    kv_end: int | None,
):
    """Which keys of a tile each query sees, as booleans in the layout of a wgmma's result.

    Args:
      mask: a `Mask` of references.
      q_axis: 0 for a tile [q, kv], 1 for [kv, q].
      q_start, kv_start: the tile's first query and key.
      position: the position of query 0 among the keys.
      kv_end: the number of keys, if the last block is ragged; else None.
    """

    # Indices of one axis each, for a thread has few rows and columns of the tile, but many entries.
    # What the block's place adds goes to the queries.
    layouts = [plgpu.Layout.WGMMA.reduce(1 - axis) for axis in (0, 1)]

    def index(axis):
        return plgpu.broadcasted_iota(jnp.int32, (shape[axis],), 0, layout=layouts[axis])

    def spread(x, axis):
        return lax.broadcast_in_dim(x, shape, [axis])

    kv_axis, tests = 1 - q_axis, []
    if mask.causal or kv_end is not None:
        last: Any = index(q_axis) + (q_start + position) if mask.causal else None
        if kv_end is not None:
            last = jnp.minimum(last, kv_end - 1) if mask.causal else kv_end - 1
        key = index(kv_axis)
        if mask.causal:
            tests.append(spread(key, kv_axis) <= spread(last - kv_start, q_axis))
        else:
            tests.append(spread(key + kv_start <= last, kv_axis))
    if mask.q_segment_ids is not None:
        q_segment, kv_segment = (
            plgpu.load(
                ref.at[batch, pl.ds(start, shape[axis])], layout=layouts[axis], optimized=False
            )
            for ref, start, axis in (
                (mask.q_segment_ids, q_start, q_axis),
                (mask.kv_segment_ids, kv_start, kv_axis),
            )
        )
        q_segment = jnp.where(q_segment == 0, -1, q_segment)  # padding sees not even padding
        tests.append(spread(q_segment, q_axis) == spread(kv_segment, kv_axis))
    return functools.reduce(operator.and_, tests)
