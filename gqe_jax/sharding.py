"""The device mesh, and the table from logical axes to mesh axes."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from gqe_jax.config import ConfigError, MeshConfig, RunConfig
from gqe_kernels.varying import free_axes, varying_axes

# Logical axis of a weight or an activation → mesh axes over which it is sharded. A size that is no
# multiple of their product is sharded over the longest prefix of them that divides it.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": ("context",),
    "layer": (),
    "embed": ("fsdp", "context"),
    "norm": (),
    "group": ("tensor",),
    "slot": ("tensor",),  # replicated where the k·G + 2 slots do not divide
    "mlp": ("tensor",),
    "mlp_rows": ("tensor", "fsdp", "context"),  # rows of `down`: its reduction needs no transpose
    "vocab": ("tensor",),
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices`, by default all devices.

    On several TPU slices only the data axis crosses the network between slices.

    Raises:
      ConfigError: the mesh does not fit the number of devices, or `data` that of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.resolve(len(devices))
    # On GPUs, slice_index is the host, and any axis may cross hosts.
    slices = len({getattr(d, "slice_index", None) for d in devices if d.platform == "tpu"})
    if slices > 1:
        return _mesh_over_slices(sizes, slices, devices)
    shape = tuple(sizes.values())
    try:
        array = mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # an axis size is no product of the torus's dimensions
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(array, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _mesh_over_slices(sizes: dict[str, int], slices: int, devices: list[jax.Device]) -> Mesh:
    if sizes["data"] % slices:
        raise ConfigError(
            f"mesh.data is {sizes['data']}; it must be a multiple of the {slices} slices, since "
            "only the data axis crosses slices"
        )
    within = {axis: size // slices if axis == "data" else size for axis, size in sizes.items()}
    between = {axis: slices if axis == "data" else 1 for axis in sizes}
    shapes = tuple(within.values()), tuple(between.values())
    try:
        array = mesh_utils.create_hybrid_device_mesh(*shapes, devices)
    except NotImplementedError:
        array = mesh_utils.create_hybrid_device_mesh(
            *shapes, devices, allow_split_physical_axes=True
        )
    return Mesh(array, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def check_divides(config: RunConfig, sizes: dict[str, int]) -> None:
    """Checks that every sharded dimension is a multiple of the size of its mesh axes.

    Raises:
      ConfigError: names the first field that is not, and the required multiple.
    """
    model = config.model
    microbatch = config.batch_size // config.accumulation_steps
    needs = [
        ("batch_size / accumulation_steps", microbatch, RULES["batch"]),
        ("model.attention.embed_dim", model.embed_dim, RULES["embed"][:1]),
        ("model.attention.num_kv_heads", model.attention.num_kv_heads, RULES["group"]),
        ("model.mlp_dim", model.mlp_dim, RULES["mlp"]),
        ("model.vocab_size", model.vocab_size, RULES["vocab"]),
    ]
    for field, size, names in needs:
        shards = math.prod(sizes[name] for name in names)
        if size % shards:
            product = " × ".join(f"mesh.{name}" for name in names)
            raise ConfigError(f"{field} is {size}; it must be a multiple of {product} = {shards}")
    halves = 2 * sizes["context"]  # zigzag: each shard holds an early and a late piece
    if halves > 2 and config.sequence_length % halves:
        raise ConfigError(
            f"sequence_length is {config.sequence_length}; it must be a multiple of 2 × "
            f"mesh.context = {halves}"
        )


def check_rules(mesh: Mesh | AbstractMesh) -> None:
    """Checks that `RULES` says of each axis of the mesh what it shards.

    Raises:
      ConfigError: names the axes that `RULES` does not have.
    """
    known = {name for names in RULES.values() for name in names}
    if unknown := [name for name in free_axes(mesh) if name not in known]:
        raise ConfigError(
            f"the mesh has the axes {', '.join(map(repr, unknown))}, and gqe_jax.sharding.RULES "
            f"does not say what they shard, so each device would get the whole batch; say it "
            f"before the first call, such as RULES['batch'] = ({unknown[0]!r},), or "
            f"RULES['repeated'] = ({unknown[-1]!r},) for an axis over which the layer is repeated"
        )


def check_nested(x: Array, mesh: Mesh | AbstractMesh) -> None:
    """Checks that gradients can pass through a user's `shard_map` around this one.

    Raises:
      ConfigError: the user's has `check_vma` on, and leaves axes to this one, which has it off.
    """
    if varying := varying_axes(x):
        raise ConfigError(
            f"the layer is called inside a jax.shard_map over {', '.join(sorted(varying))} that "
            f"leaves the mesh axes {', '.join(free_axes(mesh))} to it; give that shard_map "
            "check_vma=False, or all the axes"
        )


def partition_spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """The spec of an array with these logical axes, by `RULES`, over the `free_axes`."""
    entries, free = [], free_axes(mesh)
    for axis, size in zip(axes, shape, strict=True):
        names = tuple(name for name in RULES.get(axis or "", ()) if name in free)
        while names and size % math.prod(free[name] for name in names):
            names = names[:-1]
        entries.append(names or None)
    return PartitionSpec(*entries)


def shardings(tree: Any, mesh: Mesh, *, over_data: bool = False) -> Any:
    """Shardings for a tree of (abstract) arrays and `nnx.Variable`s, from their logical axes.

    Leaves without logical axes, such as a step counter, are replicated.

    Args:
      over_data: shard the first axis that divides over the data axis too. It is none of layers: a
        layer's gradient is then reduced and scattered where the backward pass computes it.
    """

    def of(leaf):
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        if not jax.tree.leaves(leaf):  # a parameter that another part of the optimizer updates
            return leaf
        axes = leaf.get_metadata().get("out_sharding") or (None,) * len(leaf.shape)
        spec = partition_spec(axes, leaf.shape, mesh)
        if over_data:
            spec = _over_data(spec, axes, leaf.shape, mesh)
        return leaf.replace(NamedSharding(mesh, spec))

    return jax.tree.map(of, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _over_data(
    spec: PartitionSpec, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh
) -> PartitionSpec:
    for i, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        names = (*jax.tree.leaves(spec[i]), "data")
        if axis != "layer" and size % math.prod(mesh.shape[name] for name in names) == 0:
            return PartitionSpec(*spec[:i], names, *spec[i + 1 :])
    return spec


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays [batch, sequence, ...]."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"], RULES["sequence"] or None))


def constrain(x: Array, *axes: str | None) -> Array:
    """Constrains an activation's sharding on the current mesh (`jax.set_mesh`), if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not any(name in free_axes(mesh) for name in RULES["batch"]):
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


