"""The attention of the contract by an engine's paged attention, which knows plain heads alone.

A paged attention takes the same number of query heads for each key/value head, writes the new keys
and values to the pages of its cache, and attends to the pages. A group's k selected heads are the
query heads of its key/value head. The shared head has one more key/value head of its own, which the
cache keeps: the means over the groups, or what `shared_kv` names. It has k query heads, of which
the first is the shared head and the others are zero; their outputs are dropped.

Under tensor parallelism each shard has its part of the groups and a copy of the shared head, in
this order, so that every shard has equally many heads.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from gqe_jax.config import AttentionConfig, ConfigError
from gqe_kernels import Routed, Slots
from gqe_kernels.reference import concatenate_slots, mean_over_groups, select_experts

Heads = Float[Array, "token head head_dim"]
Paged = Callable[[Heads, Heads, Heads], Heads]
"""Attention of the query heads to the pages, with the new keys and values written to them."""


def cache_heads(config: AttentionConfig, shards: int) -> int:
    """The key/value heads of the engine's cache: the groups, and one for the shared head a shard.

    Raises:
      ConfigError: the groups do not divide over the shards.
    """
    if config.num_kv_heads % shards:
        raise ConfigError(
            f"num_kv_heads is {config.num_kv_heads}, which tensor_parallel_size ({shards}) does "
            "not divide; choose one that does, and data parallelism for the other chips"
        )
    return config.num_kv_heads + (shards if config.variant == "gqe" else 0)


def attend(routed: Routed, paged: Paged, shards: int) -> Slots:
    """The slots of tokens that stand along the batch axis, one in each row.

    Args:
      routed: the operands of the new tokens; `q_len` and `kv_len` are 1.
      paged: the engine's attention.
      shards: tensor-parallel shards of the heads.
    """
    selected = select_experts(routed.query, routed.expert_index)
    tokens, _, group, k, head_dim = selected.shape

    def by_shard(x: Array) -> Array:
        return x.reshape(tokens, shards, group // shards, *x.shape[3:])

    query, key, value = map(by_shard, (selected, routed.key, routed.value))
    if routed.shared_query is not None:
        query = _with_shared(query, jnp.pad(routed.shared_query, ((0, 0), (0, k - 1), (0, 0))))
        key = _with_shared(key, _shared(key, routed.shared_key))
        value = _with_shared(value, _shared(value, routed.shared_value))
    out = paged(*(x.reshape(tokens, -1, head_dim) for x in (query, key, value)))
    out = out.astype(query.dtype).reshape(tokens, shards, -1, k, head_dim)
    hard = out[:, :, : group // shards].reshape(tokens, 1, group, k, head_dim)
    shared = None if routed.shared_query is None else out[:, :1, -1, 0]
    return concatenate_slots(hard, routed.slot_weight, shared, query.dtype)


def _shared(
    heads: Float[Array, "token shard group head_dim"], given: Float[Array, "token 1 head_dim"] | None
) -> Float[Array, "token head_dim"]:
    if given is not None:
        return given[:, 0]
    mean = jnp.mean(mean_over_groups(heads), axis=1, dtype=jnp.float32)
    return mean.astype(heads.dtype)


def _with_shared(
    heads: Float[Array, "token shard group *head"], shared: Float[Array, "token *head"]
) -> Float[Array, "token shard head *head"]:
    """Each shard's heads, and behind them a copy of the shared one."""
    shape = (*heads.shape[:2], 1, *heads.shape[3:])
    return jnp.concatenate([heads, jnp.broadcast_to(shared[:, None, None], shape)], axis=2)
