"""Which blocks a tile visits, as small integer tables in global memory."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from gqe_kernels.contract import Mask
from gqe_kernels.pallas_gpu.blocks import WARPGROUPS, BlockSizes


class Visits(NamedTuple):
    """The blocks of the inner axis that a block of the outer axis visits, in `steps` steps: the
    `whole` ones, in which every query sees every key and nothing is masked, come first.

    Attributes:
      position: of query 0 of the batch's row among the keys.
      first: the first block in which some query sees some key.
      first_whole: the first whole one.
    """

    position: Any
    first: Any
    first_whole: Any
    whole: Any
    steps: Any

    def block(self, step: Int[Array, ""] | int) -> Int[Array, ""]:
        """What a step visits."""
        other = self.first + step - self.whole
        other += jnp.where(other >= self.first_whole, self.whole, 0)
        return jnp.where(step < self.whole, self.first_whole + step, other)

    @classmethod
    def read(cls, table_ref, *index) -> "Visits":
        """A row of the table that `visits` makes."""
        return cls(*(table_ref[*index, column] for column in range(len(cls._fields))))


class Tables(NamedTuple):
    """The `Visits` of each kernel's tiles: [batch, tile, 5]."""

    forward: Any
    d_query: Any
    d_key: Any


def tables(mask: Mask, batch: int, *, lengths: tuple[int, int], blocks: BlockSizes) -> Tables:
    """The tables of one call; constants where the mask is known while tracing.

    Each operation on an array would be a launch of its own.
    """
    of = functools.partial(visits, mask, batch, lengths=lengths)
    q, kv = WARPGROUPS * blocks.q, WARPGROUPS * blocks.backward_kv
    return Tables(
        forward=of(rows=(q, blocks.kv), outer="q"),
        d_query=of(rows=(q, blocks.backward_kv), outer="q"),
        d_key=of(rows=(blocks.backward_q, kv), outer="kv"),
    )


def visits(
    mask: Mask, batch: int, *, lengths: tuple[int, int], rows: tuple[int, int], outer: str
) -> Int[Array | np.ndarray, "batch outer 5"]:
    """The `Visits` of each block of the outer axis.

    Args:
      mask: of queries in one piece; its segments are padded to whole blocks with 0.
      lengths: queries and keys, without padding.
      rows: rows of a block of queries and of keys.
      outer: "q" or "kv".
    """
    xp = jnp if any(isinstance(x, jax.Array) for x in jax.tree.leaves(mask)) else np
    offsets = xp.broadcast_to(mask.offsets, (batch, 1))
    num_q, num_kv = (-(-length // size) for length, size in zip(lengths, rows, strict=True))
    first_query = offsets[:, :, None] + xp.arange(num_q)[:, None] * rows[0]
    first_key = xp.arange(num_kv) * rows[1]
    some = xp.ones((batch, num_q, num_kv), bool)
    every = some & (first_key + rows[1] <= lengths[1])
    if mask.causal:
        end = offsets[:, :, None] + lengths[0]
        some &= first_key < xp.minimum(first_query + rows[0], end)
        every &= first_key + rows[1] <= first_query + 1
    if mask.q_segment_ids is not None:
        q = _ranges(xp, mask.q_segment_ids, num_q, rows[0], (0, 2, 1))
        kv = _ranges(xp, mask.kv_segment_ids, num_kv, rows[1], (0, 1, 2))
        some &= (q.low <= kv.high) & (kv.low <= q.high)
        every &= q.one & kv.one & (q.low == kv.low)
    if outer == "kv":
        some, every = xp.swapaxes(some, 1, 2), xp.swapaxes(every, 1, 2)
    number = some.shape[2]

    def first_and_behind(x):
        """The first true entry, and the one behind the last."""
        found = xp.any(x, axis=2)
        first, last = xp.argmax(x, axis=2), xp.argmax(x[:, :, ::-1], axis=2)
        return xp.where(found, first, 0), xp.where(found, number - last, 0)

    first, end = first_and_behind(some)
    every &= some
    first_whole = xp.where(xp.any(every, axis=2), xp.argmax(every, axis=2), first)
    # Where segments return, whole blocks need not be neighbours: the first of them that are.
    broken = ~every & (xp.arange(number) >= first_whole[:, :, None])
    behind = xp.where(xp.any(broken, axis=2), xp.argmax(broken, axis=2), number)
    position = xp.broadcast_to(offsets, first.shape)
    found = Visits(position, first, first_whole, behind - first_whole, end - first)
    return xp.stack(found, axis=-1).astype(np.int32)


class _Ranges(NamedTuple):
    """The lowest and highest segment of each block, without padding, and whether they are one."""

    low: Int[Array | np.ndarray, "..."]
    high: Int[Array | np.ndarray, "..."]
    one: Bool[Array | np.ndarray, "..."]


def _ranges(xp, segment, blocks: int, rows: int, axes: tuple[int, int, int]) -> _Ranges:
    """Each array has the axis of blocks in one of the last two places, 1 in the other."""
    none = 2**30
    cut = segment[:, : blocks * rows].reshape(segment.shape[0], blocks, rows)
    low = xp.min(xp.where(cut == 0, none, cut), axis=2)
    high = xp.max(xp.where(cut == 0, -none, cut), axis=2)
    one = (low == high) & xp.all(cut != 0, axis=2)
    return _Ranges(*(xp.transpose(x[:, None], axes) for x in (low, high, one)))
