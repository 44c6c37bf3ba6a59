"""The one place where the attention kernels meet the mesh: under `shard_map`.

A kernel is opaque to XLA's partitioner, so each device runs it on its own rows and groups. Two
things cross the tensor axis: the weighted slot's sum, and the shared head's mean key and value.
Decoding has no kernel: XLA partitions it, and of the shared head only logits and outputs cross.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float

from gqe_jax.sharding import partition_spec
from gqe_kernels import dense_attention, routed_attention

_HEADS = ("batch", None, "group", None, None)
_AXES = {
    "query": _HEADS,
    "key": _HEADS[:4],
    "value": _HEADS[:4],
    "expert_index": _HEADS[:4],
    "slot_weight": _HEADS[:4],
    "shared_query": ("batch", None, None),
    "shared_key": ("batch", None, None),
    "shared_value": ("batch", None, None),
    "q_segment_ids": ("batch", None),
    "kv_segment_ids": ("batch", None),
    "q_offset": ("batch",),
}


def sharded_dense_attention(**arguments: Any) -> Float[Array, "batch q_len slot head_dim"]:
    """`gqe_kernels.dense_attention` on the current mesh (`jax.set_mesh`), or without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if _is_trivial(mesh) or _is_decoding(arguments):
        return dense_attention(**arguments)
    batch, _, group, *_ = _spec("query", arguments["query"], mesh)
    return _shard_map(dense_attention, arguments, mesh, PartitionSpec(batch, None, group))


def sharded_routed_attention(**arguments: Any) -> Float[Array, "batch q_len slot head_dim"]:
    """`gqe_kernels.routed_attention` on the current mesh (`jax.set_mesh`), or without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if _is_trivial(mesh) or _is_decoding(arguments):
        return routed_attention(**arguments)
    batch, _, group, *_ = _spec("query", arguments["query"], mesh)
    has_weighted = arguments["slot_weight"] is not None
    takes_mean = arguments["shared_query"] is not None and arguments["shared_key"] is None

    def local(**arguments):
        if group and takes_mean:
            for name in ("key", "value"):
                arguments[f"shared_{name}"] = _mean_over_groups(arguments[name], group)
        slots = routed_attention(**arguments)
        num_hard = arguments["expert_index"].shape[2] * arguments["expert_index"].shape[3]
        hard, weighted, shared = jnp.split(slots, [num_hard, num_hard + has_weighted], axis=2)
        if group and has_weighted:
            weighted = jax.lax.psum(weighted.astype(jnp.float32), group).astype(slots.dtype)
        return hard, weighted, shared

    whole = PartitionSpec(batch)
    out_specs = (PartitionSpec(batch, None, group), whole, whole)
    return jnp.concatenate(_shard_map(local, arguments, mesh, out_specs), axis=2)


def _is_trivial(mesh: AbstractMesh) -> bool:
    return mesh.empty or mesh.size == 1


def _is_decoding(arguments: dict[str, Any]) -> bool:
    return arguments["query"].shape[1] == 1 and arguments["implementation"] is None


def _spec(name: str, array: Array, mesh: AbstractMesh) -> PartitionSpec:
    return partition_spec(_AXES[name][: array.ndim], array.shape, mesh)


def _mean_over_groups(x: Float[Array, "batch length group head_dim"], axes: tuple[str, ...]):
    return jax.lax.pmean(jnp.mean(x.astype(jnp.float32), axis=2), axes).astype(x.dtype)


def _shard_map(
    function: Callable[..., Any], arguments: dict[str, Any], mesh: AbstractMesh, out_specs: Any
) -> Any:
    """Calls `function(**arguments)` on each device's part of the arrays."""
    arrays = {name: x for name, x in arguments.items() if hasattr(x, "ndim")}
    others = {name: x for name, x in arguments.items() if name not in arrays}
    return jax.shard_map(
        lambda arrays: function(**arrays, **others),
        in_specs=({name: _spec(name, array, mesh) for name, array in arrays.items()},),
        out_specs=out_specs,
        check_vma=False,  # a Pallas call does not say over which axes its outputs vary
    )(arrays)
