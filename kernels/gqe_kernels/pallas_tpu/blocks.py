"""Block sizes of the TPU kernels: defaults by chip, head_dim and length."""

import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax

from gqe_kernels.chips import CHIPS, MIB, chip_name
from gqe_kernels.pallas_tpu.layout import LANES, Layout

_ENOUGH = 56 * MIB  # of VMEM, on every chip


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Rows of queries and of keys that one grid step holds in VMEM, and how it works on them.

    Args:
      q, kv: rows of the forward pass; multiples of 128. A prefill is fastest with q = kv.
      strip: rows of queries that one chain of products and softmax works on; divides q.
      row_sum_on_mxu: sum the probabilities by columns of ones beside V, where the MXU is wider than
        a head (256 columns: v6e, tpu7x). At head_dim 64 they always are.
      bfloat16_exp: exponentials of bfloat16 arguments, in bfloat16 calls, where the vector unit has
        them. The argument's rounding moves a probability p = 2**x by p |x| 2**-9 log(2) at most,
        0.0007, less than the rounding of p itself to bfloat16, 2**-9.
      backward_q, backward_kv: rows of the backward pass.
      d_query_bytes: VMEM for float32 dQ; bounds the queries of one launch of the backward kernel.
      vmem_bytes: VMEM that a kernel may use.
    """

    q: int = 512
    kv: int = 512
    strip: int = 256
    row_sum_on_mxu: bool = False
    bfloat16_exp: bool = False
    backward_q: int = 512
    backward_kv: int = 512
    d_query_bytes: int = 20 * MIB
    vmem_bytes: int = _ENOUGH

    def __post_init__(self):
        for name in ("q", "kv", "backward_q", "backward_kv"):
            if (rows := getattr(self, name)) <= 0 or rows % LANES:
                raise ValueError(f"BlockSizes.{name} is {rows}; it must be a multiple of {LANES}")
        if self.strip <= 0 or self.q % self.strip or self.strip % 8:
            raise ValueError(
                f"BlockSizes.strip is {self.strip}; it must be a multiple of 8 that divides q, "
                f"{self.q}"
            )

    def backward_launches(self, layout: Layout, num_q: int) -> tuple[int, int]:
        """Launches of the backward kernel, and blocks of queries in each; the last may have fewer.

        Args:
          num_q: blocks of queries in all.
        """
        block_bytes = layout.heads * layout.row * self.backward_q * 4
        launches = -(-num_q // max(1, self.d_query_bytes // block_bytes))
        return launches, -(-num_q // launches)


# Where a core has more than 64 MiB of VMEM; the defaults of `BlockSizes` fit every chip.
_LARGE = {"d_query_bytes": 48 * MIB, "vmem_bytes": 110 * MIB}
# Of fewest cycles by the static schedule; written by `tpu_schedule --tune` of kernels/benchmarks.
TABLE = Path(__file__).with_name("block_sizes.json")


# chip → head_dim → length → fields of `BlockSizes`
Table = dict[str, dict[str, dict[str, dict[str, Any]]]]


@functools.cache
def read_table() -> Table:
    """The tuned block sizes of every chip."""
    return json.loads(TABLE.read_text())["blocks"]


def tuned(chip: str | None, head_dim: int, length: int, table: Table | None = None) -> BlockSizes:
    """The table's entry for the head size and the length nearest to these.

    Args:
      chip: a key of `CHIPS`, or None: not known.
      table: None: that of `read_table`.
    """
    if chip is None:
        return BlockSizes()
    table = read_table() if table is None else table
    entry = table[chip][str(LANES // 2 if head_dim == LANES // 2 else LANES)]
    nearest = min(entry, key=lambda known: abs(math.log(int(known) / length)))
    large: dict[str, Any] = _LARGE if CHIPS[chip].vmem_bytes > 64 * MIB else {}
    return BlockSizes(bfloat16_exp=CHIPS[chip].bfloat16_exp, **large, **entry[nearest])


def lowered_chip() -> str | None:
    """The chip generation of the mesh in scope, or of this process; None if neither is a TPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device is not None else jax.devices()[0].device_kind
    return chip_name(kind)


