"""What holds of every implementation, whatever its kernel does at the edges of the contract.

Each function of the contract is decorated with `guarded`. Then an array without entries gives
zeros, and what stands at padding, or at a key that no query sees, reaches no other row: neither a
value nor a gradient, even if it is NaN.
"""

import functools
from collections.abc import Callable
from typing import Concatenate

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from gqe_kernels.contract import AnyArray, Mask, Routed, Slots
from gqe_kernels.varying import vary_alike


def guarded[**Options](
    attention: Callable[Concatenate[Routed, Mask, float, Options], Slots],
) -> Callable[Concatenate[Routed, Mask, float, Options], Slots]:
    """`attention` for every argument that the contract allows.

    Args:
      attention: a function of the contract that is right for arrays with entries and finite
        operands.
    """

    @functools.wraps(attention)
    def whole(
        routed: Routed, mask: Mask, scale: float, *args: Options.args, **kwargs: Options.kwargs
    ) -> Slots:
        if routed.query.size == 0 or routed.key.size == 0:
            batch, q_len, *_, head_dim = routed.query.shape
            return jnp.zeros((batch, q_len, routed.num_slots, head_dim), routed.query.dtype)
        routed, mask = vary_alike((routed, mask))
        slots = attention(_without_unseen(routed, mask), mask, scale, *args, **kwargs)
        if mask.q_segment_ids is None:
            return slots
        return jnp.where((mask.q_segment_ids != 0)[:, :, None, None], slots, 0)

    return whole


def _without_unseen(routed: Routed, mask: Mask) -> Routed:
    """The operands with zeros at queries of segment 0 and at keys that no query sees."""
    if mask.q_segment_ids is not None:
        is_token = mask.q_segment_ids != 0
        names = ("query", "slot_weight", "shared_query")
        routed = routed.map_fields(names, functools.partial(_keep, is_token))
    seen = _seen_keys(mask, routed.query.shape[1], routed.key.shape[1])
    return routed if seen is None else routed.map_keys(functools.partial(_keep, seen))


def _keep(rows: Bool[AnyArray, "#batch length"], x: Array) -> Array:
    """`x` [batch, length, ...] in these rows, and zero in the others."""
    return jnp.where(rows.reshape(*rows.shape, *(1,) * (x.ndim - 2)), x, 0)


def _seen_keys(mask: Mask, q_len: int, kv_len: int) -> Bool[AnyArray, "#batch kv_len"] | None:
    """Keys that are no padding and not after the last query; None if these are known to be all."""
    seen = None
    if mask.causal:
        last = mask.offsets.max(axis=1, keepdims=True) + (q_len // mask.pieces - 1)
        if not isinstance(last, np.ndarray) or (last < kv_len - 1).any():
            seen = np.arange(kv_len) <= last
    if mask.kv_segment_ids is not None:
        is_token = mask.kv_segment_ids != 0
        seen = is_token if seen is None else seen & is_token
    return seen
