"""Which blocks of keys each block of queries visits, as small integer tables for SMEM."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

UNREACHABLE = 2**30


class Masking(NamedTuple):
    """Masking arguments as arrays.

    offset: position among the keys of the first query of each piece of the queries.
    """

    offset: Int[Array, "batch piece"]
    q_segment: Int[Array, "batch q_len"] | None
    kv_segment: Int[Array, "batch kv_len"] | None


class Blocks(NamedTuple):
    """Of each block of one sequence: its lowest and highest segment, padding left out, and the
    lowest with padding. Empty ranges have low > high."""

    low: Int[Array, "batch block"]
    high: Int[Array, "batch block"]
    lowest: Int[Array, "batch block"]


class Visits(NamedTuple):
    """Scalar tables, prefetched. `position` is that of the first query of each block among the
    keys. `first` to `last` bound the blocks of the inner axis that a block of the outer axis
    visits; inside them, segment ranges that cannot meet are not computed."""

    position: Int[Array, "batch q_block"]
    first: Int[Array, "batch outer"]
    last: Int[Array, "batch outer"]
    q: Blocks | None
    kv: Blocks | None


def _segments(segment, block: int) -> Blocks:
    batch, length = segment.shape
    padded = jnp.pad(segment, ((0, 0), (0, -length % block))).reshape(batch, -1, block)
    real = padded != 0
    return Blocks(
        jnp.min(jnp.where(real, padded, UNREACHABLE), axis=-1),
        jnp.max(jnp.where(real, padded, -UNREACHABLE), axis=-1),
        jnp.min(padded, axis=-1),
    )


def visits(
    masking: Masking, causal: bool, q_len: int, kv_len: int, q: int, kv: int, outer: str
) -> Visits:
    """Tables for a kernel whose outer axis is the blocks of "q" or of "kv".

    Args:
      q, kv: rows of a block; where there are several pieces, q divides them.
    """
    batch, pieces = masking.offset.shape
    num_q, num_kv = -(-q_len // q), -(-kv_len // kv)
    meets = jnp.ones((batch, num_q, num_kv), bool)
    in_piece = jnp.arange(-(-num_q // pieces)) * q
    position = (masking.offset[:, :, None] + in_piece).reshape(batch, -1)
    if causal:
        rows = jnp.minimum(q_len - jnp.arange(num_q) * q, q)
        meets &= jnp.arange(num_kv) * kv <= (position + rows - 1)[:, :, None]
    q_blocks = kv_blocks = None
    if masking.q_segment is not None:
        q_blocks, kv_blocks = _segments(masking.q_segment, q), _segments(masking.kv_segment, kv)
        meets &= q_blocks.low[:, :, None] <= kv_blocks.high[:, None, :]
        meets &= kv_blocks.low[:, None, :] <= q_blocks.high[:, :, None]
    if outer == "kv":
        meets = jnp.swapaxes(meets, 1, 2)
    inner = meets.shape[2]
    some = jnp.any(meets, axis=2)
    first = jnp.where(some, jnp.argmax(meets, axis=2), 0)
    last = jnp.where(some, inner - 1 - jnp.argmax(meets[:, :, ::-1], axis=2), -1)
    return Visits(position, first.astype(jnp.int32), last.astype(jnp.int32), q_blocks, kv_blocks)
