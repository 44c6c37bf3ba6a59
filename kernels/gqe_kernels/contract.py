"""The contract of the attention: what every implementation takes and what it returns.

An implementation is a function `attention(routed, mask, scale)` that returns the slots of a GQE
layer before W_O: the hard slots `o[g, j]`, group-major and within a group by rank; then, with a
`slot_weight`, the weighted slot; then, with a `shared_query`, the shared slot. The equations are in
`gqe_jax/model/attention.py`; the source is Grouped Query Experts, arXiv 2606.20945.
"""

import dataclasses
import math
import numbers
import operator
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

AnyArray = Array | np.ndarray
Slots = Float[Array, "batch q_len slot head_dim"]
ImplementationName = Literal["reference", "xla", "decode", "pallas_tpu", "pallas_gpu", "cudnn"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routed:
    """Queries, keys and values of one layer, and the experts that each token selected.

    Attributes:
      query: the queries of all experts, after RoPE.
      key, value: one head for each group.
      expert_index: the experts that a token selected in each group, by rank; all of a token's
        indices in a group differ. None: every expert in order, which is grouped-query attention.
      slot_weight: the weight of each selected expert in the weighted slot; None: no such slot.
      shared_query: the query of the shared head; None: no such slot.
      shared_key, shared_value: what the shared head attends to; None: the mean over the groups.
    """

    __no_type_check__ = True  # JAX puts other things than arrays at the leaves of a tree

    query: Float[Array, "batch q_len group expert head_dim"]
    key: Float[Array, "batch kv_len group head_dim"]
    value: Float[Array, "batch kv_len group head_dim"]
    expert_index: Int[Array, "batch q_len group k"] | None = None
    slot_weight: Float[Array, "batch q_len group k"] | None = None
    shared_query: Float[Array, "batch q_len head_dim"] | None = None
    shared_key: Float[Array, "batch kv_len head_dim"] | None = None
    shared_value: Float[Array, "batch kv_len head_dim"] | None = None

    @property
    def top_k(self) -> int:
        """Experts that a token selects in each group."""
        index = self.expert_index
        return self.query.shape[3] if index is None else index.shape[3]

    @property
    def num_hard(self) -> int:
        """Hard slots: k for each group."""
        return self.query.shape[2] * self.top_k

    @property
    def num_slots(self) -> int:
        """Slots of a token: the hard ones, the weighted one and the shared one."""
        weighted, shared = self.slot_weight is not None, self.shared_query is not None
        return self.num_hard + weighted + shared

    @property
    def takes_mean(self) -> bool:
        """Whether the shared head attends to the means over the groups of key and value."""
        return self.shared_query is not None and self.shared_key is None

    def map_fields(self, names: tuple[str, ...], function: Callable[[Array], Any]) -> "Routed":
        """The same operands with `function` applied to those of these names."""
        return _mapped(self, names, function)

    def map_queries(self, function: Callable[[Array], Any]) -> "Routed":
        """The same operands with `function` applied to those that have a row for each query."""
        return _mapped(self, ("query", "expert_index", "slot_weight", "shared_query"), function)

    def map_keys(self, function: Callable[[Array], Any]) -> "Routed":
        """The same operands with `function` applied to those that have a row for each key."""
        return _mapped(self, ("key", "value", "shared_key", "shared_value"), function)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys each query attends to; a query that sees no key has a slot of zeros.

    Attributes:
      offset: the position among the keys of the first query. With several pieces, the queries are
        as many parts of equal length, each at its own position, in ascending order. None: `start`.
      q_segment_ids, kv_segment_ids: a query sees the keys of its own segment alone; segment 0 is
        padding, whose slots are zero and get no gradient. Both or neither.
      causal: a query sees no key at a later position.
      start: the position of the first query where it is known while tracing.
    """

    __no_type_check__ = True

    offset: Int[AnyArray, "batch piece"] | None = None
    q_segment_ids: Int[AnyArray, "batch q_len"] | None = None
    kv_segment_ids: Int[AnyArray, "batch kv_len"] | None = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    start: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def pieces(self) -> int:
        """Parts of the queries that have positions of their own."""
        return 1 if self.offset is None else self.offset.shape[1]

    @property
    def static_offset(self) -> int | None:
        """The position of the first query, or None where it is not known while tracing."""
        return self.start if self.offset is None else None

    @property
    def hides_any(self) -> bool:
        """Whether some query may not see some key."""
        return self.causal or self.q_segment_ids is not None

    @property
    def is_prefill(self) -> bool:
        """Whether the mask is causal with a known start and has no other field set."""
        others = [field for field in dataclasses.fields(self) if field.name != "start"]
        return all(getattr(self, field.name) is field.default for field in others)

    @property
    def offsets(self) -> Int[AnyArray, "#batch piece"]:
        """The position of the first query of each piece; a NumPy array where it is `start`."""
        return np.full((1, 1), self.start, np.int32) if self.offset is None else self.offset

    def map_queries(self, function: Callable[[Array], Any]) -> "Mask":
        """The same mask with `function` applied to what has an entry for each query."""
        return _mapped(self, ("q_segment_ids",), function)

    def map_keys(self, function: Callable[[Array], Any]) -> "Mask":
        """The same mask with `function` applied to what has an entry for each key."""
        return _mapped(self, ("kv_segment_ids",), function)


Attention = Callable[[Routed, Mask, float], Slots]
Implementation = ImplementationName | Attention

# The logical axes of each array; a mesh maps their names to its own.
_TOKENS: Any = ("batch", "sequence")
_GROUPS: Any = (*_TOKENS, "group", None)
_HEADS: Any = (*_GROUPS, None)
_SHARED: Any = (*_TOKENS, None)
AXES = Routed(
    query=_HEADS,
    key=_GROUPS,
    value=_GROUPS,
    expert_index=_GROUPS,
    slot_weight=_GROUPS,
    shared_query=_SHARED,
    shared_key=_SHARED,
    shared_value=_SHARED,
)
_OFFSETS: Any = ("batch", None)
MASK_AXES = Mask(offset=_OFFSETS, q_segment_ids=_TOKENS, kv_segment_ids=_TOKENS)


def _mapped[Operands: (Routed, Mask)](
    operands: Operands, names: tuple[str, ...], function: Callable[[Array], Any]
) -> Operands:
    given = {name: x for name in names if (x := getattr(operands, name)) is not None}
    return dataclasses.replace(operands, **{name: function(x) for name, x in given.items()})


def map_with_axes[Operands: (Routed, Mask)](
    function: Callable[[Array, tuple[str | None, ...]], Any], operands: Operands, axes: Operands
) -> Operands:
    """The tree of `function(array, its_axes)` over the arrays that `operands` has.

    Args:
      axes: `AXES` or `MASK_AXES`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: function(x, getattr(axes, path[0].name)), operands
    )


