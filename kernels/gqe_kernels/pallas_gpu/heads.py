"""What each head of a launch reads, and the slot that it writes."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


class Heads(NamedTuple):
    """The heads of a launch: `per_group` of each group, then the shared head, if there is one.

    Attributes:
      experts: experts of a group among which the kernel selects for each head; 1: no selection.
      weighted: a slot stands between the hard ones and the shared one. The kernels leave it as it
        is: it is a sum over the hard slots, which are not all in one place before they end.
    """

    group: int
    per_group: int
    experts: int = 1
    shared: bool = False
    weighted: bool = False

    @property
    def hard(self) -> int:
        return self.group * self.per_group

    @property
    def number(self) -> int:
        return self.hard + self.shared

    @property
    def slots(self) -> int:
        return self.number + self.weighted

    def slot(self, head):
        """The slot that a head writes."""
        if not (self.shared and self.weighted):
            return head
        return head + (head == self.hard).astype(jnp.int32)

    def group_of(self, head):
        """The group of a hard head."""
        return lax.div(head, jnp.int32(self.per_group))

    def choose(self, head, of_hard: Callable[[], None], of_shared: Callable[[], None]) -> None:
        """Calls what is for a hard head or what is for the shared one."""
        if not self.shared:
            of_hard()
        else:
            pl.when(head < self.hard)(of_hard)
            pl.when(head == self.hard)(of_shared)

    def read(self, batch, head, refs, shared_refs, body: Callable[..., None]) -> None:
        """Calls `body` with the keys and values of a head: functions from rows to a slice."""

        def of_hard():
            group = self.group_of(head)
            body(*(lambda rows, ref=ref: ref.at[batch, rows, group] for ref in refs))

        def of_shared():
            body(*(lambda rows, ref=ref: ref.at[batch, rows] for ref in shared_refs))

        self.choose(head, of_hard, of_shared)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByHead:
    """The operands as the kernels read them, padded to whole blocks.

    Attributes:
      query: the queries of all experts, group-major; of the heads alone, if `Heads.experts` is 1.
      expert_index, shared_query: only where the forward kernel selects among experts.
    """

    __no_type_check__ = True  # JAX puts other things than arrays at the leaves of a tree

    query: Float[Array, "batch q_len head head_dim"]
    key: Float[Array, "batch kv_len group head_dim"]
    value: Float[Array, "batch kv_len group head_dim"]
    expert_index: Int[Array, "batch q_len hard"] | None
    shared_query: Float[Array, "batch q_len head_dim"] | None
    shared_key: Float[Array, "batch kv_len head_dim"] | None
    shared_value: Float[Array, "batch kv_len head_dim"] | None
