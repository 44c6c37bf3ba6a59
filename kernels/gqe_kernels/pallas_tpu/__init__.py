"""Routed attention as Pallas TPU kernels."""

from gqe_kernels.pallas_tpu.attention import attention, unsupported
from gqe_kernels.pallas_tpu.blocks import BlockSizes

__all__ = ["BlockSizes", "attention", "unsupported"]
