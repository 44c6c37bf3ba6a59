"""What the GPU kernels do alike with a tile of logits."""

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


def visible(
    shape: tuple[int, int],
    *,
    q_axis: int,
    batch,
    q_start,
    kv_start,
    position,
    causal: bool,
    kv_len: int,
    kv_ragged: bool,
    q_segment_ref,
    kv_segment_ref,
):
    """Which entries of a tile count, as a tile of booleans in the layout of a wgmma's result.

    Args:
      q_axis: 0 for a tile [q, kv], 1 for [kv, q].
      q_start, kv_start: the tile's first query and key.
      position: of query 0 among the keys.
    """

    def index(axis):
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    query, key = index(q_axis) + q_start, index(1 - q_axis) + kv_start
    tests = []
    if causal:
        tests.append(key <= query + position)
    if kv_ragged:
        tests.append(key < kv_len)
    if q_segment_ref is not None:
        rows = ((q_segment_ref, q_start, q_axis), (kv_segment_ref, kv_start, 1 - q_axis))
        q_segment, kv_segment = (
            lax.broadcast_in_dim(
                plgpu.load(
                    ref.at[batch, pl.ds(start, shape[axis])],
                    layout=plgpu.Layout.WGMMA.reduce(1 - axis),
                    optimized=False,
                ),
                shape,
                [axis],
            )
            for ref, start, axis in rows
        )
        tests += [q_segment == kv_segment, q_segment != 0]
    mask = tests[0]
    for test in tests[1:]:
        mask &= test
    return mask