def vmem_estimate(layout: Layout, blocks: BlockSizes, q_len: int, itemsize: int) -> int:
    """Bytes that the hungriest of the kernels holds: its blocks twice, for the pipeline, and its
    scratch."""
    return max(
        forward_bytes(layout, blocks, itemsize), _backward_bytes(layout, blocks, q_len, itemsize)
    )


def claim(needed: int, most: int) -> int:
    """Bytes of VMEM for a kernel that needs so many: XLA keeps weights in what is not claimed."""
    return min(_ENOUGH, most) if needed <= _ENOUGH else most


_NARROW = 4 * LANES * 4  # a row's index, weights, segments and logsumexp, each padded to 128 lanes

# Of registers, by each head's code. Nine heads find room within the estimate, 17 on a v5p do not.
_SPILLED = 256 * 2**10


def _widths(layout: Layout) -> tuple[int, int, int]:
    """Lanes of a row of keys, of queries and of slots."""
    kv_row = layout.group * layout.head_dim + layout.shared * layout.row
    q_row = layout.group * layout.expert * layout.head_dim
    return kv_row, q_row, layout.slots * layout.head_dim


def forward_bytes(layout: Layout, blocks: BlockSizes, itemsize: int) -> int:
    """Bytes that the forward kernel holds, by estimate."""
    kv_row, q_row, slots = _widths(layout)
    scratch = layout.heads * (layout.row * (itemsize + 4) + 2 * LANES * 4)
    moved = 2 * itemsize * (blocks.q * (q_row + slots) + 2 * blocks.kv * kv_row)
    return moved + blocks.q * (2 * _NARROW + scratch) + 3 * blocks.q * blocks.kv * 4


def _backward_bytes(layout: Layout, blocks: BlockSizes, q_len: int, itemsize: int) -> int:
    launches, num_q = blocks.backward_launches(layout, -(-q_len // blocks.backward_q))
    kv_row, q_row, slots = _widths(layout)
    heads, row = layout.heads, layout.row
    backward_q, backward_kv = blocks.backward_q, blocks.backward_kv
    prepare = 2 * itemsize * backward_q * (q_row + 2 * slots + 2 * heads * row)
    backward = 2 * itemsize * backward_q * (2 * heads * row + q_row)
    sums = 0 if launches == 1 else 2 * 4
    backward += 2 * backward_kv * kv_row * (2 * itemsize + 2 * 4 + sums)
    backward += backward_kv * kv_row * (2 * 4 + itemsize) + 4 * backward_q * backward_kv * 4
    backward += num_q * heads * row * backward_q * 4
    return max(prepare, backward) + 2 * backward_q * _NARROW + max(0, heads - 10) * _SPILLED


def default_block_sizes(
    layout: Layout,
    q_len: int,
    kv_len: int,
    itemsize: int,
    chip: str | None = None,
    pieces: int = 1,
) -> BlockSizes | None:
    """A chip's defaults, made to fit the lengths and VMEM; None if nothing does.

    Args:
      pieces: of the queries; blocks do not cross from one to the next.
      chip: a key of `CHIPS`; None: `lowered_chip()`.
    """
    blocks = tuned(chip or lowered_chip(), layout.head_dim, kv_len)

    def fit(rows: int, length: int) -> int:
        return min(rows, -(-length // LANES) * LANES)

    def fit_q(rows: int) -> int:
        rows = fit(rows, q_len // pieces)
        while pieces > 1 and q_len // pieces % rows:
            rows -= LANES
        return rows

    def sizes(q: int, kv: int, most: int) -> tuple[int, int]:
        return fit_q(min(q, most)), fit(min(kv, most), kv_len)

    for most in (512, 256, 128):
        q, kv = sizes(blocks.q, blocks.kv, most)
        strip = blocks.strip if q % blocks.strip == 0 else LANES
        forward = dataclasses.replace(blocks, q=q, kv=kv, strip=strip)
        if forward_bytes(layout, forward, itemsize) <= blocks.vmem_bytes:
            break
    else:
        return None
    for most, quarters in itertools.product((512, 256, 128), (4, 3, 2, 1)):
        q, kv = sizes(blocks.backward_q, blocks.backward_kv, most)
        both = dataclasses.replace(
            forward,
            backward_q=q,
            backward_kv=kv,
            d_query_bytes=blocks.d_query_bytes * quarters // 4,
        )
        if _backward_bytes(layout, both, q_len, itemsize) <= blocks.vmem_bytes:
            return both
    return None
