"""The contract of the projection: from the tokens to what the attention reads, routed and selected.

Equations (1), (2) and the logits and indices of (3) in `gqe_jax/model/attention.py`, in one
function. Its `Routed` has the selected queries, so that its `expert_index` is None: the queries of
other experts exist in no array. The source is Grouped Query Experts, arXiv 2606.20945.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gqe_kernels.contract import AXES, Routed
from gqe_kernels.reference import expand_experts, mean_over_groups, select_experts


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


class Heads(NamedTuple):
    """All heads as the products make them, or their gradients."""

    query: Float[Array, "batch length group expert head_dim"]
    key: Float[Array, "batch length group head_dim"]
    value: Float[Array, "batch length group head_dim"]
    shared_query: Float[Array, "batch length head_dim"] | None


def split_float32(x: Array, parts: int) -> list[Array]:
    """Float32 arrays that add up to `x`, and that bfloat16 holds without rounding.

    Three are exact. They are cut from the bits, which no compiler takes for a rounding to undo.
    """
    found = []
    for _ in range(parts):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & -(2**16)
        found.append(jax.lax.bitcast_convert_type(bits, jnp.float32))
        x = x - found[-1]
    return found


def router_parts(router: Array | None, dtype: DTypeLike, *, backward: bool) -> list[Array]:
    """Parts of the router's weight, each for one part of what it is multiplied with.

    Forward, bfloat16 tokens are exact. Backward, the three parts of the logits' gradient meet the
    first part of the weight, and the first meets the second: the rest is beyond the rounding of
    the tokens' gradient. For other tokens the weight is whole.

    Args:
      dtype: of the tokens.
    """
    if router is None:
        return []
    router = router.astype(jnp.float32)
    if dtype != jnp.bfloat16:
        return [router]
    parts = split_float32(router, 3)
    return [parts[0], parts[0], parts[0], parts[1]] if backward else parts


def reference(x: Float[Array, "batch length embed"], projection: Projection) -> Projected:
    """The projection in plain JAX; products are in the dtype of `x`, as in a layer's own modules.

    The router's product has the precision of float32. Ties go to the lower index.
    """
    heads = _products(x, projection)
    logits = index = None
    if projection.router is not None:
        logits = _logits(x, projection.router)
        bias = 0.0 if projection.selection_bias is None else projection.selection_bias
        index = jax.lax.top_k(jax.lax.stop_gradient(logits + bias), projection.top_k)[1]
    selected = heads._replace(query=select_experts(heads.query, index))
    return Projected(_finished(selected, projection), logits, index)


def gradients(
    x: Float[Array, "batch length embed"],
    projection: Projection,
    expert_index: Int[Array, "batch length group k"] | None,
    d_routed: Routed,
    d_logits: Float[Array, "batch length group expert"] | None,
) -> tuple[Float[Array, "batch length embed"], Projection]:
    """Gradients of the tokens and of `projection`, from those of the outputs, in plain JAX.

    Both products take the gradients of all columns at once: each is summed in float32 and rounded
    once. The barriers keep what rotates, what expands and what joins the columns apart, of which
    XLA:GPU would make one slow loop.
    """
    # Without norms nothing here depends on the heads, and they are not computed again.
    heads = _products(x, projection)
    heads = heads._replace(query=select_experts(heads.query, expert_index))
    d_heads, d_projection = jax.vjp(_finished, heads, projection)[1](d_routed)
    d_heads = jax.lax.optimization_barrier(d_heads)
    d_query = expand_experts(d_heads.query, expert_index, projection.query.shape[2])

    made = [(d_query, "query"), (d_heads.key, "key"), (d_heads.value, "value")]
    if d_heads.shared_query is not None:
        made.append((d_heads.shared_query, "shared_query"))
    columns = [(_flat(d, 2), _flat(getattr(projection, name), 1)) for d, name in made]
    of_router = router_parts(projection.router, x.dtype, backward=True)
    exact = 3 if len(of_router) > 1 else 1  # parts of the logits' gradient
    if d_logits is not None:
        of_logits = split_float32(d_logits, exact) if exact > 1 else [d_logits]
        of_logits += of_logits[: len(of_router) - exact]
        parts = zip(of_logits, of_router, strict=True)
        columns += [(_flat(d, 2), _flat(weight, 1)) for d, weight in parts]
    if x.dtype == jnp.float16 and of_router:  # which cannot hold parts of float32
        d_x, found = _unproject(x, columns[:-1], jnp.float32)
        more, of_router = _unproject(x.astype(jnp.float32), columns[-1:], jnp.float32)
        d_x, found = (d_x + more).astype(x.dtype), found + of_router
    else:
        d_x, found = _unproject(x, columns, x.dtype)

    changed = {}
    for (_, name), d in zip(made, found, strict=False):
        weight = getattr(projection, name)
        changed[name] = d.astype(weight.dtype).reshape(weight.shape)
    if projection.router is not None:
        d_router = functools.reduce(jnp.add, found[len(made) : len(made) + exact])
        changed["router"] = d_router.astype(projection.router.dtype).reshape(
            projection.router.shape
        )
    return d_x, dataclasses.replace(d_projection, **changed)


def _unproject(x: Any, columns: list[tuple[Any, Any]], out: DTypeLike) -> tuple[Any, list[Any]]:
    """The gradients of the tokens, in the dtype `out`, and of each weight, in float32 or wider.

    Args:
      x: the tokens, in the dtype of the products.
      columns: of what was projected, its gradient [batch, length, n] and its weight [embed, n].
    """
    d_each = jax.lax.optimization_barrier([d.astype(x.dtype) for d, _ in columns])
    d_columns = jnp.concatenate(d_each, axis=2)
    weights = jnp.concatenate([weight.astype(x.dtype) for _, weight in columns], axis=1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    d_weights = _dot(x, d_columns, ((0, 1), (0, 1)), wide)
    ends = list(itertools.accumulate(weight.shape[1] for _, weight in columns))
    return _dot(d_columns, weights, (2, 1), out), jnp.split(d_weights, ends[:-1], axis=1)


def _flat(x: Array, axes: int) -> Array:
    return x.reshape(*x.shape[:axes], math.prod(x.shape[axes:]))


def _dot(x: Any, y: Any, axes: Any, out: DTypeLike | None = None) -> Any:
    """The product over these axes of each, of matrices of one dtype; float32 at full precision."""
    precision: Any = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.tensordot(x, y, axes, precision=precision, preferred_element_type=out)


def _products(x: Any, projection: Projection) -> Heads:
    """The heads, in the dtype of `x`.

    The barrier keeps the values an array of their own: XLA:GPU merges products of one input, and
    the attention would read a copy of the values' part of the result.
    """
    shared = projection.shared_query
    return Heads(
        query=_dot(x, projection.query, (2, 0)),
        key=_dot(x, projection.key, (2, 0)),
        value=_dot(jax.lax.optimization_barrier(x), projection.value, (2, 0)),
        shared_query=None if shared is None else _dot(x, shared, (2, 0)),
    )


@jax.custom_vjp
def _logits(x: Any, router: Any) -> Any:
    """The router's logits, float32; one product of bfloat16 tokens with all parts of its weight."""
    parts = router_parts(router, x.dtype, backward=False)
    x = x if len(parts) > 1 else x.astype(jnp.float32)
    of_all = jnp.concatenate([_flat(part, 1) for part in parts], axis=1).astype(x.dtype)
    products = _dot(x, of_all, (2, 0), jnp.float32)
    return products.reshape(*x.shape[:2], len(parts), *router.shape[1:]).sum(axis=2)


