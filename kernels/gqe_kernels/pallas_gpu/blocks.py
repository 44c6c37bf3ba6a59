"""Block sizes of the GPU kernels, with defaults by head_dim."""

import dataclasses

WARPGROUPS = 2  # that compute; a third fetches
SLOTS = 2  # for what an item of work needs once; see items.py
SHARED_MEMORY = 226 * 1024  # bytes of a thread block, less a KiB for barriers and sums


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Rows of queries and of keys that a warpgroup works on, and how many blocks wait in memory.

    Args:
      q: rows of queries of each of the two warpgroups; a multiple of 64, the rows of a wgmma.
      kv: rows of keys in a step of the forward pass.
      stages: blocks of keys and values in shared memory.
      backward_kv: rows of keys in a step of dQ, and of each warpgroup of the kernel of dK and dV.
      backward_q: rows of queries in a step of it.
      programs: thread blocks that share the work out; None: one a multiprocessor.
      staged: products take no operand from registers; for jax's interpreter, which cannot.
    """

    q: int = 64
    kv: int = 128
    stages: int = 2
    backward_kv: int = 64
    backward_q: int = 64
    programs: int | None = None
    staged: bool = False

    def __post_init__(self):
        for name in ("q", "kv", "backward_kv", "backward_q"):
            if (rows := getattr(self, name)) <= 0 or rows % 64:
                raise ValueError(f"BlockSizes.{name} is {rows}; it must be a multiple of 64")
        if self.stages < 2:
            raise ValueError(f"BlockSizes.stages is {self.stages}; it must be at least 2")
        if self.programs is not None and self.programs < 1:
            raise ValueError(
                f"BlockSizes.programs is {self.programs}; it must be positive, or None"
            )

    def most_experts(self, head_dim: int) -> int:
        """Among so many the forward kernel can select: their tiles fit beside its other blocks."""
        row = 2 * head_dim  # bytes
        own, of_keys = SLOTS * WARPGROUPS * self.q * row, 2 * self.stages * self.kv * row
        return 1 + (SHARED_MEMORY - own - of_keys) // (WARPGROUPS * self.q * row)


DEFAULTS = {64: BlockSizes(stages=4), 128: BlockSizes()}
