"""An independent Grouped Query Experts, written from arXiv 2606.20945: float64, head by head.

`xp` is NumPy for values, or autograd's NumPy for gradients of the same lines: nothing of JAX.
"""

from types import ModuleType

import autograd
import autograd.numpy
import numpy as np


def query_positions(batch, q_len, q_offset):
    """[batch, q_len], among the keys: each piece of the queries counts on from its offset."""
    offsets = np.asarray(q_offset)
    if offsets.ndim < 2:
        offsets = np.broadcast_to(offsets, (batch,))[:, None]
    in_piece = np.arange(q_len // offsets.shape[1])
    return (offsets[:, :, None] + in_piece).reshape(batch, q_len)


def visible(position, kv_len, causal, q_segment, kv_segment):
    """The mask [q_len, kv_len] of one row of the batch."""
    mask = np.ones((len(position), kv_len), bool)
    if causal:
        mask &= np.arange(kv_len) <= position[:, None]
    if q_segment is not None:
        mask &= (q_segment[:, None] == kv_segment[None, :]) & (q_segment[:, None] != 0)
    return mask


def one_head(xp: ModuleType, q, k, v, mask, scale):
    """q [T, D], k and v [S, D] → [T, D]; a row that sees nothing is zero."""
    logits = (q @ k.T) * scale
    logits = xp.where(mask, logits, -np.inf)
    sees = mask.any(axis=1, keepdims=True)
    top = xp.max(xp.where(sees, logits, 0.0), axis=1, keepdims=True)
    weights = xp.where(mask, xp.exp(xp.where(mask, logits - top, 0.0)), 0.0)
    total = xp.where(sees, xp.sum(weights, axis=1, keepdims=True), 1.0)
    return (weights / total) @ v


def routed_attention(
    xp: ModuleType,
    query,
    key,
    value,
    expert_index,
    slot_weight=None,
    shared_query=None,
    shared_key=None,
    shared_value=None,
    *,
    scale=None,
    causal=True,
    q_segment_ids=None,
    kv_segment_ids=None,
    q_offset=0,
):
    """The slots, by loops over batch, group and rank."""
    batch, q_len, groups, _, head_dim = query.shape
    kv_len, k = key.shape[1], expert_index.shape[3]
    scale = head_dim**-0.5 if scale is None else scale
    positions = query_positions(batch, q_len, q_offset)
    rows = []
    for b in range(batch):
        segments = (None, None)
        if q_segment_ids is not None:
            segments = (q_segment_ids[b], kv_segment_ids[b])
        mask = visible(positions[b], kv_len, causal, *segments)
        slots = []
        for g in range(groups):
            for j in range(k):
                q = query[b, np.arange(q_len), g, expert_index[b, :, g, j]]
                slots.append(one_head(xp, q, key[b, :, g], value[b, :, g], mask, scale))
        hard = list(slots)
        if slot_weight is not None:
            slots.append(
                sum(
                    slot_weight[b, :, g, j][:, None] * hard[g * k + j]
                    for g in range(groups)
                    for j in range(k)
                )
            )
        if shared_query is not None:
            if shared_key is None:
                sk = sum(key[b, :, g] for g in range(groups)) / groups
                sv = sum(value[b, :, g] for g in range(groups)) / groups
            else:
                sk, sv = shared_key[b], shared_value[b]
            slots.append(one_head(xp, shared_query[b], sk, sv, mask, scale))
        rows.append(xp.stack(slots, axis=1))
    return xp.stack(rows)


def dense_attention(xp: ModuleType, query, key, value, **masking):
    """Every head of every group attends: GQA."""
    batch, q_len, groups, experts, _ = query.shape
    every = np.broadcast_to(np.arange(experts), (batch, q_len, groups, experts))
    return routed_attention(xp, query, key, value, every, **masking)


def rotate(xp: ModuleType, x, positions, theta):
    """Half-split rotary embedding of [T, D]."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return xp.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], axis=-1
    )


def router(xp: ModuleType, params, x):
    """Probabilities [B, T, G, M]: softmax inside each group, before selection."""
    logits = xp.einsum("btd,dgm->btgm", x, params["router"])
    exp = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    return exp / xp.sum(exp, axis=-1, keepdims=True)


def select(params, x, k):
    """The k most probable experts of each group; ties go to the lower index."""
    return np.argsort(-router(np, params, x), axis=-1, kind="stable")[..., :k]


def layer(xp: ModuleType, config, params, x, index, segment_ids=None):
    """The whole layer [B, T, d] → ([B, T, d], load-balancing loss), all four variants.

    `params` maps the names of the parameters to float64 arrays; `index` is `select`'s.
    """
    batch, length, _ = x.shape
    groups, experts, k = config.num_kv_heads, config.experts_per_group, config.top_k
    positions = np.arange(length)

    def heads(name, *index):
        weight = params[name]
        for i in index:
            weight = weight[:, i]
        return [x[b] @ weight for b in range(batch)]

    def rotated(projected, kind="query"):
        if config.qk_norm:
            square = [xp.mean(head**2, axis=-1, keepdims=True) for head in projected]
            scale = params[f"{kind}_norm"]
            projected = [
                head / xp.sqrt(mean + config.qk_norm_epsilon) * scale
                for head, mean in zip(projected, square, strict=True)
            ]
        return xp.stack([rotate(xp, head, positions, config.rope_theta) for head in projected])

    q = xp.stack(
        [
            xp.stack([rotated(heads("query", g, m)) for m in range(experts)], axis=2)
            for g in range(groups)
        ],
        axis=2,
    )
    key = xp.stack([rotated(heads("key", g), "key") for g in range(groups)], axis=2)
    value = xp.stack([xp.stack(heads("value", g)) for g in range(groups)], axis=2)
    segments = {"q_segment_ids": segment_ids, "kv_segment_ids": segment_ids}
    if config.variant == "gqa":
        slots = dense_attention(xp, q, key, value, **segments)
        return xp.einsum("btsd,sde->bte", slots, params["out"]), 0.0

    p = router(xp, params, x)
    b, t, g, _ = np.ogrid[tuple(map(slice, index.shape))]
    selected = p[b, t, g, index]

    extra = {}
    if config.variant == "gqe":
        extra["slot_weight"] = selected / xp.sum(selected, axis=(2, 3), keepdims=True)
        extra["shared_query"] = rotated(heads("shared_query"))
        if config.shared_kv == "group_0":
            extra |= {"shared_key": key[:, :, 0], "shared_value": value[:, :, 0]}
        if config.shared_kv == "own":
            extra["shared_key"] = rotated(heads("shared_key"), "key")
            extra["shared_value"] = xp.stack(heads("shared_value"))
    slots = routed_attention(xp, q, key, value, index, **extra, **segments)
    if config.variant == "weighted_concat":
        slots = slots * selected.reshape(batch, length, groups * k, 1)

    is_token = np.ones((batch, length), bool) if segment_ids is None else segment_ids != 0
    losses = []
    for g in range(groups):
        f = [np.mean((index[:, :, g] == m).any(axis=-1)[is_token]) for m in range(experts)]
        mean_p = [xp.mean(p[:, :, g, m][is_token]) for m in range(experts)]
        losses.append(experts * sum(a * b for a, b in zip(f, mean_p, strict=True)))
    y = xp.einsum("btsd,sde->bte", slots, params["out"])
    return y, sum(losses) / groups


def gradients(function, arguments):
    """Gradients of `function(xp, *arguments)`; `arguments` is a tuple of float64 trees."""
    every = tuple(range(len(arguments)))
    return autograd.grad(lambda *a: function(autograd.numpy, *a), every)(*arguments)
