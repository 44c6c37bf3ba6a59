"""What the kernels cost, for XLA's scheduler and cost analysis, which cannot look into them."""

from typing import Any

import jax
import numpy as np
from jax.experimental import pallas as pl

from gqe_kernels.contract import Mask
from gqe_kernels.pallas_tpu.layout import Layout

# Matrix products of [query, key] with a head's width: QKᵀ and PV; the backward pass computes QKᵀ
# again, and dP, dV, dQ and dK.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


def visible_pairs(q_len: int, kv_len: int, mask: Mask) -> int:
    """Pairs of a query token and a key token that one head must look at.

    Where the offset is traced: the mean over all offsets with which the queries are among the keys,
    which is also the number for an early and a late piece of the keys' sequence.
    """
    if not mask.causal:
        return q_len * kv_len
    if mask.static_offset is None:
        return q_len * (kv_len + 1) // 2
    seen = np.arange(q_len, dtype=np.int64) + mask.static_offset + 1
    return int(np.clip(seen, 0, kv_len).sum())


def estimate(
    products: int, pairs: int, layout: Layout, batch: int, *arrays: Any, launches: int = 1
) -> pl.CostEstimate:
    """The cost of one of `launches` calls: its matrix products, and `arrays` moved once.

    Args:
      products: matrix products for each pair of tokens and head.
      pairs: `visible_pairs`.
      arrays: operands and results, as pytrees of whatever has shape and dtype.
    """
    seen = batch * layout.heads * pairs
    return pl.CostEstimate(
        flops=2 * products * seen * layout.head_dim // launches,
        transcendentals=seen // launches if products else 0,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays)) // launches,
    )
