"""Where heads, experts and slots lie in the lanes of the projections' flat arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from gqe_kernels.contract import Routed, Slots
from gqe_kernels.reference import shared_operands

LANES = 128
MASKED = -1e30
# Above every masked logit: in a row that has seen no key yet, exp2(MASKED - NOTHING_SEEN) is zero.
NOTHING_SEEN = -5e29
LOG2E = 1.4426950408889634

reciprocal = getattr(pltpu, "reciprocal", None) or pl.reciprocal  # the second: before jax 0.12


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static facts of one call.

    A *row* is what is cut from an array at a time, a multiple of 128 lanes: one group's head, or at
    head_dim 64 the heads of two neighbouring groups. A *unit* is the groups that share a row of K.
    Head h = g * k + j is rank j of group g, and is hard slot h; the shared head comes last.
    """

    group: int
    expert: int
    k: int
    head_dim: int
    weighted: bool
    shared: bool

    @classmethod
    def of(cls, routed: Routed) -> "Layout":
        """The layout in which the kernels read the operands; a head that fits no row is padded."""
        *_, group, expert, head_dim = routed.query.shape
        return cls(
            group=group,
            expert=expert,
            k=routed.top_k,
            head_dim=head_dim if takes(group, head_dim) else -(-head_dim // LANES) * LANES,
            weighted=routed.slot_weight is not None,
            shared=routed.shared_query is not None,
        )

    @property
    def groups_per_unit(self) -> int:
        return 2 if self.head_dim == LANES // 2 else 1

    @property
    def row(self) -> int:
        return self.head_dim * self.groups_per_unit

    @property
    def units(self) -> int:
        return self.group // self.groups_per_unit

    @property
    def hard(self) -> int:
        return self.k * self.group

    @property
    def heads(self) -> int:
        return self.hard + self.shared

    @property
    def padded_heads(self) -> int:
        """Rows of an array with one row of numbers a head."""
        return -(-self.heads // 8) * 8

    @property
    def slots(self) -> int:
        return self.hard + self.weighted + self.shared

    @property
    def weighted_slot(self) -> int:
        return self.hard

    @property
    def shared_slot(self) -> int:
        return self.hard + self.weighted

    def half(self, slot: int) -> int:
        """Which head_dim-wide part of its row a slot, or an expert's query, lies in."""
        return slot % self.groups_per_unit


def takes(group: int, head_dim: int) -> bool:
    """Whether rows of K and V begin at multiples of 128 lanes; otherwise head_dim is padded."""
    return head_dim % LANES == 0 or (head_dim == LANES // 2 and group % 2 == 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flat:
    """The operands of `Routed` as the kernels read them: heads side by side in the lanes."""

    __no_type_check__ = True  # JAX puts other things than arrays at the leaves of a tree

    query: Float[Array, "batch q_len experts_lanes"]
    key: Float[Array, "batch kv_len kv_lanes"]
    value: Float[Array, "batch kv_len kv_lanes"]
    expert_index: Int[Array, "batch q_len hard"] | None
    slot_weight: Float[Array, "batch q_len hard"] | None
    shared_query: Float[Array, "batch q_len head_dim"] | None
    shared_key: Float[Array, "batch kv_len head_dim"] | None
    shared_value: Float[Array, "batch kv_len head_dim"] | None


def flatten(layout: Layout, routed: Routed) -> Flat:
    """The operands laid flat: without a copy, unless a head is padded.

    The means over the groups are made here.
    """
    head_dim, rows = routed.query.shape[-1], (*routed.query.shape[:2], layout.hard)

    def heads(x) -> Any:
        if x is None:
            return None
        if layout.head_dim > head_dim:
            x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, layout.head_dim - head_dim),))
        return x.reshape(*x.shape[:2], -1)

    index, weight = routed.expert_index, routed.slot_weight
    shared_key = shared_value = None
    if layout.shared:
        shared_key, shared_value = shared_operands(routed)
    return Flat(
        query=heads(routed.query),
        key=heads(routed.key),
        value=heads(routed.value),
        expert_index=None if index is None else index.astype(jnp.int32).reshape(*rows),
        slot_weight=None if weight is None else weight.reshape(*rows),
        shared_query=heads(routed.shared_query),
        shared_key=heads(shared_key),
        shared_value=heads(shared_value),
    )


def unflatten_slots(
    layout: Layout, slots: Float[Array, "batch q_len slot_lanes"], head_dim: int
) -> Slots:
    """The slots without the padding of their heads."""
    return slots.reshape(*slots.shape[:2], layout.slots, layout.head_dim)[..., :head_dim]


def half_mask(shape: tuple[int, ...], half: int) -> jax.Array:
    """True on the lanes of one half of a 128-lane row."""
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    return lane >= LANES // 2 if half else lane < LANES // 2


