"""The order of a sequence in which all shards of the context axis have the same causal work.

Late tokens attend to more than early ones. So a sequence is cut into 2C pieces for C shards, and
shard c holds pieces c and 2C - 1 - c, an early and a late one. Arrays come and go in their natural
order, and change to this one and back by exchanging half shards.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gqe_jax.sharding import partition_spec
from gqe_kernels.contract import AnyArray


def context_shards(length: int) -> int:
    """Shards of the current mesh's context axis over which a sequence is put in zigzag order: 1
    where there is no such axis, or where its shards do not divide into halves."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape.get("context", 1)
    return shards if length % (2 * shards) == 0 else 1


def to_zigzag(x: AnyArray, *axes: str | None) -> Array:
    """`x`, in natural order, put in zigzag order.

    Args:
      axes: logical axes of `x`, among them "sequence"; by default it begins with batch, sequence.
    """
    return _exchange(x, axes, "to")


def from_zigzag(x: Array, *axes: str | None) -> Array:
    """The inverse of `to_zigzag`."""
    return _exchange(x, axes, "from")


def _exchange(x: AnyArray, axes: tuple[str | None, ...], direction: Literal["to", "from"]) -> Array:
    axes = axes or ("batch", "sequence", *(None,) * (x.ndim - 2))
    axis = axes.index("sequence")
    shards = context_shards(x.shape[axis])
    if shards == 1:
        return jnp.asarray(x)
    # In natural order, shard c holds pieces 2c and 2c + 1.
    homes = [[_home(2 * shard + half, shards) for shard in range(shards)] for half in (0, 1)]

    def send(x: Array, half: int) -> Array:
        pairs = list(enumerate(homes[half]))
        if direction == "from":
            pairs = [(home, shard) for shard, home in pairs]
        return jax.lax.ppermute(x, "context", pairs)

    def local(x: Array) -> Array:
        first, second = jnp.split(x, 2, axis=axis)
        # Of a shard's two pieces, the even-numbered one is the early one on every other shard.
        is_even = jax.lax.axis_index("context") % 2 == 0
        if direction == "to":
            even, odd = send(first, 0), send(second, 1)
            parts = jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)
        else:
            even, odd = jnp.where(is_even, first, second), jnp.where(is_even, second, first)
            parts = send(even, 0), send(odd, 1)
        return jnp.concatenate(parts, axis=axis)

    spec = partition_spec(axes, x.shape, jax.sharding.get_abstract_mesh())
    return jax.shard_map(local, in_specs=spec, out_specs=spec)(jnp.asarray(x))


def _home(piece: int, shards: int) -> int:
    return min(piece, 2 * shards - 1 - piece)
