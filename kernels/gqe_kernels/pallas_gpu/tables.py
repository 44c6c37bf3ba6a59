"""Which blocks a tile visits, as small integer tables in global memory."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Masking(NamedTuple):
    """Masking arguments as arrays; lengths are padded to whole blocks.

    Attributes:
      position: of the first query of each row of the batch among the keys.
      q_segment, kv_segment: both or neither; the segment of padding is 0.
    """

    position: Int[Array, "batch"]
    q_segment: Int[Array, "batch q_len"] | None
    kv_segment: Int[Array, "batch kv_len"] | None


class Visits(NamedTuple):
    """The blocks of the inner axis that a block of the outer axis visits, in `steps` steps: the
    `whole` ones, in which every query sees every key and nothing is masked, come first.

    Attributes:
      first: the first block in which some query sees some key.
      first_whole: the first whole one.
    """

    first: Int[Array, ""]
    first_whole: Int[Array, ""]
    whole: Int[Array, ""]
    steps: Int[Array, ""]

    def block(self, step: Int[Array, ""]) -> Int[Array, ""]:
        """What a step visits."""
        other = self.first + step - self.whole
        other += jnp.where(other >= self.first_whole, self.whole, 0)
        return jnp.where(step < self.whole, self.first_whole + step, other)

    @classmethod
    def read(cls, table_ref, *index) -> "Visits":
        """A row of the table that `visits` makes."""
        return cls(*(table_ref[*index, column] for column in range(len(cls._fields))))


def visits(
    masking: Masking, *, causal: bool, lengths: tuple[int, int], rows: tuple[int, int], outer: str
) -> Int[Array, "batch outer 4"]:
    """The `Visits` of each block of the outer axis.

    Args:
      lengths: queries and keys, without padding.
      rows: of a block of queries and of keys.
      outer: "q" or "kv".
    """
    batch = masking.position.shape[0]
    num_q, num_kv = (-(-length // size) for length, size in zip(lengths, rows, strict=True))
    first_query = masking.position[:, None, None] + jnp.arange(num_q)[:, None] * rows[0]
    first_key = jnp.arange(num_kv) * rows[1]
    some = jnp.ones((batch, num_q, num_kv), bool)
    every = some & (first_key + rows[1] <= lengths[1])
    if causal:
        end = masking.position[:, None, None] + lengths[0]
        some &= first_key < jnp.minimum(first_query + rows[0], end)
        every &= first_key + rows[1] <= first_query + 1
    if masking.q_segment is not None:
        q = _ranges(masking.q_segment, num_q, rows[0], (0, 2, 1))
        kv = _ranges(masking.kv_segment, num_kv, rows[1], (0, 1, 2))
        some &= (q.low <= kv.high) & (kv.low <= q.high)
        every &= q.one & kv.one & (q.low == kv.low)
    if outer == "kv":
        some, every = jnp.swapaxes(some, 1, 2), jnp.swapaxes(every, 1, 2)
    number = some.shape[2]

    def first_and_behind(x):
        """The first true entry, and the one behind the last."""
        found = jnp.any(x, axis=2)
        first, last = jnp.argmax(x, axis=2), jnp.argmax(x[:, :, ::-1], axis=2)
        return jnp.where(found, first, 0), jnp.where(found, number - last, 0)

    first, end = first_and_behind(some)
    every &= some
    first_whole = jnp.where(jnp.any(every, axis=2), jnp.argmax(every, axis=2), first)
    # Where segments return, whole blocks need not be neighbours: the first of them that are.
    broken = ~every & (jnp.arange(number) >= first_whole[:, :, None])
    behind = jnp.where(jnp.any(broken, axis=2), jnp.argmax(broken, axis=2), number)
    found = Visits(first, first_whole, behind - first_whole, end - first)
    return jnp.stack(found, axis=-1).astype(jnp.int32)


class _Ranges(NamedTuple):
    """Of each block: the lowest and the highest segment, without padding; whether all is one."""

    low: Int[Array, "..."]
    high: Int[Array, "..."]
    one: Bool[Array, "..."]


def _ranges(segment, blocks: int, rows: int, axes: tuple[int, int, int]) -> _Ranges:
    """Each array has the axis of blocks in one of the last two places, 1 in the other."""
    none = 2**30
    cut = segment[:, : blocks * rows].reshape(segment.shape[0], blocks, rows)
    low = jnp.min(jnp.where(cut == 0, none, cut), axis=2)
    high = jnp.max(jnp.where(cut == 0, -none, cut), axis=2)
    one = (low == high) & jnp.all(cut != 0, axis=2)
    return _Ranges(*(jnp.transpose(x[:, None], axes) for x in (low, high, one)))
