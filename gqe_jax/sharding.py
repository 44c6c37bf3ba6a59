"""The device mesh, and one table from logical axes to mesh axes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from gqe_jax.config import ConfigError, MeshConfig, RunConfig

# Logical axis of a weight or an activation → mesh axes that it is split over.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": (),
    "layer": (),
    "embed": ("fsdp",),
    "norm": (),
    "group": ("tensor",),
    "slot": ("tensor",),  # kept whole where k·G + 2 slots do not divide
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices`, by default all of them.

    Over several slices of TPUs the data axis takes the network between them.

    Raises:
      ConfigError: the mesh does not fit the number of devices, or data that of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.resolve(len(devices))
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices > 1:
        return _mesh_over_slices(sizes, slices, devices)
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices,
    )


def _mesh_over_slices(sizes: dict[str, int], slices: int, devices: list[jax.Device]) -> Mesh:
    if sizes["data"] % slices:
        raise ConfigError(
            f"mesh.data is {sizes['data']}; it must be a multiple of the {slices} slices, between "
            "which only gradients pass"
        )
    within = {axis: size // slices if axis == "data" else size for axis, size in sizes.items()}
    between = {axis: slices if axis == "data" else 1 for axis in sizes}
    array = mesh_utils.create_hybrid_device_mesh(
        tuple(within.values()), tuple(between.values()), devices
    )
    return Mesh(array, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def check_divides(config: RunConfig, sizes: dict[str, int]) -> None:
    """Every sharded dimension must divide over its mesh axes.

    Raises:
      ConfigError: names the first field that does not, and by what it must divide.
    """
    model = config.model
    microbatch = config.batch_size // config.accumulation_steps
    fields = {
        "batch": ("batch_size / accumulation_steps", microbatch),
        "embed": ("model.attention.embed_dim", model.embed_dim),
        "group": ("model.attention.num_kv_heads", model.attention.num_kv_heads),
        "mlp": ("model.mlp_dim", model.mlp_dim),
        "vocab": ("model.vocab_size", model.vocab_size),
    }
    for axis, (field, size) in fields.items():
        shards = 1
        for name in RULES[axis]:
            shards *= sizes[name]
        if size % shards:
            names = " × ".join(f"mesh.{name}" for name in RULES[axis])
            raise ConfigError(f"{field} is {size}; it must be a multiple of {names} = {shards}")


def partition_spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh
) -> PartitionSpec:
    """The spec of an array with these logical axes; an axis that does not divide stays whole."""
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        names = tuple(name for name in RULES.get(axis, ()) if name in mesh.shape)
        shards = 1
        for name in names:
            shards *= mesh.shape[name]
        entries.append(names if names and size % shards == 0 else None)
    return PartitionSpec(*entries)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of (abstract) arrays and `nnx.Variable`s, by their logical axes.

    What names no axes, such as a step counter, is replicated.
    """

    def of(leaf):
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        axes = leaf.get_metadata().get("out_sharding") or (None,) * len(leaf.shape)
        return leaf.replace(NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh)))

    return jax.tree.map(of, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [batch, sequence, ...]."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"], RULES["sequence"] or None))


def constrain(x: Array, *axes: str | None) -> Array:
    """Pins an activation's sharding on the current mesh (`jax.set_mesh`); without one, nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not any(name in mesh.shape for name in RULES["batch"]):
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


def on_mesh[Result](mesh: Mesh, function: Callable[..., Result]) -> Callable[..., Result]:
    """`function`, called with the mesh set, so that what it traces can name mesh axes."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with jax.set_mesh(mesh):
            return function(*args, **kwargs)

    return call


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of the global batch that this process's devices hold, in ascending order.

    They are seldom consecutive: a mesh follows the chips' network, not the order of their hosts.
    """
    indices = sharding.addressable_devices_indices_map((batch_size, 1))
    return np.unique([np.arange(batch_size)[index[0]] for index in indices.values()])


def global_batch(sharding: NamedSharding, batch_size: int, batch: Any) -> Any:
    """Arrays over all devices, [batch_size, ...], from this process's rows of them."""
    rows = local_rows(sharding, batch_size)

    def whole(x):
        def piece(index):
            held = np.searchsorted(rows, np.arange(batch_size)[index[0]])
            return x[held][:, *index[1:]]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, piece)

    return jax.tree.map(whole, batch)