def split_pieces(routed: Routed, mask: Mask) -> Iterator[tuple[Routed, Mask]]:
    """Each piece of the queries with its own mask, for implementations that know one position."""
    length = routed.query.shape[1] // mask.pieces
    for piece in range(mask.pieces):
        take = operator.itemgetter((slice(None), slice(piece * length, (piece + 1) * length)))
        offset = mask.offsets[:, piece : piece + 1]
        yield routed.map_queries(take), dataclasses.replace(mask.map_queries(take), offset=offset)


def default_scale(head_dim: int) -> float:
    """The factor of the logits, 1 / sqrt(head_dim)."""
    return 1.0 / math.sqrt(head_dim)


def make_mask(
    routed: Routed,
    *,
    causal: bool,
    q_segment_ids: Int[AnyArray, "batch q_len"] | None,
    kv_segment_ids: Int[AnyArray, "batch kv_len"] | None,
    q_offset: int | Int[AnyArray, "..."],
) -> Mask:
    """The mask that the arguments of `routed_attention` describe.

    Raises:
      ValueError: names the argument, what it is, and what would fit `routed`.
    """
    (batch, q_len), kv_len = routed.query.shape[:2], routed.key.shape[1]
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("q_segment_ids and kv_segment_ids must be given together")
    _check_shape("q_segment_ids", q_segment_ids, (batch, q_len))
    _check_shape("kv_segment_ids", kv_segment_ids, (batch, kv_len))
    mask = Mask(None, q_segment_ids, kv_segment_ids, causal)
    if isinstance(q_offset, int | np.integer):
        return dataclasses.replace(mask, start=int(q_offset))
    shape = jnp.shape(q_offset)
    pieces = shape[1] if len(shape) == 2 else 1
    if shape not in ((), (batch,), (batch, pieces)) or pieces < 1 or q_len % pieces:
        raise ValueError(
            f"q_offset has shape {shape}; it must be a scalar, [{batch}], or [{batch}, piece] with "
            f"pieces into which the {q_len} queries divide"
        )
    xp = jnp if isinstance(q_offset, jax.Array) else np  # NumPy's values are known while tracing
    offset = xp.broadcast_to(xp.asarray(q_offset, np.int32).T, (pieces, batch)).T
    return dataclasses.replace(mask, offset=offset)