def select_query(layout: Layout, query_ref, index_ref, head: int) -> jax.Array:
    """A hard head's query of each token, in its group's half of a float32 row, the rest zero.

    Args:
      query_ref: [q, group * expert * head_dim].
      index_ref: [q, hard], the chosen experts within their groups; None: every expert in order.
    """
    group, row = head // layout.k, layout.row
    half = layout.half(group)
    if index_ref is None:
        return read_slot(layout, query_ref, head, half)
    index = index_ref[:, head : head + 1]
    if layout.groups_per_unit == 1:
        chosen: Any = None
        for m in range(layout.expert):
            start = (group * layout.expert + m) * row
            x = query_ref[:, start : start + row].astype(jnp.float32)
            chosen = x if chosen is None else jnp.where(index == m, x, chosen)
        return chosen
    # Two experts lie in a row: keep the chosen one's lanes of the row that holds it, then copy them
    # to the other half, and cut.
    first, shape = group * layout.expert, (index.shape[0], row)
    upper = half_mask(shape, 1).astype(jnp.int32)
    chosen = jnp.zeros(shape, jnp.float32)
    for column in range(first // 2, (first + layout.expert - 1) // 2 + 1):
        x = query_ref[:, column * row : (column + 1) * row].astype(jnp.float32)
        chosen = jnp.where(first + index == 2 * column + upper, x, chosen)
    return jnp.where(half_mask(shape, half), chosen + swap_halves(chosen), 0.0)


def swap_halves(x: jax.Array) -> jax.Array:
    return pltpu.roll(x, LANES // 2, 1)


def read_slot(layout: Layout, slots_ref, slot: int, half: int) -> jax.Array:
    """A slot of `slots_ref` [q, slot * head_dim], in the given half of a float32 row, else zero."""
    row, own = layout.row, layout.half(slot)
    if layout.groups_per_unit == 1:
        return slots_ref[:, slot * row : (slot + 1) * row].astype(jnp.float32)
    start = slot // 2 * row
    if slot == layout.slots - 1 and own == 0:  # no slot beside it
        x = widen(layout, slots_ref[:, start : start + layout.head_dim].astype(jnp.float32))
    else:
        x = slots_ref[:, start : start + row].astype(jnp.float32)
    return jnp.where(half_mask(x.shape, half), x if own == half else swap_halves(x), 0.0)


def expand_query(layout: Layout, heads, index, write) -> None:
    """The transpose of the selection: gradients of the chosen queries, zeros of the others.

    Args:
      heads: function of a hard head to its gradient, [q, row]; at head_dim 64 in both halves.
      index: function of a hard head to the chosen experts [q, 1] within its group; None: every
        expert in order.
      write: function that takes a row's number and its [q, row].
    """
    per_row = layout.groups_per_unit
    for column in range(layout.group * layout.expert // per_row):
        here, out = column * per_row, None
        if index is None:
            out = heads(here)
            if per_row == 2:
                out = jnp.where(half_mask(out.shape, 1), heads(here + 1), out)
            write(column, out)
            continue
        for group in sorted({(here + h) // layout.expert for h in range(per_row)}):
            first = group * layout.expert
            for head in range(group * layout.k, (group + 1) * layout.k):
                gradient, own = heads(head), here - first
                if per_row == 2:
                    own = own + half_mask(gradient.shape, 1).astype(jnp.int32)
                chosen = index(head) == own
                out = jnp.where(chosen, gradient, 0.0 if out is None else out)
        write(column, out)


def result_shape(like: jax.Array, shape, dtype) -> jax.ShapeDtypeStruct:
    """What a kernel returns: under `shard_map`, it varies over the mesh axes that `like` does."""
    aval = jax.typeof(like)
    if hasattr(aval, "manual_axis_type"):  # jax 0.12; before it, the name was vma
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=aval.manual_axis_type)
    names: Any = {"vma": aval.vma}
    return jax.ShapeDtypeStruct(shape, dtype, **names)


def widen(layout: Layout, x: jax.Array) -> jax.Array:
    """The shared head's [q, head_dim] in the lower half of a row, where a row holds two heads."""
    return x if layout.groups_per_unit == 1 else jnp.concatenate([x, jnp.zeros_like(x)], axis=1)


class SlotWriter:
    """Writes slots, in order; at head_dim 64 each comes in both halves, and two make a row."""

    def __init__(self, layout: Layout, slots_ref):
        self.layout, self.slots_ref = layout, slots_ref
        self.pending: Any = None

    def write(self, slot: int, x: jax.Array) -> None:
        layout, ref, row = self.layout, self.slots_ref, self.layout.row
        if layout.groups_per_unit == 1:
            ref[:, slot * row : (slot + 1) * row] = x.astype(ref.dtype)
            return
        start = slot // 2 * row
        if layout.half(slot):
            both = jnp.where(half_mask(x.shape, 1), x, self.pending)
            ref[:, start : start + row] = both.astype(ref.dtype)
        elif slot == layout.slots - 1:  # no slot beside it
            ref[:, start : start + layout.head_dim] = x[:, : layout.head_dim].astype(ref.dtype)
        self.pending = x


def for_row_chunks(q: int, name: str, body) -> None:
    """Work outside the tiles, on a part of the rows at a time, so that it stays in registers.

    Args:
      body: function of the chunk's rows, a `pl.ds`, and their number before it.
      name: of the loop's body in the compiler's schedule.
    """
    rows = 2 * LANES if q % (2 * LANES) == 0 else LANES

    @pl.loop(0, q // rows)
    def chunk(c):
        with jax.named_scope(name):
            start = pl.multiple_of(c * rows, rows)
            body(pl.ds(start, rows), start)
