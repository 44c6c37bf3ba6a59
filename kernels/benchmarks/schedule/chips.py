"""The chips that a schedule can be read for, and what their matrix units could do."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TensorCore of a TPU generation.

    `mxus`, `mxu_size` and `rows_per_cycle` are from libtpu's own static profile (the issue periods
    of its matmul slots: 8 float32 rows take 8 cycles on v5e and v5p, 4 on v6e and tpu7x) and give
    the published peak at the published clock: 197 TFLOP/s for v5e at 1.5 GHz, 918 for v6e at 1.75.

    Attributes:
      topology: the name that `jax.experimental.topologies` knows a small slice of it by.
      mxus: matrix units in the core.
      mxu_size: rows and columns of one matrix unit.
      rows_per_cycle: left-hand rows that one matrix unit takes in a cycle.
      delay_slots: bundles after a branch that run whether or not it is taken.
      cores: TensorCores that one program is split over by dimensions marked "parallel".
    """

    topology: str
    mxus: int
    mxu_size: int
    rows_per_cycle: int
    delay_slots: int
    cores: int = 1

    @property
    def peak_macs(self) -> int:
        """Multiply-adds of bfloat16 in one cycle of one core."""
        return self.mxus * self.mxu_size**2 * self.rows_per_cycle


CHIPS = {
    "v5e": Chip("v5e:2x4", mxus=4, mxu_size=128, rows_per_cycle=1, delay_slots=4),
    "v5p": Chip("v5p:2x2x1", mxus=4, mxu_size=128, rows_per_cycle=1, delay_slots=4, cores=2),
    "v6e": Chip("v6e:2x4", mxus=2, mxu_size=256, rows_per_cycle=2, delay_slots=4),
    "tpu7x": Chip("tpu7x:2x2x1", mxus=2, mxu_size=256, rows_per_cycle=2, delay_slots=6),
}


def chip(name: str) -> Chip:
    """The chip of this name.

    Raises:
      ValueError: there is no such chip.
    """
    if name not in CHIPS:
        raise ValueError(f"chip is {name!r}; it must be one of {', '.join(map(repr, CHIPS))}")
    return CHIPS[name]
