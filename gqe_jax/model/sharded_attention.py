"""The one place where the attention kernels meet the mesh: under `shard_map`.

A kernel is opaque to XLA's partitioner, so each device runs it on its own rows, queries and groups.

- Over the context axis, keys and values are gathered: a shard's queries stand in one piece of the
  sequence, or in two (`gqe_jax.model.zigzag`), and see all keys before them.
- Over the tensor axis, two things cross: the weighted slot's sum, and the shared head. Its keys and
  values are a mean over all groups, and each shard attends for its part of the queries.

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

_HEADS = ("batch", "sequence", "group", None, None)
_AXES = {
    "query": _HEADS,
    "key": _HEADS[:4],
    "value": _HEADS[:4],
    "expert_index": _HEADS[:4],
    "slot_weight": _HEADS[:4],
    "shared_query": ("batch", "sequence", None),
    "shared_key": ("batch", "sequence", None),
    "shared_value": ("batch", "sequence", None),
    "q_segment_ids": ("batch", "sequence"),
    "kv_segment_ids": ("batch", "sequence"),
    "q_offset": ("batch", None),
}
_OF_KEYS = ("key", "value", "shared_key", "shared_value", "kv_segment_ids")
_OF_ALL_HEADS = ("scale", "causal", "kv_segment_ids", "implementation")


def sharded_dense_attention(
    *, zigzag: bool = False, **arguments: Any
) -> Float[Array, "batch q_len slot head_dim"]:
    """`gqe_kernels.dense_attention` on the current mesh (`jax.set_mesh`), or without one.

    Args:
      zigzag: the sequence is in the order of `gqe_jax.model.zigzag`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if _is_trivial(mesh) or _is_decoding(arguments):
        return dense_attention(**arguments)
    batch, sequence, group, *_ = _spec("query", arguments, mesh)

    def local(**arguments):
        if sequence:
            arguments = _with_all_keys(arguments, zigzag)
        return dense_attention(**arguments)

    return _shard_map(local, arguments, mesh, PartitionSpec(batch, sequence, group))


def sharded_routed_attention(
    *, zigzag: bool = False, **arguments: Any
) -> Float[Array, "batch q_len slot head_dim"]:
    """`gqe_kernels.routed_attention` on the current mesh (`jax.set_mesh`), or without one.

    Args:
      zigzag: the sequence is in the order of `gqe_jax.model.zigzag`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if _is_trivial(mesh) or _is_decoding(arguments):
        return routed_attention(**arguments)
    batch, sequence, group, *_ = _spec("query", arguments, mesh)
    has_weighted = arguments["slot_weight"] is not None
    has_shared = arguments["shared_query"] is not None
    takes_mean = has_shared and arguments["shared_key"] is None

    def local(**arguments):
        if takes_mean and (group or sequence):
            for name in ("key", "value"):
                arguments[f"shared_{name}"] = _mean_over_groups(arguments[name], group)
        if sequence:
            arguments = _with_all_keys(arguments, zigzag)
        shared = None
        if group and has_shared and _divides(arguments, group):
            shared = _shared_slot_by_parts(arguments, group)
            arguments |= dict.fromkeys(("shared_query", "shared_key", "shared_value"))
        slots = routed_attention(**arguments)
        num_hard = arguments["expert_index"].shape[2] * arguments["expert_index"].shape[3]
        hard, weighted, last = jnp.split(slots, [num_hard, num_hard + has_weighted], axis=2)
        if group and has_weighted:
            weighted = jax.lax.psum(weighted.astype(jnp.float32), group).astype(slots.dtype)
        return hard, weighted, last if shared is None else shared

    whole = PartitionSpec(batch, sequence)
    out_specs = (PartitionSpec(batch, sequence, group), whole, whole)
    return jnp.concatenate(_shard_map(local, arguments, mesh, out_specs), axis=2)


def _is_trivial(mesh: AbstractMesh) -> bool:
    return mesh.empty or mesh.size == 1


def _is_decoding(arguments: dict[str, Any]) -> bool:
    return arguments["query"].shape[1] == 1 and arguments["implementation"] is None


def _spec(name: str, arguments: dict[str, Any], mesh: AbstractMesh) -> PartitionSpec:
    """With a cache, which gives the queries' offset, sequences are whole on every device."""
    array, axes = arguments[name], _AXES[name]
    if "q_offset" in arguments:
        axes = tuple(None if axis == "sequence" else axis for axis in axes)
    return partition_spec(axes[: array.ndim], array.shape, mesh)


