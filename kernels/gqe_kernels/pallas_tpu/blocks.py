"""Block sizes of the TPU kernels."""

import dataclasses



@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Rows of queries and of keys that one grid step holds in VMEM, and how it works on them.

    Args:
      q, kv: rows of the forward pass; multiples of 128.
      row_sum_on_mxu: sum the probabilities by a column of ones beside V.
      bfloat16_exp: exponentials of bfloat16 arguments, for chips whose vector unit has them.
    """

    q: int = 512
    kv: int = 512
    row_sum_on_mxu: bool = False
    bfloat16_exp: bool = False
    vmem_bytes: int = 96 * 2**20


def default_block_sizes(layout, q_len: int, kv_len: int, dtype) -> BlockSizes:
    q = min(512, -(-q_len // 128) * 128)
    kv = min(512, -(-kv_len // 128) * 128)
    return BlockSizes(q, kv)
