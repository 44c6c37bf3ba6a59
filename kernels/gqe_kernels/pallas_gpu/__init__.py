"""Routed attention as Pallas kernels for Hopper GPUs, through Mosaic GPU."""

from gqe_kernels.pallas_gpu.attention import dense_attention, routed_attention, unsupported
from gqe_kernels.pallas_gpu.blocks import BlockSizes, use_block_sizes

__all__ = ["BlockSizes", "dense_attention", "routed_attention", "unsupported", "use_block_sizes"]
