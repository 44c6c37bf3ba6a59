"""Grouped Query Experts and its dense baseline, grouped-query attention, as `nnx.Module`s.

Modules hold parameters and configuration, no other state: a call is a pure function of its
arguments.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gqe_jax.config import AttentionConfig, ConfigError
from gqe_jax.model import routing
from gqe_jax.model.cache import KVCache
from gqe_jax.model.layers import projection, rms_norm, rotary
from gqe_jax.model.sharded_attention import sharded_dense_attention, sharded_routed_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionAux:
    """What a layer returns beside its output; all float32, means over the batch's tokens."""

    load_balancing_loss: Float[Array, ""]
    router_z_loss: Float[Array, ""]
    expert_load: Float[Array, "group expert"]
    router_entropy: Float[Array, "group"]
    router_probs: Float[Array, "batch length group expert"] | None = None
    expert_index: Int[Array, "batch length group k"] | None = None


class _Attention(nnx.Module):
    """Projections and the cache: what GQE and GQA share."""

    def __init__(
        self,
        config: AttentionConfig,
        *,
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        embed, group, expert = config.embed_dim, config.num_kv_heads, config.experts_per_group
        head_dim = config.resolved_head_dim
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        kv_axes = ("embed", "group", None)
        self.config = config
        self.implementation = implementation
        self.query = projection(
            embed, (group, expert, head_dim), ("embed", "group", None, None), **types
        )
        self.key = projection(embed, (group, head_dim), kv_axes, **types)
        self.value = projection(embed, (group, head_dim), kv_axes, **types)
        self.out = projection((config.num_slots, head_dim), embed, ("slot", None, "embed"), **types)
        if config.qk_norm:
            norm = {"epsilon": config.qk_norm_epsilon, "dtype": dtype, "rngs": rngs}
            self.query_norm = rms_norm(head_dim, **norm)
            self.key_norm = rms_norm(head_dim, **norm)

    def _turned_query(self, query, positions):
        """Query heads, normed if the configuration says so, with rotary embedding."""
        query = self.query_norm(query) if self.config.qk_norm else query
        return rotary(query, positions, self.config.rope_theta, self.config.rope_scaling)

    def _turned_key(self, key, positions):
        """As `_turned_query`, of key heads."""
        key = self.key_norm(key) if self.config.qk_norm else key
        return rotary(key, positions, self.config.rope_theta, self.config.rope_scaling)

    def _positions_and_segments(self, x, positions, segment_ids, cache, mask):
        """Defaults: positions count on from the cache; a mask is segment 1 and padding."""
        batch, length, _ = x.shape
        if x.shape[2] != self.config.embed_dim:
            raise ValueError(
                f"x has shape {x.shape}; its last axis must be embed_dim ({self.config.embed_dim})"
            )
        for name, array in (("positions", positions), ("segment_ids", segment_ids), ("mask", mask)):
            if array is not None and array.shape != (batch, length):
                raise ValueError(f"{name} has shape {array.shape}; it must be {(batch, length)}")
        if positions is None:
            start = jnp.zeros(batch, jnp.int32) if cache is None else cache.length
            positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)
        if mask is not None:
            segment_ids = jnp.where(mask, 1 if segment_ids is None else segment_ids, 0)
        return positions, segment_ids

    def _keys_and_masking(self, cache, segment_ids, key, value, shared_key, shared_value):
        """What the queries attend to, with the cache if there is one, and how it is masked."""
        if cache is None:
            masking = {"q_segment_ids": segment_ids, "kv_segment_ids": segment_ids}
            return None, (key, value, shared_key, shared_value), masking
        is_token = None if segment_ids is None else segment_ids != 0
        written = cache.append(key, value, shared_key, shared_value, is_token)
        # A cached row is one segment; the causal mask hides what is not yet written.
        masking = {"q_offset": cache.length}
        if is_token is not None:
            masking["q_segment_ids"] = is_token.astype(jnp.int32)
            masking["kv_segment_ids"] = jnp.ones((len(cache.length), written.capacity), jnp.int32)
        heads = (jnp.swapaxes(x, 1, 2) for x in (written.key, written.value))
        stored = (*heads, written.shared_key, written.shared_value)
        return (
            written,
            tuple(x if x is None else x.astype(key.dtype) for x in stored),
            masking,
        )


