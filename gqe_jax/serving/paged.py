"""The attention of the contract by an engine's paged attention, which knows plain heads alone.

A paged attention takes the same number of query heads for each key/value head, writes the new keys
and values to the pages of its cache, and attends to the pages. A group's k selected heads are the
query heads of its key/value head. The shared head has one more key/value head of its own, which the
cache keeps: the means over the groups, or what `shared_kv` names. It has k query heads, of which
the first is the shared head and the others are zero; their outputs are dropped.

Under tensor parallelism each shard has its part of the groups and a copy of the shared head, in
this order, so that every shard has equally many heads.

The engine's kernel computes an even number of bfloat16 query heads for each key/value head, and
vectors of 128 features. So where k is odd and a head has at most 64 features, two key/value heads
stand in one, side by side: a query is zero in the other's half, and of its output its own half
counts. Otherwise k = 1 would cost as much as k = 2.
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
Queries = Float[Array, "token shard kv_head k head_dim"]
Keys = Float[Array, "token shard kv_head head_dim"]
_LANES = 128


def in_pairs(config: AttentionConfig) -> bool:
    """Whether two key/value heads stand in one."""
    routed = config.variant != "gqa"
    return routed and config.top_k % 2 == 1 and 2 * config.resolved_head_dim <= _LANES


def cache_heads(config: AttentionConfig, shards: int) -> tuple[int, int]:
    """The number of key/value heads of the engine's cache, and their width.

    Raises:
      ConfigError: the groups do not divide over the shards.
    """
    if config.num_kv_heads % shards:
        raise ConfigError(
            f"num_kv_heads is {config.num_kv_heads}, which tensor_parallel_size ({shards}) does "
            "not divide; choose one that does, and data parallelism for the other chips"
        )
    heads = config.num_kv_heads // shards + (config.variant == "gqe")
    if in_pairs(config):
        return shards * -(-heads // 2), 2 * config.resolved_head_dim
    return shards * heads, config.resolved_head_dim


def attend(routed: Routed, paged: Paged, shards: int, *, pairs: bool) -> Slots:
    """The slots of tokens that stand along the batch axis, one in each row.

    Args:
      routed: the operands of the new tokens; `q_len` and `kv_len` are 1.
      paged: the engine's attention.
      shards: tensor-parallel shards of the heads.
      pairs: whether two key/value heads stand in one.
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
    function = _paged_in_pairs if pairs else _paged
    out = function(paged, query, key, value).astype(query.dtype)
    hard = out[:, :, : group // shards].reshape(tokens, 1, group, k, head_dim)
    shared = None if routed.shared_query is None else out[:, :1, -1, 0]
    return concatenate_slots(hard, routed.slot_weight, shared, query.dtype)


def _paged(paged: Paged, query: Queries, key: Keys, value: Keys) -> Queries:
    flat = (x.reshape(len(x), -1, x.shape[-1]) for x in (query, key, value))
    return paged(*flat).reshape(query.shape)


def _paged_in_pairs(paged: Paged, query: Queries, key: Keys, value: Keys) -> Queries:
    tokens, shards, heads, k, head_dim = query.shape
    odd = heads % 2
    key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, odd), (0, 0))) for x in (key, value))
    key, value = (x.reshape(tokens, shards, -1, 2 * head_dim) for x in (key, value))
    query = jnp.pad(query, ((0, 0), (0, 0), (0, odd), (0, 0), (0, 0)))
    query = query.reshape(tokens, shards, -1, 2, k, 1, head_dim)
    own_half = jnp.eye(2, dtype=bool)[:, None, :, None]
    query = jnp.where(own_half, query, 0).reshape(tokens, shards, -1, 2 * k, 2 * head_dim)
    out = _paged(paged, query, key, value).reshape(tokens, shards, -1, 2, k, 2, head_dim)
    out = jnp.stack([out[:, :, :, i, :, i] for i in range(2)], axis=3)
    return out.reshape(tokens, shards, -1, k, head_dim)[:, :, :heads]


def _shared(
    heads: Float[Array, "token shard group head_dim"],
    given: Float[Array, "token 1 head_dim"] | None,
) -> Float[Array, "token head_dim"]:
    if given is not None:
        return given[:, 0]
    mean = jnp.mean(mean_over_groups(heads), axis=1, dtype=jnp.float32)
    return mean.astype(heads.dtype)


def _with_shared(
    heads: Float[Array, "token shard group *head"], shared: Float[Array, "token *head"]
) -> Float[Array, "token shard kv_head *head"]:
    """Each shard's heads, and behind them a copy of the shared one."""
    shape = (*heads.shape[:2], 1, *heads.shape[3:])
    return jnp.concatenate([heads, jnp.broadcast_to(shared[:, None, None], shape)], axis=2)
