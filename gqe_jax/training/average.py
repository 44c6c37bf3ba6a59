"""The exponential average of the parameters, which is evaluated and exported in their place."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int


def update_average(average: Any, params: Any, step: Int[Array, ""] | int, decay: float) -> Any:
    """Returns the tree `average` after `step` steps, the last of which made the tree `params`.

    Early averages have a shorter memory, so that the initial parameters leave them soon: the decay
    of step t is the smaller of `decay` and (1 + t) / (10 + t).
    """
    weight = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return optax.incremental_update(params, average, weight)
