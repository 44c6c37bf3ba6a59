"""The semantics of the contract in plain float32 JAX: the oracle of every other implementation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gqe_kernels.contract import AnyArray, Mask, Routed, Slots, split_pieces
from gqe_kernels.guard import guarded

Heads = Float[Array, "batch q_len group head head_dim"]
Keys = Float[Array, "batch kv_len group head_dim"]
AxisNames = str | tuple[str, ...] | None
Attend = Callable[[Heads, Keys, Keys, Mask, float], Heads]


def visible(mask: Mask, q_len: int, kv_len: int) -> Bool[Array, "#batch 1 1 q_len kv_len"]:
    """Which keys each query sees, for queries in one piece; broadcasts over groups and heads."""
    seen = jnp.ones((1, q_len, kv_len), bool)
    if mask.causal:
        position = jnp.asarray(mask.offsets) + jnp.arange(q_len)
        seen &= jnp.arange(kv_len) <= position[:, :, None]
    if mask.q_segment_ids is not None and mask.kv_segment_ids is not None:
        same = mask.q_segment_ids[:, :, None] == mask.kv_segment_ids[:, None, :]
        seen = seen & same & (mask.q_segment_ids != 0)[:, :, None]
    return seen[:, None, None]


def attend(query: Heads, key: Keys, value: Keys, mask: Mask, scale: float) -> Heads:
    """Softmax attention of every head to the key and value of its group."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    high = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("btghd,bsgd->bghts", query, key, precision=high) * scale
    weights = masked_softmax(logits, visible(mask, query.shape[1], key.shape[1]))
    return jnp.einsum("bghts,bsgd->btghd", weights, value, precision=high)


def masked_softmax(
    logits: Float[Array, "batch group head q_len kv_len"],
    mask: Bool[Array, "#batch #group #head q_len kv_len"],
) -> Float[Array, "batch group head q_len kv_len"]:
    """Softmax over the visible keys; a row that sees none is zero."""
    row_max = jax.lax.stop_gradient(
        jnp.max(logits, axis=-1, keepdims=True, where=mask, initial=-1e30)
    )
    weights = jnp.exp(jnp.where(mask, logits - row_max, -jnp.inf))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def float32_einsum(subscripts: str, x: Array, y: Array) -> Array:
    """A product of operands in their own dtype, summed in float32.

    XLA:CPU has no code for some shapes of bfloat16 operands with a float32 result, as in decoding,
    so there the operands are float32, in which their products are the same.
    """
    in_float32 = functools.partial(jnp.einsum, subscripts, preferred_element_type=jnp.float32)
    if x.dtype == jnp.float32:
        return in_float32(x, y)
    on_cpu = lambda x, y: in_float32(x.astype(jnp.float32), y.astype(jnp.float32))  # noqa: E731
    return jax.lax.platform_dependent(x, y, cpu=on_cpu, default=in_float32)


def select_experts(
    query: Float[Array, "batch q_len group expert head_dim"],
    expert_index: Int[Array, "batch q_len group k"] | None,
) -> Float[Array, "batch q_len group k head_dim"]:
    """The queries of the selected experts; by comparisons, so that no transpose is a scatter."""
    if expert_index is None:
        return query
    experts = range(query.shape[3])

    def of_rank(index: Any) -> Any:
        chosen = query[:, :, :, 0]
        for m in experts[1:]:
            chosen = jnp.where(index[..., None] == m, query[:, :, :, m], chosen)
        return chosen

    return jnp.stack([of_rank(expert_index[..., j]) for j in range(expert_index.shape[3])], axis=3)


def expand_experts(
    selected: Float[Array, "batch q_len group k head_dim"],
    expert_index: Int[Array, "batch q_len group k"] | None,
    experts: int,
) -> Float[Array, "batch q_len group expert head_dim"]:
    """The transpose of `select_experts`: zeros for the experts that are not selected."""
    if expert_index is None:
        return selected
    chosen = expert_index[..., None] == jnp.arange(experts)
    each = jnp.where(chosen[..., None], selected[:, :, :, :, None], 0)
    return jnp.sum(each, axis=3)  # of one term that is not zero


def mean_over_groups(
    x: Float[Array, "batch kv_len group head_dim"], axis_names: AxisNames = None
) -> Float[Array, "batch kv_len head_dim"]:
    """The keys or values that the shared head attends to; summed in float32.

    A sum of slices of the flat array: for a reduction XLA:TPU copies all of `x` into another
    layout.

    Args:
      axis_names: mesh axes over which the groups are sharded, inside `shard_map`.
    """
    group, head_dim = x.shape[2:]
    flat = x.reshape(*x.shape[:2], group * head_dim)
    heads = [flat[:, :, g * head_dim : (g + 1) * head_dim] for g in range(group)]
    heads = [head.astype(jnp.float32) for head in heads]
    mean = sum(heads[1:], start=heads[0]) / group
    return (jax.lax.pmean(mean, axis_names) if axis_names else mean).astype(x.dtype)


def pad_rows(x: AnyArray | None, rows: int) -> Any:
    """`x` [batch, length, ...] with so many rows of zeros behind its last."""
    if x is None or rows == 0:
        return x
    return jnp.pad(x, ((0, 0), (0, rows)) + ((0, 0),) * (x.ndim - 2))


def shared_operands(
    routed: Routed, axis_names: AxisNames = None
) -> tuple[Float[Array, "batch kv_len head_dim"], Float[Array, "batch kv_len head_dim"]]:
    """The key and the value that the shared head attends to.

    Args:
      axis_names: mesh axes over which the groups are sharded, inside `shard_map`.
    """
    if routed.shared_key is not None and routed.shared_value is not None:
        return routed.shared_key, routed.shared_value
    return mean_over_groups(routed.key, axis_names), mean_over_groups(routed.value, axis_names)


@guarded
def attention(routed: Routed, mask: Mask, scale: float, *, attend: Attend = attend) -> Slots:
    """The slots, with `attend` for the attention itself."""
    if mask.pieces > 1:
        pieces = (attention(*piece, scale, attend=attend) for piece in split_pieces(routed, mask))
        return jnp.concatenate(list(pieces), axis=1)
    selected = select_experts(routed.query, routed.expert_index)
    hard = attend(selected, routed.key, routed.value, mask, scale)
    shared = None
    if routed.shared_query is not None:
        key, value = shared_operands(routed)
        query = routed.shared_query[:, :, None, None]
        shared = attend(query, key[:, :, None], value[:, :, None], mask, scale)[:, :, 0, 0]
    return concatenate_slots(hard, routed.slot_weight, shared, routed.query.dtype)


def concatenate_slots(
    hard: Float[Array, "batch q_len group k head_dim"],
    slot_weight: Float[Array, "batch q_len group k"] | None,
    shared: Float[Array, "batch q_len head_dim"] | None,
    dtype: jnp.dtype,
) -> Slots:
    """The hard, weighted and shared slots, where there are such, in the order of W_O."""
    batch, q_len, *_, head_dim = hard.shape
    slots = [hard.reshape(batch, q_len, -1, head_dim)]
    if slot_weight is not None:
        weighted = jnp.sum(
            slot_weight.astype(jnp.float32)[..., None] * hard.astype(jnp.float32), axis=(2, 3)
        )
        slots.append(weighted[:, :, None])
    if shared is not None:
        slots.append(shared[:, :, None])
    return jnp.concatenate([slot.astype(dtype) for slot in slots], axis=2)
