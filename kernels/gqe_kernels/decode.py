"""Attention of a few queries, as in decoding: each group's keys and values are read once.

The logits are whole, not in blocks. The shared head needs no mean of the cache: its query is one
more head of every group, because q · mean(K_g) = mean(q · K_g), and the same holds for the values.
"""

import jax.numpy as jnp

from gqe_kernels import reference
from gqe_kernels.contract import Mask, Routed, Slots
from gqe_kernels.guard import guarded
from gqe_kernels.reference import Heads, Keys


def attend(
    query: Heads,
    key: Keys,
    value: Keys,
    mask: Mask,
    scale: float,
    *,
    last_reads_mean: bool = False,
) -> Heads:
    """Softmax attention with operands in their own dtype, and float32 softmax and accumulation.

    Args:
      last_reads_mean: the last head's query is the same in every group, and the mean over groups of
        its outputs is its attention to the mean over groups of key and value.
    """
    logits = scale * reference.float32_einsum("btghd,bsgd->bghts", query, key)
    if last_reads_mean:
        own, last = logits[:, :, :-1], logits[:, :, -1:]
        mean = jnp.broadcast_to(jnp.mean(last, axis=1, keepdims=True), last.shape)
        logits = jnp.concatenate([own, mean], axis=2)
    visible = reference.visible(mask, query.shape[1], key.shape[1])
    weights = reference.masked_softmax(logits, visible)
    return reference.float32_einsum("bghts,bsgd->btghd", weights.astype(value.dtype), value)


@guarded
def attention(routed: Routed, mask: Mask, scale: float) -> Slots:
    """The slots, with whole logits in memory."""
    shared_query = routed.shared_query
    if mask.pieces > 1 or shared_query is None or routed.shared_key is not None:
        return reference.attention(routed, mask, scale, attend=attend)
    selected = reference.select_experts(routed.query, routed.expert_index)
    shape = (*selected.shape[:3], 1, selected.shape[4])
    every_group = jnp.broadcast_to(shared_query[:, :, None, None], shape)
    heads = jnp.concatenate([selected, every_group], axis=3)
    out = attend(heads, routed.key, routed.value, mask, scale, last_reads_mean=True)
    hard, shared = out[:, :, :, :-1], jnp.mean(out[:, :, :, -1], axis=2)
    return reference.concatenate_slots(hard, routed.slot_weight, shared, routed.query.dtype)