def with_static_scale(routed: Routed, scale: float | AnyArray) -> tuple[Routed, float]:
    """The operands and a Python number as their scale; an array is multiplied into the queries."""
    if isinstance(scale, numbers.Real | np.ndarray):
        return routed, float(scale)

    def scaled(x: Array) -> Array:
        factor = jnp.asarray(scale, jnp.promote_types(x.dtype, jnp.float32))
        return (x * factor).astype(x.dtype)

    return routed.map_fields(("query", "shared_query"), scaled), 1.0


def check(routed: Routed) -> None:
    """Checks the shapes and dtypes of the operands.

    Raises:
      ValueError: names the argument of `routed_attention`, what it is, and what would fit.
    """
    query, key, value = routed.query, routed.key, routed.value
    if query.ndim != 5:
        raise ValueError(
            f"query has shape {query.shape}; it must be [batch, q_len, group, expert, head_dim]"
        )
    batch, q_len, group, expert, head_dim = query.shape
    if key.ndim != 4 or (key.shape[0], *key.shape[2:]) != (batch, group, head_dim):
        raise ValueError(
            f"key has shape {key.shape}; query {query.shape} needs "
            f"[{batch}, kv_len, {group}, {head_dim}]"
        )
    kv_len = key.shape[1]
    _check_shape("value", value, key.shape)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {x.dtype}; it must be a floating type")
    names = ("query", "key", "value", "shared_query", "shared_key", "shared_value")
    types = {name: x.dtype for name in names if (x := getattr(routed, name)) is not None}
    if len(set(types.values())) > 1:
        found = ", ".join(f"{name} {dtype}" for name, dtype in types.items())
        raise ValueError(f"the dtypes are {found}; they must be one")
    if (index := routed.expert_index) is not None:
        if index.ndim != 4 or index.shape[:3] != (batch, q_len, group):
            raise ValueError(
                f"expert_index has shape {index.shape}; query {query.shape} needs "
                f"[{batch}, {q_len}, {group}, k]"
            )
        if not jnp.issubdtype(index.dtype, jnp.integer):
            raise ValueError(f"expert_index has dtype {index.dtype}; it must be an integer type")
        if not 1 <= index.shape[3] <= expert:
            raise ValueError(
                f"expert_index selects k = {index.shape[3]} experts of the {expert} in a group; "
                "k must be between 1 and the number of experts"
            )
    _check_shape("slot_weight", routed.slot_weight, (batch, q_len, group, routed.top_k))
    if (routed.shared_key is None) != (routed.shared_value is None):
        raise ValueError("shared_key and shared_value must be given together")
    if routed.shared_query is None and routed.shared_key is not None:
        raise ValueError("shared_key and shared_value were given without a shared_query")
    _check_shape("shared_query", routed.shared_query, (batch, q_len, head_dim))
    _check_shape("shared_key", routed.shared_key, (batch, kv_len, head_dim))
    _check_shape("shared_value", routed.shared_value, (batch, kv_len, head_dim))


def _check_shape(name: str, x: AnyArray | None, shape: tuple[int, ...]) -> None:
    if x is not None and x.shape != shape:
        raise ValueError(f"{name} has shape {x.shape}; it must be {shape}")
