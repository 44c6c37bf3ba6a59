"""Names for arrays that `jax.checkpoint` is to keep."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def kept(x: Float[Array, "..."], name: str) -> Float[Array, "..."]:
    """`x`, known to the policies of `jax.checkpoint` by this name.

    `jax.checkpoint` rounds the numbers that it keeps to the type that they have, to undo what XLA
    may have made of them: a pass over the array on TPU, of which a kernel's result has no need. So
    their bits are named.
    """
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return lax.bitcast_convert_type(checkpoint_name(bits, name), x.dtype)


@kept.defjvp
def _kept_jvp(name, primals, tangents):
    return kept(*primals, name), tangents[0]