class GroupedQueryExperts(_Attention):
    """A mixture of experts over the query heads of grouped-query attention.

    Source: arXiv 2606.20945; the numbered steps are those of its layer. Each group's key and value
    head stays dense, so the cache is GQA's; a router picks `top_k` of the group's query heads for
    each token.

    Args:
      config: the geometry; variant `gqe`, `hard_concat` or `weighted_concat`.
      dtype: type of the computation; None: that of the inputs and parameters promoted. The router
        computes in float32.
      param_dtype: type of the parameters.
      implementation: of `gqe_kernels.routed_attention`; None: the best for the platform.
      rngs: source of the initial parameters.

    Parameters: `query.kernel` [embed, group, expert, head_dim], `key.kernel` and `value.kernel`
    [embed, group, head_dim], `router.kernel` [embed, group, expert], `out.kernel`
    [slot, head_dim, embed]; with variant `gqe`, `shared_query.kernel` [embed, head_dim], and with
    `shared_kv="own"` also `shared_key.kernel` and `shared_value.kernel` [embed, head_dim]; with
    `qk_norm`, `query_norm.scale` and `key_norm.scale` [head_dim].

    Raises:
      ConfigError: the variant is `gqa`.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from gqe_jax import AttentionConfig, GroupedQueryExperts
    >>> config = AttentionConfig(embed_dim=64, num_query_experts=8, num_kv_heads=4, top_k=1)
    >>> layer = GroupedQueryExperts(config, rngs=nnx.Rngs(0))
    >>> y, aux, _ = layer(jnp.ones((2, 16, 64)))
    >>> y.shape, aux.expert_load.shape
    ((2, 16, 64), (4, 2))
    """

    def __init__(
        self,
        config: AttentionConfig,
        *,
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        if config.variant == "gqa":
            raise ConfigError(
                "variant is 'gqa'; GroupedQueryExperts takes gqe, hard_concat or weighted_concat: "
                "use GroupedQueryAttention for the dense baseline"
            )
        super().__init__(
            config, dtype=dtype, param_dtype=param_dtype, implementation=implementation, rngs=rngs
        )
        self.router = projection(
            config.embed_dim,
            (config.num_kv_heads, config.experts_per_group),
            ("embed", "group", None),
            kernel_init=nnx.initializers.normal(config.router_init_std),
            dtype=jnp.float32,
            param_dtype=param_dtype,
            precision=jax.lax.Precision.HIGHEST,
            rngs=rngs,
        )
        if config.variant == "gqe":
            shared = ["query"] + (["key", "value"] if config.shared_kv == "own" else [])
            for name in shared:
                module = projection(
                    config.embed_dim,
                    config.resolved_head_dim,
                    ("embed", None),
                    dtype=dtype,
                    param_dtype=param_dtype,
                    rngs=rngs,
                )
                setattr(self, f"shared_{name}", module)

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        *,
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        cache: KVCache | None = None,
        mask: Bool[Array, "batch length"] | None = None,
        return_routing: bool = False,
        zigzag: bool = False,
    ) -> tuple[Float[Array, "batch length embed"], AttentionAux, KVCache | None]:
        """Causal self-attention.

        Args:
          x: the tokens.
          positions: for the rotary embedding; None: 0, 1, … or on from the cache.
          segment_ids: tokens attend only within their segment; id 0 is padding, which attends to
            nothing and stays out of the router's statistics. With a cache, padding stands to the
            right and a row is one segment.
          cache: keys and values so far; they are attended to, and the new ones appended.
          mask: True for tokens, False for padding; short for segment ids of 1 and 0.
          return_routing: put `router_probs` and `expert_index` into the aux.
          zigzag: the tokens are in the order of `zigzag.py`, and `positions` says so; for
            a mesh with a context axis, over which plain order leaves early shards with less work.

        Returns:
          The output; the aux; the cache with the new tokens, or None without one.

        Raises:
          ValueError: a shape does not fit the configuration.
        """
        config = self.config
        positions, segment_ids = self._positions_and_segments(
            x, positions, segment_ids, cache, mask
        )
        key, value = self._turned_key(self.key(x), positions), self.value(x)  # step 1
        query = self._turned_query(self.query(x), positions)  # step 2

        logits = self.router(x.astype(jnp.float32))  # step 3
        probs = routing.router_probabilities(logits)
        expert_index, selected = routing.select_top_k(probs, config.top_k)

        shared_query = shared_key = shared_value = None
        if config.variant == "gqe":
            shared_query = self._turned_query(self.shared_query(x), positions)
            if config.shared_kv == "own":
                shared_key = self._turned_key(self.shared_key(x), positions)
                shared_value = self.shared_value(x)

        new_cache, keys, masking = self._keys_and_masking(
            cache, segment_ids, key, value, shared_key, shared_value
        )
        key, value, shared_key, shared_value = keys
        if config.variant == "gqe" and config.shared_kv == "group_0":
            shared_key, shared_value = key[:, :, 0], value[:, :, 0]
        slots = sharded_routed_attention(  # steps 4, 5
            query=query,
            key=key,
            value=value,
            expert_index=expert_index,
            slot_weight=routing.slot_weights(selected) if config.variant == "gqe" else None,
            shared_query=shared_query,
            shared_key=shared_key,
            shared_value=shared_value,
            implementation=self.implementation,
            zigzag=zigzag,
            **masking,
        )
        if config.variant == "weighted_concat":
            slots *= selected.reshape(*slots.shape[:3], 1).astype(slots.dtype)

        is_token = (
            jnp.ones(x.shape[:2]) if segment_ids is None else (segment_ids != 0).astype(float)
        )
        load = routing.expert_load(expert_index, config.experts_per_group, is_token)
        aux = AttentionAux(
            load_balancing_loss=routing.load_balancing_loss(probs, load, is_token),
            router_z_loss=routing.router_z_loss(logits, is_token),
            expert_load=load,
            router_entropy=routing.router_entropy(probs, is_token),
            router_probs=probs if return_routing else None,
            expert_index=expert_index if return_routing else None,
        )
        return self.out(slots), aux, new_cache


