"""The contract of the projection: from the tokens to what the attention reads, routed and selected.

Equations (1), (2) and the logits and indices of (3) in `gqe_jax/model/attention.py`, in one
function. Its `Routed` has the selected queries, so that its `expert_index` is None: the queries of
other experts exist in no array. The source is Grouped Query Experts, arXiv 2606.20945.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gqe_kernels.contract import AXES, Routed
from gqe_kernels.reference import mean_over_groups, select_experts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
    """Weights of one layer's projections, and how their results are normed and rotated.

    Attributes:
      query, key, value: the weights, in the dtype of the computation.
      router: float32; None: every expert is selected, in order, which is grouped-query attention.
      selection_bias: added to the logits where experts are selected; float32, without gradient.
      shared_query: that of the shared head; None: there is no such head.
      cos, sin: of the angles by which RoPE rotates each pair of features; float32. With a batch of
        1 they are those of every row.
      query_scale, key_scale: of the RMSNorm of each head before RoPE; None: no norm.
      top_k: experts that a token selects in each group, if there is a router.
      epsilon: of the norm.
      means: also return the means over the groups that the shared head attends to.
    """

    __no_type_check__ = True  # JAX puts other things than arrays at the leaves of a tree

    query: Float[Array, "embed group expert head_dim"]
    key: Float[Array, "embed group head_dim"]
    value: Float[Array, "embed group head_dim"]
    router: Float[Array, "embed group expert"] | None
    shared_query: Float[Array, "embed head_dim"] | None
    cos: Float[Array, "#batch length half"]
    sin: Float[Array, "#batch length half"]
    selection_bias: Float[Array, "group expert"] | None = None
    query_scale: Float[Array, "head_dim"] | None = None
    key_scale: Float[Array, "head_dim"] | None = None
    top_k: int = dataclasses.field(default=1, metadata={"static": True})
    epsilon: float = dataclasses.field(default=1e-6, metadata={"static": True})
    means: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projected:
    """The operands of the attention, the router's logits, and the experts selected by rank.

    The last two are None without a router.
    """

    __no_type_check__ = True

    routed: Routed
    logits: Float[Array, "batch length group expert"] | None
    expert_index: Int[Array, "batch length group k"] | None


# The logical axes of each array; a mesh maps their names to its own.
_HEAD: Any = ("embed", "group", None)
_EXPERTS: Any = (*_HEAD, None)
_SHARED: Any = ("embed", None)
_BIAS: Any = ("group", None)
_ANGLES: Any = ("batch", "sequence", None)
_SCALE: Any = (None,)
PROJECTION_AXES = Projection(
    query=_EXPERTS,
    key=_HEAD,
    value=_HEAD,
    router=_HEAD,
    shared_query=_SHARED,
    cos=_ANGLES,
    sin=_ANGLES,
    selection_bias=_BIAS,
    query_scale=_SCALE,
    key_scale=_SCALE,
)
PROJECTED_AXES = Projected(AXES, AXES.expert_index, AXES.expert_index)


def norm_and_rotate(
    x: Float[Array, "batch length *heads head_dim"],
    projection: Projection,
    scale: Float[Array, "head_dim"] | None,
) -> Float[Array, "batch length *heads head_dim"]:
    """Heads [..., head_dim] in float32: normed, if there is a scale, then rotated."""
    x = x.astype(jnp.float32)
    if scale is not None:
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(mean_square + projection.epsilon) * scale.astype(jnp.float32)
    shape = (*projection.cos.shape[:2], *(1,) * (x.ndim - 3), -1)
    cos, sin = projection.cos.reshape(shape), projection.sin.reshape(shape)
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def reference(x: Float[Array, "batch length embed"], projection: Projection) -> Projected:
    """The projection in plain JAX; products are in the dtype of `x`, as in a layer's own modules.

    The router's product is float32 at the highest precision. Ties go to the lower index.
    """
    highest = jax.lax.Precision.HIGHEST

    def product(x: Any, weight: Any) -> Any:
        precision: Any = highest if x.dtype == jnp.float32 else None
        return jax.lax.dot_general(x, weight, (((2,), (0,)), ((), ())), precision=precision)

    logits = index = shared_query = shared_key = shared_value = None
    if projection.router is not None:
        logits = product(x.astype(jnp.float32), projection.router.astype(jnp.float32))
        bias = 0.0 if projection.selection_bias is None else projection.selection_bias
        index = jax.lax.top_k(jax.lax.stop_gradient(logits + bias), projection.top_k)[1]
    query = norm_and_rotate(product(x, projection.query), projection, projection.query_scale)
    key = norm_and_rotate(product(x, projection.key), projection, projection.key_scale)
    value = product(x, projection.value)
    if projection.shared_query is not None:
        shared_query = product(x, projection.shared_query)
        shared_query = norm_and_rotate(shared_query, projection, projection.query_scale)
    if projection.means:
        shared_key, shared_value = mean_over_groups(key), mean_over_groups(value)
    routed = Routed(
        query=select_experts(query, index),
        key=key,
        value=value,
        shared_query=shared_query,
        shared_key=shared_key,
        shared_value=shared_value,
    )
    return Projected(jax.tree.map(lambda y: y.astype(x.dtype), routed), logits, index)
