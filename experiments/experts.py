"""Contenders for projecting queries where a group has many experts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.whole import ModelScale
from kernels.benchmarks.speed.arrays import normal, selection, with_gradients
from kernels.benchmarks.speed.cases import SpeedCase
from kernels.benchmarks.speed.timing import Contender


def projection(case: SpeedCase, scale: ModelScale) -> list[Contender]:
    """The selected experts' queries: taken from those of all experts, or projected alone."""
    dtype, embed, head_dim = jnp.dtype(scale.dtype), scale.model.embed_dim, case.head_dim
    groups, experts = scale.groups, case.experts_per_group
    x = normal(0, (case.batch, case.length, embed), dtype)
    kernel = normal(1, (embed, groups, experts, head_dim), dtype) / embed**0.5
    index = selection(case, groups, experts)
    tokens = case.batch * case.length
    arguments = (x, kernel, index)
    if case.training:
        arguments = (normal(2, (*index.shape, head_dim), dtype), *arguments)
    flops_of_a_head = 2 * tokens * embed * head_dim * (3 if case.training else 1)
    found = []
    for name, side, project, heads in (
        ("ragged_dot", "selected", selected_queries, groups * case.top_k),
        ("tokamax.ragged_dot", "selected", _by_tokamax, groups * case.top_k),
        ("dot", "all", all_queries, groups * experts),
    ):

        def timed(*arguments, project=project):
            *floats, index = arguments
            function = with_gradients(lambda x, w: project(x, w, index), case.training)
            return function(*floats)

        first = (lambda result: result[0]) if case.training else (lambda result: result)
        found.append(Contender(name, side, timed, arguments, heads * flops_of_a_head, slots=first))
    return found


def all_queries(x: jax.Array, kernel: jax.Array, index: jax.Array) -> jax.Array:
    """Projects every expert, then selects: [batch, length, group, k, head_dim]."""
    query = jnp.einsum("ble,egmd->blgmd", x, kernel)
    return jnp.take_along_axis(query, index[..., None], axis=3)


def selected_queries(
    x: jax.Array,
    kernel: jax.Array,
    index: jax.Array,
    ragged_dot: Callable[..., jax.Array] = jax.lax.ragged_dot,
) -> jax.Array:
    """Projects the selected experts alone, by one ragged product over sorted rows.

    A row is a token in a group and rank; rows of one expert stand together.
    """
    embed, groups, experts, head_dim = kernel.shape
    batch, length, _, k = index.shape
    expert = (jnp.arange(groups)[:, None] * experts + index).reshape(-1)
    order = jnp.argsort(expert)
    token = order // (groups * k)
    rows = x.reshape(-1, embed)[token]
    weights = jnp.moveaxis(kernel, 0, 2).reshape(groups * experts, embed, head_dim)
    sizes = jnp.bincount(expert, length=groups * experts).astype(jnp.int32)
    projected = ragged_dot(rows, weights, sizes)
    unsorted = jnp.zeros_like(projected).at[order].set(projected, unique_indices=True)
    return unsorted.reshape(batch, length, groups, k, head_dim)


def _by_tokamax(x: jax.Array, kernel: jax.Array, index: jax.Array) -> jax.Array:
    import tokamax

    return selected_queries(x, kernel, index, tokamax.ragged_dot)
