"""What is measured: sizes, and the cases in the order in which they matter."""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes that fit a device.

    Attributes:
      heads, groups: query experts (dense: query heads) and key/value heads, with k = 1.
      tokens: batch × length, where a length is not longer.
      first_lengths: measured before all others.
      rate_length: where the kernels' rates are compared, and their block sizes tried.
      matmul: rows and columns of the matrix product whose rate the others are compared with.
      seconds: that one measurement of one contender should take.
    """

    heads: int
    groups: int
    dtype: str
    tokens: int
    lengths: tuple[int, ...]
    first_lengths: tuple[int, ...]
    rate_length: int
    head_dims: tuple[int, ...]
    matmul: int
    seconds: float


FULL = Scale(
    heads=16,
    groups=8,
    dtype="bfloat16",
    tokens=32_768,
    lengths=tuple(1024 * 2**i for i in range(1, 8)),
    first_lengths=(2048, 4096, 8192, 32_768, 131_072),
    rate_length=16_384,
    head_dims=(64, 128),
    matmul=8192,
    seconds=0.02,
)
SMALL = Scale(
    heads=16,
    groups=8,
    dtype="float32",
    tokens=256,
    lengths=(128, 256),
    first_lengths=(128, 256),
    rate_length=256,
    head_dims=(8,),
    matmul=256,
    seconds=0.005,
)


@dataclasses.dataclass(frozen=True)
class SpeedCase:
    """One comparison.

    Attributes:
      level: what is timed. Here "op", the attention op, or "blocks", the block sizes of this
        project's GPU kernel; a command may have levels of its own.
      training: forward and backward.
      top_k: experts of a group that a token takes. With two, groups have twice as many experts, so
        that 9 of 16 heads are computed with one and with two.
      experts_per_group: None: as many as the heads and groups give.
      sides: what is compared with what: the ratio is the second's time over the first's.
    """

    level: str
    training: bool
    length: int
    batch: int
    head_dim: int
    top_k: int = 1
    experts_per_group: int | None = None
    sides: tuple[str, str] = ("gqe", "dense")

    @property
    def name(self) -> str:
        """The key of the case in the results."""
        kind = "forward + backward" if self.training else "forward"
        which = f"k = {self.top_k}"
        if self.experts_per_group is not None:
            which += f", M = {self.experts_per_group}"
        return f"{self.level}, {kind}, {self.batch} × {self.length}, D = {self.head_dim}, {which}"


def at_lengths(
    scale: Scale, level: str, training: bool, lengths: Iterable[int], head_dim: int, top_k: int = 1
) -> list[SpeedCase]:
    """A case for each length, with as many sequences as `scale.tokens` holds."""
    return [
        SpeedCase(level, training, length, max(1, scale.tokens // length), head_dim, top_k)
        for length in lengths
    ]


def op_cases(scale: Scale) -> list[SpeedCase]:
    """All cases of the op, the most important first: a budget may end before the list does."""
    small, *others = scale.head_dims
    first, lengths, rate = scale.first_lengths, scale.lengths, [scale.rate_length]
    order = [(False, first, small, 1), (True, first, small, 1)]
    order += [(False, rate, head_dim, 1) for head_dim in scale.head_dims]
    order += [(training, lengths, small, 1) for training in (False, True)]
    order += [(False, lengths, head_dim, 1) for head_dim in others]
    order += [(True, lengths, head_dim, 1) for head_dim in others]
    order += [(t, lengths, head_dim, 2) for head_dim in scale.head_dims for t in (False, True)]
    found = [case for kind in order for case in at_lengths(scale, "op", *kind)]
    found += [
        SpeedCase("op", False, length // 2, 1, head_dim)  # one short sequence alone
        for head_dim in scale.head_dims
        for length in lengths[:3]
    ]
    for head_dim in scale.head_dims:
        for training in (False, True):
            found += at_lengths(scale, "blocks", training, rate, head_dim)
    return list(dict.fromkeys(found))
