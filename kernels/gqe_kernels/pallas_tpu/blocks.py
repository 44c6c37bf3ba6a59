"""Block sizes of the TPU kernels."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Rows of queries and of keys that one grid step holds in VMEM, and how it works on them.

    Args:
      q, kv: rows of the forward pass; multiples of 128.
      strip: rows of queries that one chain of products and softmax works on; divides q.
      row_sum_on_mxu: sum the probabilities by a column of ones beside V.
      bfloat16_exp: exponentials of bfloat16 arguments, for chips whose vector unit has them.
    """

    q: int = 512
    kv: int = 512
    strip: int = 512
    row_sum_on_mxu: bool = False
    bfloat16_exp: bool = False
    backward_q: int = 512
    backward_kv: int = 512
    d_query_bytes: int = 48 * 2**20
    vmem_bytes: int = 110 * 2**20

    def backward_launches(self, layout, num_q: int) -> list[tuple[int, int]]:
        """First block of queries and number of blocks of each launch of the backward kernel."""
        block_bytes = layout.heads * layout.row * self.backward_q * 4
        count = max(1, self.d_query_bytes // block_bytes)
        return [(first, min(count, num_q - first)) for first in range(0, num_q, count)]


def default_block_sizes(layout, q_len: int, kv_len: int, dtype) -> BlockSizes:
    q = min(512, -(-q_len // 128) * 128)
    kv = min(512, -(-kv_len // 128) * 128)
    return BlockSizes(q, kv, strip=q, backward_q=q, backward_kv=kv)
