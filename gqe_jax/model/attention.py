"""Grouped Query Experts and its dense baseline, grouped-query attention, as `nnx.Module`s.

Source: Grouped Query Experts, arXiv 2606.20945; the numbers of the equations are ours. An expert is
a query head. For one token x [embed_dim]; g counts the num_kv_heads groups, m the
num_query_experts / num_kv_heads experts of a group, j = 1..top_k the ranks of those that the token
selects; @ contracts embed_dim; a head has head_dim features, by default embed_dim /
num_query_experts:

(1) key[g] = rope(x @ W_key[g]),  value[g] = x @ W_value[g]
(2) query[g, m] = rope(x @ W_query[g, m]),  shared_query = rope(x @ W_shared_query)
(3) probs[g] = softmax over m of x @ W_router[g],
    selected[g, j], expert_index[g, j] = the j-th largest of probs[g] and its index m
(4) hard[g, j] = attend(query[g, expert_index[g, j]], key[g], value[g]),
    shared = attend(shared_query, mean over g of key[g], mean over g of value[g])
(5) slot_weight[g, j] = selected[g, j] / sum over all groups and ranks of selected,
    weighted = sum over g, j of slot_weight[g, j] * hard[g, j],
    y = concatenate(hard[0, 1..k], hard[1, 1..k], ..., weighted, shared) @ W_out

`attend(q, key, value)` is softmax(q . key / sqrt(head_dim)) value, where key and value are those of
all tokens up to and including q's in its segment; padding, segment 0, attends to nothing and has
slots of zeros. `rope` rotates feature i of a head with feature i + head_dim / 2 by the angle
position * rope_theta ** (-2 i / head_dim): (a, b) becomes (a cos - b sin, b cos + a sin);
`rope_scaling` changes these frequencies. With `qk_norm`, queries and keys are normed before `rope`:
x / sqrt(mean(x ** 2) + qk_norm_epsilon) * scale over head_dim, with one scale [head_dim] for all
queries, the shared one included, and one for all keys.

With `selection_bias`, the order in (3) is that of the logits plus a bias [g, m]; selected[g, j]
stays the probability of the j-th.

Variants: `gqe` has all slots. `hard_concat` has the hard slots alone, so its router learns from the
losses in the aux alone. `weighted_concat` has the hard slots, each times selected[g, j]. `gqa` has
no router; its slots are attend(query[g, m], key[g], value[g]), group-major. The shared head attends
as in (4) with `shared_kv` `mean`; to key[0] and value[0] with `group_0`; and with `own` to
rope(x @ W_shared_key) and x @ W_shared_value.

Modules hold parameters and configuration and no other state: a call is a pure function.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from gqe_jax.config import AttentionConfig, ConfigError
from gqe_jax.model import routing
from gqe_jax.model.cache import KVCache, with_cache
from gqe_jax.model.layers import (
    apply_rope,
    logical_axes,
    near_each_other,
    projection,
    rms_norm,
    rope_angles,
    scaled_normal,
    with_last_rows,
)
from gqe_jax.model.sharded_attention import sharded
from gqe_jax.model.sharded_projection import sharded_project
from gqe_jax.sharding import explicit_axes
from gqe_kernels import Attention, Implementation, Routed, Slots, best_attention, get_attention
from gqe_kernels.contract import AnyArray, default_scale
from gqe_kernels.projection import Projected, Projection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionAux:
    """What a layer returns with its output; all float32, means over the batch's tokens."""

    __no_type_check__ = True  # JAX puts other things than arrays at the leaves of a tree

    load_balancing_loss: Float[Array, ""]
    router_z_loss: Float[Array, ""]
    expert_load: Float[Array, "group expert"]
    router_entropy: Float[Array, "group"]
    mean_probs: Float[Array, "group expert"]
    router_probs: Float[Array, "batch length group expert"] | None = None
    expert_index: Int[Array, "batch length group k"] | None = None


