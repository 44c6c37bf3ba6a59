"""Attention for Grouped Query Experts: one contract, one implementation per platform."""

from gqe_kernels.api import Implementation, dense_attention, routed_attention

__all__ = ["Implementation", "dense_attention", "routed_attention"]
