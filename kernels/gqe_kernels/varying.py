"""Mesh axes: those that are left to XLA, and the manual ones over which arrays vary."""

from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh


def free_axes(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """The axes of more than one device that are not manual, and their sizes.

    Inside `jax.shard_map` its axes are manual: arrays are shards over them already.
    """
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {
        name: size
        for name, size in mesh.shape.items()
        if size > 1 and types[name] != AxisType.Manual
    }


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
