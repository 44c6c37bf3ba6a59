"""The attention kernels on a mesh: under `shard_map`, in this one place.

A kernel is opaque to XLA's partitioner, so each device runs it on its own rows, queries and groups.

- Over the context axis, keys and values are gathered: a shard's queries are one piece of the
  sequence, or two (`gqe_jax/model/zigzag.py`), and see all keys before them.
- Over the tensor axis, the weighted slot is summed, and the shared head is divided: it attends to
  the mean over all groups, and each shard computes it for a part of the queries.

Decoding has no kernel: XLA partitions it, and moves only logits and outputs of the shared head.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int

from gqe_jax.sharding import check_nested, check_rules, free_axes, partition_spec
from gqe_kernels import Attention, Mask, Routed, Slots, best_attention
from gqe_kernels.contract import AXES, MASK_AXES, AnyArray, map_with_axes
from gqe_kernels.reference import AxisNames, shared_operands


def sharded(attention: Attention, *, zigzag: bool = False) -> Attention:
    """`attention` on the current mesh (`jax.set_mesh`); as it is without one.

    A mask that gives the position of the queries, such as that of a cache, leaves the sequences
    whole on every device.

    Args:
      attention: a function of the contract.
      zigzag: the sequence is in the order of `gqe_jax/model/zigzag.py`.
    """

    @jax.named_scope("attention")
    def on_mesh(routed: Routed, mask: Mask, scale: float) -> Slots:
        mesh = jax.sharding.get_abstract_mesh()
        is_decoding = attention is best_attention and routed.query.shape[1] == 1
        if mesh.empty or not free_axes(mesh) or is_decoding:
            return attention(routed, mask, scale)
        check_rules(mesh)
        check_nested(routed.query, mesh)
        routed_specs, mask_specs = _specs(routed, mask, mesh)
        batch, sequence, group, *_ = routed_specs.query

        def local(routed: Routed, mask: Mask) -> tuple[Array, Array, Array]:
            if routed.takes_mean and (group or sequence):
                mean_key, mean_value = shared_operands(routed, group)
                routed = dataclasses.replace(routed, shared_key=mean_key, shared_value=mean_value)
            if sequence:
                routed, mask = _gather_keys(routed, mask, zigzag)
            return _local_slots(attention, routed, mask, scale, group)

        hard_spec, whole = PartitionSpec(batch, sequence, group), PartitionSpec(batch, sequence)
        slots = jax.shard_map(
            local,
            in_specs=(routed_specs, mask_specs),
            out_specs=(hard_spec, whole, whole),
            check_vma=False,  # a Pallas call does not say over which axes its outputs vary
        )(routed, mask)
        present = [x for x in slots if x.shape[2]]
        return jnp.concatenate(present, axis=2) if len(present) > 1 else present[0]

    return on_mesh


def _specs(routed: Routed, mask: Mask, mesh: AbstractMesh) -> tuple[Any, Any]:
    """The partition specs of the operands and of the mask, in trees like theirs."""
    has_positions = mask.static_offset != 0

    def spec(x: AnyArray, axes: tuple[str | None, ...]) -> PartitionSpec:
        if has_positions:
            axes = tuple(None if axis == "sequence" else axis for axis in axes)
        return partition_spec(axes, x.shape, mesh)

    return map_with_axes(spec, routed, AXES), map_with_axes(spec, mask, MASK_AXES)


def _local_slots(
    attention: Attention, routed: Routed, mask: Mask, scale: float, group: AxisNames
) -> tuple[Array, Array, Array]:
    """The hard slots of this shard's groups; the weighted and the shared slot, if any, complete."""
    shared = None
    if group and routed.shared_query is not None and _divides(routed, mask, group):
        shared = _shared_slot_by_parts(attention, routed, mask, scale, group)
        routed = dataclasses.replace(routed, shared_query=None, shared_key=None, shared_value=None)
    slots = attention(routed, mask, scale)
    num_hard, has_weighted = routed.num_hard, routed.slot_weight is not None
    hard, weighted, last = jnp.split(slots, [num_hard, num_hard + has_weighted], axis=2)
    if group and has_weighted:
        weighted = jax.lax.psum(weighted.astype(jnp.float32), group).astype(slots.dtype)
    return hard, weighted, last if shared is None else shared


def _gather_keys(routed: Routed, mask: Mask, zigzag: bool) -> tuple[Routed, Mask]:
    """A context shard's queries with the keys of all shards, in natural order."""
    batch, length = routed.query.shape[:2]
    shard, shards = jax.lax.axis_index("context"), jax.lax.axis_size("context")

    def gather(x: Array) -> Array:
        if not zigzag:
            return jax.lax.all_gather(x, "context", axis=1, tiled=True)
        pieces = jax.lax.all_gather(x, "context")
        pieces = pieces.reshape(*pieces.shape[:2], 2, -1, *x.shape[2:])
        ordered = jnp.concatenate([pieces[:, :, 0], pieces[::-1, :, 1]])
        return jnp.moveaxis(ordered, 0, 1).reshape(x.shape[0], -1, *x.shape[2:])

    pieces = [shard, 2 * shards - 1 - shard] if zigzag else [shard]
    offsets = jnp.stack(pieces) * (length // len(pieces))
    offset = jnp.broadcast_to(offsets, (batch, len(pieces)))
    return routed.map_keys(gather), dataclasses.replace(mask.map_keys(gather), offset=offset)


def _divides(routed: Routed, mask: Mask, group: AxisNames) -> bool:
    """Whether each piece of the queries divides into an early and a late part for each shard."""
    return routed.query.shape[1] % (2 * jax.lax.axis_size(group) * mask.pieces) == 0


def _shared_slot_by_parts(
    attention: Attention, routed: Routed, mask: Mask, scale: float, group: AxisNames
) -> Float[Array, "batch q_len 1 head_dim"]:
    """The shared slot, for which every shard of the groups does an equal part of the work.

    Shard t of T takes parts t and 2T - 1 - t of the 2T parts of every piece of the queries.
    """
    shard, shards = jax.lax.axis_index(group), jax.lax.axis_size(group)
    (batch, q_len), pieces = routed.query.shape[:2], mask.pieces
    rows = q_len // (2 * shards * pieces)
    parts = jnp.stack([shard, 2 * shards - 1 - shard])

    def take_parts(x: Any) -> Array:
        return jnp.take(x.reshape(batch, pieces, 2 * shards, -1), parts, axis=2).reshape(
            batch, -1, *x.shape[2:]
        )

    offsets: Int[Array, "batch piece"] = jnp.broadcast_to(mask.offsets, (batch, pieces))
    key, value = shared_operands(routed)
    query = take_parts(routed.shared_query)[:, :, None, None]
    shared = Routed(query, key[:, :, None], value[:, :, None])
    mask = dataclasses.replace(
        mask.map_queries(take_parts),
        offset=(offsets[:, :, None] + parts * rows).reshape(batch, -1),
    )
    slots = attention(shared, mask, scale).reshape(batch, pieces, 2, rows, -1)
    gathered = jax.lax.all_gather(slots, group)
    ordered = jnp.concatenate([gathered[:, :, :, 0], gathered[::-1, :, :, 1]])
    return jnp.moveaxis(ordered, 0, 2).reshape(batch, q_len, 1, -1)
