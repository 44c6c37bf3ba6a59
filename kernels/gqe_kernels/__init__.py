"""Attention for Grouped Query Experts: one contract, one implementation per platform."""

from gqe_kernels.api import dense_attention, routed_attention

__all__ = ["dense_attention", "routed_attention"]
