"""The tiles of one call, and which blocks of keys each block of queries visits."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from gqe_kernels.contract import Mask
from gqe_kernels.pallas_tpu.layout import Flat

UNREACHABLE = 2**30


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles [q, kv] of one call, and which tests they need."""

    q: int
    kv: int
    q_len: int
    kv_len: int
    causal: bool
    segments: bool
    static_offset: int | None = None  # position of the first query, where it is known
    is_prefill: bool = False  # nothing but causality and a known offset hides keys

    @classmethod
    def of(cls, q: int, kv: int, flat: Flat, mask: Mask) -> "Tiles":
        """The tiles of these operands.

        Args:
          q, kv: rows of a block of queries and of keys.
        """
        return cls(
            q=q,
            kv=kv,
            q_len=flat.query.shape[1],
            kv_len=flat.key.shape[1],
            causal=mask.causal,
            segments=mask.q_segment_ids is not None,
            static_offset=mask.static_offset,
            is_prefill=mask.is_prefill,
        )

    @property
    def diagonal_first(self) -> bool:
        """Whether each block of queries has one block of keys on the diagonal, its last, cut from
        corner to corner, and sees all of the others: what a prefill is."""
        offset = self.static_offset
        return (
            self.is_prefill
            and self.q == self.kv
            and offset is not None
            and offset >= 0
            and offset % self.kv == 0
            and offset + self.q_len <= self.kv_len
        )

    @property
    def first_diagonal(self) -> int:
        """The block of keys on the diagonal of the first block of queries of a prefill."""
        return (self.static_offset or 0) // self.kv

    def paired(self, pair, step):
        """The block of queries at [pair, step] of a prefill's grid, and how many blocks of keys lie
        between its diagonal and the one at hand.

        Blocks i and num_q - 1 - i see num_q + 1 blocks of keys together, whatever i is: as a row of
        the grid they leave no step empty, and cores share the work evenly. A block in the middle is
        alone, and steps beyond its keys are empty.
        """
        first = pair + 1 + self.first_diagonal
        second = (step >= first) & (2 * pair + 1 < self.num_q)
        i = jnp.where(second, self.num_q - 1 - pair, pair)
        return i, jnp.where(second, step - first, step)

    @property
    def pairs(self) -> tuple[int, int]:
        """The size of the grid of `paired`."""
        seen = self.num_q + 1 if self.num_q > 1 else 1
        before = self.first_diagonal * min(self.num_q, 2)
        return -(-self.num_q // 2), seen + before

    @property
    def num_q(self) -> int:
        return -(-self.q_len // self.q)

    @property
    def num_kv(self) -> int:
        return -(-self.kv_len // self.kv)

    @property
    def kv_ragged(self) -> bool:
        return self.kv_len % self.kv != 0

    @property
    def q_ragged(self) -> bool:
        return self.q_len % self.q != 0

    @property
    def ever_masked(self) -> bool:
        return self.causal or self.segments or self.kv_ragged


class Blocks(NamedTuple):
    """The lowest and highest segment of each block of one sequence, padding left out, and the
    lowest with padding. Empty ranges have low > high."""

    low: Int[Array, "batch block"]
    high: Int[Array, "batch block"]
    lowest: Int[Array, "batch block"]


class Visits(NamedTuple):
    """Scalar tables, prefetched. `position` is the position among the keys of the first query of
    each block. `first` to `last` bound the blocks of the inner axis that a block of the outer axis
    visits; inside them, blocks whose segments cannot meet are skipped."""

    position: Int[Array, "batch q_block"]
    first: Any  # [batch, outer], like `last`; None where the grid says what is visited
    last: Any
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


def visits(mask: Mask, tiles: Tiles, batch: int, outer: str) -> Visits:
    """Tables for a kernel whose outer axis is the blocks of "q" or of "kv".

    Where the queries are several pieces, blocks of queries divide them.
    """
    num_q, num_kv = tiles.num_q, tiles.num_kv
    meets = jnp.ones((batch, num_q, num_kv), bool)
    in_piece = jnp.arange(-(-num_q // mask.pieces)) * tiles.q
    offsets = jnp.broadcast_to(jnp.asarray(mask.offsets), (batch, mask.pieces))
    position = (offsets[:, :, None] + in_piece).reshape(batch, -1)
    if mask.causal:
        rows = jnp.minimum(tiles.q_len - jnp.arange(num_q) * tiles.q, tiles.q)
        meets &= jnp.arange(num_kv) * tiles.kv <= (position + rows - 1)[:, :, None]
    q_blocks = kv_blocks = None
    if mask.q_segment_ids is not None:
        q_blocks = _segments(mask.q_segment_ids, tiles.q)
        kv_blocks = _segments(mask.kv_segment_ids, tiles.kv)
        meets &= q_blocks.low[:, :, None] <= kv_blocks.high[:, None, :]
        meets &= kv_blocks.low[:, None, :] <= q_blocks.high[:, :, None]
    if outer == "kv":
        meets = jnp.swapaxes(meets, 1, 2)
    inner = meets.shape[2]
    some = jnp.any(meets, axis=2)
    first = jnp.where(some, jnp.argmax(meets, axis=2), 0)
    last = jnp.where(some, inner - 1 - jnp.argmax(meets[:, :, ::-1], axis=2), -1)
    return Visits(position, first.astype(jnp.int32), last.astype(jnp.int32), q_blocks, kv_blocks)
