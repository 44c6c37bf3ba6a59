"""Routed attention as Pallas kernels for Hopper GPUs, through Mosaic GPU."""

from gqe_kernels.pallas_gpu.attention import attention, unsupported
from gqe_kernels.pallas_gpu.blocks import BlockSizes

__all__ = ["BlockSizes", "attention", "unsupported"]
