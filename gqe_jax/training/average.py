"""The exponential average of the parameters, which is evaluated and exported in their place."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def update_average[Tree](
    average: Tree, params: Tree, step: Int[Array, ""] | int, decay: float
) -> Tree:
    """The average after `step` steps, the last of which made `params`.

    Early averages have a shorter memory, so that the initial parameters leave them soon: the decay
    of step t is the smaller of `decay` and (1 + t) / (10 + t).
    """
    weight = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, p: a + (weight * (p - a)).astype(a.dtype), average, params)
