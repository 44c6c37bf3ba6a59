"""Which blocks a tile visits, as small integer tables in global memory."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Masking(NamedTuple):
    """Masking arguments as arrays; lengths are padded to whole blocks.

    Attributes:
      position: of the first query of each row of the batch among the keys.
      q_segment, kv_segment: both or neither; the segment of padding is 0.
    """

    position: Int[Array, "batch"]
    q_segment: Int[Array, "batch q_len"] | None
    kv_segment: Int[Array, "batch kv_len"] | None


def visited(
    masking: Masking, *, causal: bool, lengths: tuple[int, int], rows: tuple[int, int], outer: str
) -> Int[Array, "batch outer 2"]:
    """The first block of the inner axis that a block of the outer axis visits, and the one behind
    the last: those in which some query may see some key.

    Args:
      lengths: queries and keys, without padding.
      rows: of a block of queries and of keys.
      outer: "q" or "kv".
    """
    batch = masking.position.shape[0]
    num_q, num_kv = (-(-length // size) for length, size in zip(lengths, rows, strict=True))
    meets = jnp.ones((batch, num_q, num_kv), bool)
    if causal:
        last = jnp.minimum((jnp.arange(num_q) + 1) * rows[0], lengths[0]) - 1
        meets &= jnp.arange(num_kv) * rows[1] <= masking.position[:, None, None] + last[:, None]
    if masking.q_segment is not None:
        low_q, high_q = _ranges(masking.q_segment, num_q, rows[0])
        low_kv, high_kv = _ranges(masking.kv_segment, num_kv, rows[1])
        meets &= low_q[:, :, None] <= high_kv[:, None]
        meets &= low_kv[:, None] <= high_q[:, :, None]
    if outer == "kv":
        meets = jnp.swapaxes(meets, 1, 2)
    some = jnp.any(meets, axis=2)
    first = jnp.where(some, jnp.argmax(meets, axis=2), 0)
    end = jnp.where(some, meets.shape[2] - jnp.argmax(meets[:, :, ::-1], axis=2), 0)
    return jnp.stack([first, end], axis=-1).astype(jnp.int32)


def _ranges(segment, blocks: int, rows: int):
    """Of each block, the lowest and the highest segment; padding has none."""
    none = 2**30
    cut = segment[:, : blocks * rows].reshape(segment.shape[0], blocks, rows)
    low = jnp.min(jnp.where(cut == 0, none, cut), axis=2)
    return low, jnp.max(jnp.where(cut == 0, -none, cut), axis=2)
