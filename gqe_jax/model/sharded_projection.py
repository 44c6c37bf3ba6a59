"""The projection on a mesh: each device projects its own tokens on its own groups.

The kernel is opaque to XLA's partitioner, so it runs under `shard_map`; weights that are sharded
over their input features are gathered before it, and their gradients scattered after it.
"""

import dataclasses
import operator
from typing import Any

import jax
from jaxtyping import Array, Float

from gqe_jax.sharding import check_nested, check_rules, free_axes, partition_spec
from gqe_kernels.project import project
from gqe_kernels.projection import (
    PROJECTED_AXES,
    PROJECTION_AXES,
    Projected,
    Projection,
    reference,
)


def sharded_project(x: Float[Array, "batch length embed"], projection: Projection) -> Projected:
    """`project` on the current mesh (`jax.set_mesh`); as it is without one.

    Where the groups are sharded, the means over them are left to the attention.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not free_axes(mesh):
        return project(x, projection)
    check_rules(mesh)
    check_nested(x, mesh)

    def specs_by(axes: Any, tree: Any) -> Any:
        def spec(path: Any, array: Any) -> Any:
            names = operator.attrgetter(".".join(key.name for key in path))(axes)
            return partition_spec(names, array.shape, mesh)

        return jax.tree_util.tree_map_with_path(spec, tree)

    weights = specs_by(PROJECTION_AXES, projection)
    if weights.key[1]:  # the groups are sharded
        projection = dataclasses.replace(projection, means=False)
        weights = dataclasses.replace(weights, means=False)
    projected = specs_by(PROJECTED_AXES, jax.eval_shape(reference, x, projection))
    gathered = [name for name, spec in vars(weights).items() if _input_axes(name, spec)]

    def local(x: Array, projection: Projection) -> Projected:
        whole: dict[str, Any] = {
            name: jax.lax.all_gather(
                getattr(projection, name),
                _input_axes(name, getattr(weights, name)),
                axis=0,
                tiled=True,
            )
            for name in gathered
        }
        return project(x, dataclasses.replace(projection, **whole))

    return jax.shard_map(
        local,
        in_specs=(partition_spec(("batch", "sequence", None), x.shape, mesh), weights),
        out_specs=projected,
        check_vma=False,  # a Pallas call does not say over which axes its outputs vary
    )(x, projection)


def _input_axes(name: str, spec: Any) -> Any:
    """The mesh axes over which a weight's input features are sharded; None for other arrays."""
    axes = getattr(PROJECTION_AXES, name)
    has_input = isinstance(axes, tuple) and axes[0] == "embed" and spec is not None
    return spec[0] if has_input else None
