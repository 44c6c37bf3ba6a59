"""Checksums and finiteness of a state's arrays, computed where the arrays lie."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt32


def measure(tree: Any) -> tuple[dict[str, int], list[str]]:
    """Returns the checksum of each array by its name, and the names of those with NaN or infinity.

    A checksum depends on the bits, their place and the dtype, and not on the mesh. A change of any
    one element changes it.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    arrays = {f"{_name(path)}:{leaf.dtype}": leaf for path, leaf in leaves}
    measured = jax.device_get(_measure(arrays))
    sums = {name: int(checksum) for name, (checksum, _) in measured.items()}
    return sums, [name.rpartition(":")[0] for name, (_, finite) in measured.items() if not finite]


@jax.jit
def _measure(arrays: dict[str, Array]) -> dict[str, tuple[UInt32[Array, ""], Bool[Array, ""]]]:
    return {name: (_checksum(x), jnp.all(jnp.isfinite(x))) for name, x in arrays.items()}


def _checksum(x: Array) -> UInt32[Array, ""]:
    """Sum modulo 2³² of each element's bits times an odd number that depends on its place."""
    if x.dtype == bool or x.dtype.itemsize == 1:
        bits = x.astype(jnp.uint32)
    elif x.dtype.itemsize == 2:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)  # 64 bits get another axis
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
    return jnp.sum(bits * (place * jnp.uint32(2654435761 * 2 % 2**32) | 1), dtype=jnp.uint32)


def _name(path: tuple[Any, ...]) -> str:
    parts = (getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))) for key in path)
    return "/".join(map(str, parts))