class _Attention(nnx.Module):
    """What both layers share: keys, values, W_out, and the call around `slots`."""

    slots: Callable[..., tuple[Slots, AttentionAux, KVCache | None]]
    router: nnx.LinearGeneral
    selection_bias: nnx.Param

    def __init__(
        self,
        config: AttentionConfig,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        embed, group, expert = config.embed_dim, config.num_kv_heads, config.experts_per_group
        head_dim = config.resolved_head_dim
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        kv_axes = ("embed", "group", None)
        self.config = config
        self.implementation = get_attention(implementation)
        self.query = projection(
            embed,
            (group, expert, head_dim),
            ("embed", "group", None, None),
            kernel_init=near_each_other(
                scaled_normal(embed),
                (group, expert, head_dim),
                1.0 if config.variant == "gqa" else config.expert_init_spread,
            ),
            **types,
        )
        self.key = projection(embed, (group, head_dim), kv_axes, **types)
        self.value = projection(embed, (group, head_dim), kv_axes, **types)
        out_init = scaled_normal(config.num_slots * head_dim)
        extra = head_dim * (2 if config.variant == "gqe" else 0)
        self.out = projection(
            (config.num_slots, head_dim),
            embed,
            ("slot", None, "embed"),
            kernel_init=with_last_rows(out_init, extra, config.extra_slot_scale),
            **types,
        )
        if config.qk_norm:
            norm = {"epsilon": config.qk_norm_epsilon, "dtype": dtype, "rngs": rngs}
            self.query_norm = rms_norm(head_dim, **norm)
            self.key_norm = rms_norm(head_dim, **norm)

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        *,
        positions: Int[AnyArray, "batch length"] | None = None,
        segment_ids: Int[AnyArray, "batch length"] | None = None,
        cache: KVCache | None = None,
        mask: Bool[AnyArray, "batch length"] | None = None,
        return_routing: bool = False,
    ) -> tuple[Float[Array, "batch length embed"], AttentionAux, KVCache | None]:
        """Causal self-attention.

        Args:
          x: the tokens.
          positions: for RoPE; None: 0, 1, ... along the row, across segments, or on from the cache.
          segment_ids: tokens attend only within their segment; id 0 is padding, which attends to
            nothing and is left out of the router's statistics. With a cache, padding stands to the
            right and a row is one segment.
          cache: the keys and values so far, to which the tokens attend; the new ones are appended.
          mask: True for tokens, False for padding, where it sets the segment id to 0.
          return_routing: return `router_probs` and `expert_index` in the aux; gqa has none.

        Returns:
          The output; the aux; the cache with the new tokens, or None without one.

        Raises:
          ValueError: a shape does not fit the configuration.
        """
        for name, array in (("positions", positions), ("segment_ids", segment_ids), ("mask", mask)):
            if array is not None and array.shape != x.shape[:2]:
                raise ValueError(f"{name} has shape {array.shape}; it must be {x.shape[:2]}")
        if mask is not None:
            segment_ids = jnp.where(mask, 1 if segment_ids is None else segment_ids, 0)
        if explicit := explicit_axes(jax.sharding.get_abstract_mesh()):
            return self._in_auto_mode(explicit, x, positions, segment_ids, cache, return_routing)
        if segment_ids is not None:
            x = jnp.where((segment_ids != 0)[:, :, None], x, 0)  # NaN at padding reaches no weight
        with jax.named_scope("projections"):
            slots, aux, cache = self.slots(
                x,
                positions=positions,
                segment_ids=segment_ids,
                cache=cache,
                return_routing=return_routing,
            )
        return self.project_slots(slots), aux, cache

    @jax.named_scope("out")
    def project_slots(self, slots: Slots) -> Float[Array, "batch length embed"]:
        """The product of the slots with W_out (5).

        It is that of two matrices: for one over slots and features XLA:TPU copies the slots, and
        for such a weight their gradient, which the barrier prevents.
        """
        if type(self.out) is not nnx.LinearGeneral:
            return self.out(slots)
        dtype = self.out.dtype or jnp.result_type(slots, self.out.kernel[...])
        width = self.config.num_slots * self.config.resolved_head_dim
        weight = self.out.kernel[...].astype(dtype).reshape(width, self.config.embed_dim)
        weight = jax.lax.optimization_barrier(weight)
        return slots.astype(dtype).reshape(*slots.shape[:2], width) @ weight

    def _in_auto_mode(self, explicit, x, positions, segment_ids, cache, return_routing):
        """The call, in which XLA chooses the shardings between the arguments and the results.

        The output and the cache are sharded as the input and the cache given are.
        """
        graphdef, params = nnx.split(self)

        def call(params, x, positions, segment_ids, cache):
            return nnx.merge(graphdef, params)(
                x,
                positions=positions,
                segment_ids=segment_ids,
                cache=cache,
                return_routing=return_routing,
            )

        whole: Any = PartitionSpec()
        routed = whole if return_routing and self.config.variant != "gqa" else None
        aux = AttentionAux(whole, whole, whole, whole, whole, routed, routed)
        spec_of = lambda leaf: jax.typeof(leaf).sharding.spec  # noqa: E731
        specs = spec_of(x), aux, jax.tree.map(spec_of, cache)
        in_auto_mode: Any = jax.sharding.auto_axes(call, axes=explicit, out_sharding=specs)
        return in_auto_mode(params, x, positions, segment_ids, cache)

    def _positions(self, x, positions, cache):
        """The positions [batch, length]; [1, length] where every row has the same, known ones."""
        if x.shape[2] != self.config.embed_dim:
            raise ValueError(
                f"x has shape {x.shape}; its last axis must be embed_dim ({self.config.embed_dim})"
            )
        if positions is not None:
            return positions
        start = jnp.zeros(1, jnp.int32) if cache is None else cache.length
        return start[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)

    def _project(
        self,
        x: Float[Array, "batch length embed"],
        positions: Int[AnyArray, "#batch length"],
        *,
        means: bool,
    ) -> Projected:
        """Equations (1) and (2), the logits of (3), and the experts that they select.

        Args:
          means: make the means that the shared head attends to, if that can be done here.
        """
        config, has_shared = self.config, hasattr(self, "shared_query")
        routes = config.variant != "gqa"
        bias = self.selection_bias[...] if config.selection_bias else None
        if not self._in_one_pass(x):
            logits = index = None
            if routes:
                logits = self.router(x.astype(jnp.float32))
                biased = logits if bias is None else logits + bias
                index = routing.select_top_k(biased, config.top_k)
            routed = Routed(
                self._rope("query", x, positions),
                self._rope("key", x, positions),
                self.value(x),
                index,
                shared_query=self._rope("shared_query", x, positions) if has_shared else None,
            )
            return Projected(routed, logits, index)
        dtype = self.query.dtype or jnp.result_type(x, self.query.kernel[...])
        weight = lambda name: getattr(self, name).kernel[...].astype(dtype)  # noqa: E731
        scale = lambda name: getattr(self, name).scale[...] if config.qk_norm else None  # noqa: E731
        angle = rope_angles(
            positions, config.resolved_head_dim, config.rope_theta, config.rope_scaling
        )
        projection = Projection(
            query=weight("query"),
            key=weight("key"),
            value=weight("value"),
            router=self.router.kernel[...].astype(jnp.float32) if routes else None,
            shared_query=weight("shared_query") if has_shared else None,
            cos=jnp.cos(angle),
            sin=jnp.sin(angle),
            selection_bias=bias,
            query_scale=scale("query_norm"),
            key_scale=scale("key_norm"),
            top_k=config.top_k,
            epsilon=config.qk_norm_epsilon,
            means=means,
        )
        return sharded_project(x.astype(dtype), projection)

    def _in_one_pass(self, x: Float[Array, "batch length embed"]) -> bool:
        """Whether one function may make all heads: `project` knows plain weights alone.

        Decoding and implementations that are named take the projections as they stand.
        """
        names = ("query", "key", "value", "router", "shared_query")
        names = [name for name in names if hasattr(self, name)]
        plain = all(type(getattr(self, name)) is nnx.LinearGeneral for name in names)
        return self.implementation is best_attention and len(x) > 0 and x.shape[1] > 1 and plain

    def _rope(self, name: str, x, positions):
        """The heads of projection `name`, normed if `qk_norm`, with RoPE."""
        config, heads = self.config, getattr(self, name)(x)
        if config.qk_norm:
            norm = self.key_norm if name.endswith("key") else self.query_norm
            heads = norm(heads).astype(heads.dtype)  # the norm's scale is float32
        return apply_rope(heads, positions, config.rope_theta, config.rope_scaling)


