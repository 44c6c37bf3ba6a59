"""Routed attention as Pallas TPU kernels."""

from gqe_kernels.pallas_tpu.attention import (
    dense_attention,
    dense_unsupported,
    routed_attention,
    unsupported,
)
from gqe_kernels.pallas_tpu.blocks import BlockSizes

__all__ = [
    "BlockSizes",
    "dense_attention",
    "dense_unsupported",
    "routed_attention",
    "unsupported",
]