def _logits_in_float32(x: Any, router: Any) -> Any:
    return _dot(x.astype(jnp.float32), router.astype(jnp.float32), (2, 0))


# The parts are cut from bits, and have no derivative.
_logits.defvjp(
    lambda x, router: (_logits(x, router), (x, router)),
    lambda operands, d_logits: jax.vjp(_logits_in_float32, *operands)[1](d_logits),
)


def _finished(heads: Heads, projection: Projection) -> Routed:
    """What the attention reads; `heads` has the queries of the selected experts."""

    def rotate(x: Any, scale: Any) -> Any:
        return norm_and_rotate(x, projection, scale)

    # Widened once: what they and their means add to their gradients is rounded together.
    wide = jnp.promote_types(heads.key.dtype, jnp.float32)
    of_groups, value = heads.key.astype(wide), heads.value.astype(wide)
    key = rotate(of_groups, projection.key_scale)
    shared_query = shared_key = shared_value = None
    if heads.shared_query is not None:
        shared_query = rotate(heads.shared_query, projection.query_scale)
    if projection.means:
        shared_value = mean_over_groups(value)
        # All groups rotate alike, so that the mean needs to be rotated once.
        shared_key = rotate(mean_over_groups(of_groups), None)
        if projection.key_scale is not None:  # but each has a norm of its own
            shared_key = mean_over_groups(key)
    routed = Routed(
        query=rotate(heads.query, projection.query_scale),
        key=key,
        value=value,
        shared_query=shared_query,
        shared_key=shared_key,
        shared_value=shared_value,
    )
    return jax.tree.map(lambda y: y.astype(heads.key.dtype), routed)