class GroupedQueryExperts(_Attention):
    """A mixture of experts over the query heads of grouped-query attention, arXiv 2606.20945.

    Each group's key and value head stays dense, so the cache is that of grouped-query attention; a
    router picks `top_k` of the group's query heads for each token.

    Args:
      config: the geometry; variant `gqe`, `hard_concat` or `weighted_concat`.
      dtype: type of the computation; None: that of the inputs and parameters promoted. The router
        computes in float32.
      param_dtype: type of the parameters.
      implementation: as in `gqe_kernels.routed_attention`; None: the best for the platform.
      rngs: source of the initial parameters.

    Parameters: `query.kernel` [embed, group, expert, head_dim], `key.kernel` and `value.kernel`
    [embed, group, head_dim], `router.kernel` [embed, group, expert], `out.kernel`
    [slot, head_dim, embed]; with variant `gqe`, `shared_query.kernel` [embed, head_dim], and with
    `shared_kv="own"` also `shared_key.kernel` and `shared_value.kernel` [embed, head_dim]; with
    `qk_norm`, `query_norm.scale` and `key_norm.scale` [head_dim]; with `selection_bias`,
    `selection_bias` [group, expert], float32, which gets no gradient.

    Raises:
      ConfigError: the variant is `gqa`.
      ValueError: there is no implementation of this name.

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
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        implementation: Implementation | None = None,
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
        if config.selection_bias:
            zeros = jnp.zeros((config.num_kv_heads, config.experts_per_group), jnp.float32)
            self.selection_bias = nnx.Param(zeros, **logical_axes("group", None))
        if config.variant == "gqe":
            shared = functools.partial(
                projection,
                config.embed_dim,
                config.resolved_head_dim,
                ("embed", None),
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            self.shared_query = shared()
            if config.shared_kv == "own":
                self.shared_key, self.shared_value = shared(), shared()

    def slots(
        self,
        x: Float[Array, "batch length embed"],
        *,
        attention: Attention | None = None,
        positions: Int[AnyArray, "batch length"] | None = None,
        segment_ids: Int[AnyArray, "batch length"] | None = None,
        cache: KVCache | None = None,
        return_routing: bool = False,
    ) -> tuple[Slots, AttentionAux, KVCache | None]:
        """The slots that W_out multiplies, equations (1) to (5) but for the product.

        Args:
          attention: a function of the contract; None: `sharded(self.implementation)`.
          x, positions, segment_ids, cache, return_routing: as in a call of the layer.

        Returns:
          The slots, the aux and the cache, as in a call of the layer.
        """
        config = self.config
        positions = self._positions(x, positions, cache)
        means = config.variant == "gqe" and config.shared_kv == "mean" and cache is None
        projected = self._project(x, positions, means=means)  # (1), (2)
        routed, logits, expert_index = projected.routed, projected.logits, projected.expert_index
        assert logits is not None  # there is a router
        assert expert_index is not None
        probs = routing.router_probabilities(logits)  # (3)
        selected = routing.probabilities_of(probs, expert_index)
        if config.variant == "gqe":
            routed = dataclasses.replace(routed, slot_weight=routing.slot_weights(selected))
            if config.shared_kv == "own":
                shared_key = self._rope("shared_key", x, positions)
                routed = dataclasses.replace(
                    routed, shared_key=shared_key, shared_value=self.shared_value(x)
                )
        routed, mask, cache = with_cache(routed, segment_ids, cache)
        if config.variant == "gqe" and config.shared_kv == "group_0":
            routed = dataclasses.replace(
                routed, shared_key=routed.key[:, :, 0], shared_value=routed.value[:, :, 0]
            )
        attention = attention or sharded(self.implementation)
        slots = attention(routed, mask, default_scale(config.resolved_head_dim))  # (4), (5)
        if config.straight_through:
            one = routing.straight_through(selected).reshape(*slots.shape[:2], -1)
            others = config.num_slots - one.shape[-1]
            one = jnp.pad(one, ((0, 0), (0, 0), (0, others)), constant_values=1.0)
            slots *= one[..., None].astype(slots.dtype)
        if config.variant == "weighted_concat":
            slots *= selected.reshape(*slots.shape[:3], 1).astype(slots.dtype)

        is_token = True if segment_ids is None else segment_ids != 0
        is_token = jnp.broadcast_to(jnp.asarray(is_token, jnp.float32), x.shape[:2])
        load = routing.expert_load(expert_index, config.experts_per_group, is_token)
        mean_probs = routing.mean_probabilities(probs, is_token)
        aux = AttentionAux(
            load_balancing_loss=routing.load_balancing_loss(mean_probs, load),
            router_z_loss=routing.router_z_loss(logits, is_token),
            expert_load=load,
            router_entropy=routing.router_entropy(probs, is_token),
            mean_probs=mean_probs,
            router_probs=probs if return_routing else None,
            expert_index=expert_index if return_routing else None,
        )
        return slots, aux, cache


class GroupedQueryAttention(_Attention):
    """Grouped-query attention of all query heads: the dense baseline.

    It is called as `GroupedQueryExperts`; its aux is zero and has no experts.

    Parameters: `query.kernel` [embed, group, expert, head_dim], `key.kernel` and `value.kernel`
    [embed, group, head_dim], `out.kernel` [head, head_dim, embed]; with `qk_norm`,
    `query_norm.scale` and `key_norm.scale` [head_dim].

    Raises:
      ConfigError: the variant is not `gqa`.
      ValueError: there is no implementation of this name.
    """

    def __init__(self, config: AttentionConfig, **kwargs):
        if config.variant != "gqa":
            raise ConfigError(
                f"variant is {config.variant!r}; GroupedQueryAttention takes gqa: use "
                "GroupedQueryExperts for the routed variants"
            )
        super().__init__(config, **kwargs)

    def slots(
        self,
        x: Float[Array, "batch length embed"],
        *,
        attention: Attention | None = None,
        positions: Int[AnyArray, "batch length"] | None = None,
        segment_ids: Int[AnyArray, "batch length"] | None = None,
        cache: KVCache | None = None,
        return_routing: bool = False,
    ) -> tuple[Slots, AttentionAux, KVCache | None]:
        """The heads' outputs that W_out multiplies; arguments as in `GroupedQueryExperts.slots`."""
        del return_routing
        positions = self._positions(x, positions, cache)
        routed = self._project(x, positions, means=False).routed
        routed, mask, cache = with_cache(routed, segment_ids, cache)
        attention = attention or sharded(self.implementation)
        slots = attention(routed, mask, default_scale(self.config.resolved_head_dim))
        zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
        group = self.config.num_kv_heads
        none = zeros((group, 0))
        return slots, AttentionAux(zeros(()), zeros(()), none, zeros(group), none), cache


def make_attention(
    config: AttentionConfig, **kwargs
) -> GroupedQueryExperts | GroupedQueryAttention:
    """The layer that `config.variant` names."""
    kind = GroupedQueryAttention if config.variant == "gqa" else GroupedQueryExperts
    return kind(config, **kwargs)
