"""What an implementation need not treat: empty arrays, operands at padding, and varying types."""

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
    """`attention` also for arrays without entries, and inside `shard_map` with its checks on."""

    @functools.wraps(attention)
    def whole(
        routed: Routed, mask: Mask, scale: float, *args: Options.args, **kwargs: Options.kwargs
    ) -> Slots:
        if routed.query.size == 0 or routed.key.size == 0:
            batch, q_len, *_, head_dim = routed.query.shape
            return jnp.zeros((batch, q_len, routed.num_slots, head_dim), routed.query.dtype)
        return attention(*vary_alike((routed, mask)), scale, *args, **kwargs)

    return whole


def without_unseen(routed: Routed, mask: Mask) -> Routed:
    """The operands with zeros at queries of segment 0 and at keys that no query sees.

    Then what stood there reaches no other row, neither its value nor its gradient, even if it was
    NaN: in a product with a weight of zero it would.
    """
    if mask.q_segment_ids is not None:
        is_token = mask.q_segment_ids != 0
        names = ("query", "slot_weight", "shared_query")
        routed = routed.map_fields(names, functools.partial(_keep, is_token))
    seen = _seen_keys(mask, routed.query.shape[1], routed.key.shape[1])
    return routed if seen is None else routed.map_keys(functools.partial(_keep, seen))


def without_padding(slots: Slots, mask: Mask) -> Slots:
    """The slots with zeros, and no gradient, at queries of segment 0."""
    return slots if mask.q_segment_ids is None else _keep(mask.q_segment_ids != 0, slots)


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
