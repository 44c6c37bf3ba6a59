"""Over which manual mesh axes arrays vary: a part of their types inside `jax.shard_map`."""

from typing import Any

import jax


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which `x` varies; none outside `shard_map`, or with its check_vma off."""
    aval: Any = jax.typeof(x)
    # jax 0.12; before it, the name was vma
    return aval.manual_axis_type.varying if hasattr(aval, "manual_axis_type") else aval.vma


def vary_over[Array](x: Array, axes: frozenset[str]) -> Array:
    """`x`, typed as varying over these axes too."""
    missing = tuple(axes - varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def vary_alike[Tree](tree: Tree) -> Tree:
    """The tree, each of whose JAX arrays varies over every axis that one of them does."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    axes = frozenset[str]().union(*map(varying_axes, arrays))
    if not axes:
        return tree
    return jax.tree.map(lambda x: vary_over(x, axes) if isinstance(x, jax.Array) else x, tree)
