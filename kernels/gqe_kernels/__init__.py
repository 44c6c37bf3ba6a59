"""Attention for Grouped Query Experts: one contract, one implementation per platform."""

from gqe_kernels.api import (
    best_attention,
    dense_attention,
    get_attention,
    routed_attention,
)
from gqe_kernels.contract import Attention, Implementation, ImplementationName, Mask, Routed, Slots

__all__ = [
    "Attention",
    "Implementation",
    "ImplementationName",
    "Mask",
    "Routed",
    "Slots",
    "best_attention",
    "dense_attention",
    "get_attention",
    "routed_attention",
]