def _mean_over_groups(
    x: Float[Array, "batch length group head_dim"], axes: tuple[str, ...] | None
) -> Float[Array, "batch length head_dim"]:
    mean = jnp.mean(x.astype(jnp.float32), axis=2)
    return (jax.lax.pmean(mean, axes) if axes else mean).astype(x.dtype)


def _with_all_keys(arguments: dict[str, Any], zigzag: bool) -> dict[str, Any]:
    """Of a context shard: the keys of all shards in natural order, and its queries' positions."""
    batch, length = arguments["query"].shape[:2]
    shard, shards = jax.lax.axis_index("context"), jax.lax.axis_size("context")

    def gathered(x):
        if not zigzag:
            return jax.lax.all_gather(x, "context", axis=1, tiled=True)
        pieces = jax.lax.all_gather(x, "context")
        pieces = pieces.reshape(*pieces.shape[:2], 2, -1, *x.shape[2:])
        ordered = jnp.concatenate([pieces[:, :, 0], pieces[::-1, :, 1]])
        return jnp.moveaxis(ordered, 0, 1).reshape(x.shape[0], -1, *x.shape[2:])

    pieces = [shard, 2 * shards - 1 - shard] if zigzag else [shard]
    offsets = jnp.stack(pieces) * (length // len(pieces))
    of_keys = {n: gathered(arguments[n]) for n in _OF_KEYS if arguments.get(n) is not None}
    return arguments | of_keys | {"q_offset": jnp.broadcast_to(offsets, (batch, len(pieces)))}


def _offsets(arguments: dict[str, Any]) -> Array:
    """[batch, piece]."""
    offset = jnp.asarray(arguments.get("q_offset", 0), jnp.int32)
    batch = arguments["query"].shape[0]
    return offset if offset.ndim == 2 else jnp.broadcast_to(offset, (batch,))[:, None]


def _divides(arguments: dict[str, Any], group: tuple[str, ...]) -> bool:
    """Whether each piece of the queries divides into an early and a late part for each shard."""
    pieces = _offsets(arguments).shape[1]
    return arguments["query"].shape[1] % (2 * jax.lax.axis_size(group) * pieces) == 0


def _shared_slot_by_parts(
    arguments: dict[str, Any], group: tuple[str, ...]
) -> Float[Array, "batch q_len 1 head_dim"]:
    """The shared head's slot, for which each shard of the groups does the same share of the work.

    Of every piece of the queries, shard t of T takes parts t and 2T - 1 - t of 2T.
    """
    shard, shards = jax.lax.axis_index(group), jax.lax.axis_size(group)
    offsets = _offsets(arguments)
    batch, pieces = offsets.shape
    rows = arguments["query"].shape[1] // (2 * shards * pieces)
    parts = jnp.stack([shard, 2 * shards - 1 - shard])

    def mine(x):
        return jnp.take(x.reshape(batch, pieces, 2 * shards, -1), parts, axis=2).reshape(
            batch, -1, *x.shape[2:]
        )

    query = mine(arguments["shared_query"])[:, :, None, None]
    segments = arguments.get("q_segment_ids")
    slots = routed_attention(
        query=query,
        key=arguments["shared_key"][:, :, None],
        value=arguments["shared_value"][:, :, None],
        expert_index=jnp.zeros((*query.shape[:3], 1), jnp.int32),
        q_offset=(offsets[:, :, None] + parts * rows).reshape(batch, -1),
        **{n: arguments[n] for n in _OF_ALL_HEADS if n in arguments},
        q_segment_ids=None if segments is None else mine(segments),
    )
    of_all = jax.lax.all_gather(slots.reshape(batch, pieces, 2, rows, -1), group)
    ordered = jnp.concatenate([of_all[:, :, :, 0], of_all[::-1, :, :, 1]])
    return jnp.moveaxis(ordered, 0, 2).reshape(*arguments["query"].shape[:2], 1, -1)


def _shard_map(
    function: Callable[..., Any], arguments: dict[str, Any], mesh: AbstractMesh, out_specs: Any
) -> Any:
    """Calls `function(**arguments)` on each device's part of the arrays."""
    arrays = {name: x for name, x in arguments.items() if hasattr(x, "ndim")}
    others = {name: x for name, x in arguments.items() if name not in arrays}
    return jax.shard_map(
        lambda arrays: function(**arrays, **others),
        in_specs=({name: _spec(name, arguments, mesh) for name in arrays},),
        out_specs=out_specs,
        check_vma=False,  # a Pallas call does not say over which axes its outputs vary
    )(arrays)