class GroupedQueryAttention(_Attention):
    """Grouped-query attention of all query heads: the dense baseline.

    Called as `GroupedQueryExperts`; its aux is zero and has no experts.

    Parameters: `query.kernel` [embed, group, expert, head_dim], `key.kernel` and `value.kernel`
    [embed, group, head_dim], `out.kernel` [head, head_dim, embed]; with `qk_norm`,
    `query_norm.scale` and `key_norm.scale` [head_dim].

    Raises:
      ConfigError: the variant is not `gqa`.
    """

    def __init__(self, config: AttentionConfig, **kwargs):
        if config.variant != "gqa":
            raise ConfigError(
                f"variant is {config.variant!r}; GroupedQueryAttention takes gqa: use "
                "GroupedQueryExperts for the routed variants"
            )
        super().__init__(config, **kwargs)

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        *,
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        cache: KVCache | None = None,
        mask: Bool[Array, "batch length"] | None = None,
        return_routing: bool = False,
        zigzag: bool = False,
    ) -> tuple[Float[Array, "batch length embed"], AttentionAux, KVCache | None]:
        """As `GroupedQueryExperts.__call__`; there is no routing to return."""
        del return_routing
        positions, segment_ids = self._positions_and_segments(
            x, positions, segment_ids, cache, mask
        )
        query = self._turned_query(self.query(x), positions)
        key = self._turned_key(self.key(x), positions)
        new_cache, (key, value, _, _), masking = self._keys_and_masking(
            cache, segment_ids, key, self.value(x), None, None
        )
        slots = sharded_dense_attention(
            query=query,
            key=key,
            value=value,
            implementation=self.implementation,
            zigzag=zigzag,
            **masking,
        )
        zero = jnp.zeros((), jnp.float32)
        group = self.config.num_kv_heads
        aux = AttentionAux(zero, zero, jnp.zeros((group, 0)), jnp.zeros(group))
        return self.out(slots), aux, new_cache


def make_attention(
    config: AttentionConfig, **kwargs
) -> GroupedQueryExperts | GroupedQueryAttention:
    """The layer that `config.variant` names."""
    kind = GroupedQueryAttention if config.variant == "gqa" else GroupedQueryExperts
    return kind(config, **kwargs)