def explicit_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes of the mesh whose shardings are a part of the types of arrays."""
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in axes if kind == AxisType.Explicit)


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """A jitted function that is called and traced with a mesh set, whose axes it can name.

    Args:
      mesh: the mesh.
      function: a result of `jax.jit`.
      last: arguments that follow those of each call.
    """

    mesh: Mesh
    function: jax.stages.Wrapped
    last: tuple[Any, ...] = ()

    def __call__(self, *arguments: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return self.function(*arguments, *self.last)

    def trace(self, *arguments: Any) -> jax.stages.Traced:
        """Traces the function for arguments that may be `jax.ShapeDtypeStruct`s."""
        with jax.set_mesh(self.mesh):
            return self.function.trace(*arguments, *self.last)

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """Lowers the function for arguments that may be `jax.ShapeDtypeStruct`s."""
        with jax.set_mesh(self.mesh):
            return self.function.lower(*arguments, *self.last)


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of the global batch that this process's devices hold, in ascending order.

    They are rarely consecutive: the mesh follows the chips' network, not the order of the hosts.
    """
    shape = (batch_size, sharding.mesh.size)  # every sharding of the sequence divides mesh.size
    indices = sharding.addressable_devices_indices_map(shape)
    return np.unique([np.arange(batch_size)[index[0]] for index in indices.values() if index])


def global_batch(sharding: NamedSharding, batch_size: int, batch: Any) -> Any:
    """Global arrays [batch_size, ...] from a tree of this process's rows."""
    rows = local_rows(sharding, batch_size)

    def whole(x):
        def piece(index):
            held = np.searchsorted(rows, np.arange(batch_size)[index[0]])
            return x[held][:, *index[1:]]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, piece)

    return jax.tree.map(whole, batch)
