"""The random arrays that contenders take, and the functions that they time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.benchmarks.speed.cases import SpeedCase


def normal(seed: int, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """An array of standard normal values."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def selection(case: SpeedCase, groups: int, experts: int) -> jax.Array:
    """Random experts for each token and group: [batch, length, group, k]."""
    shape = (case.batch, case.length, groups, experts)
    order = np.argsort(np.random.default_rng(0).random(shape, np.float32), axis=-1)
    return jnp.asarray(order[..., : case.top_k], jnp.int32)


def with_gradients(function: Callable[..., Any], training: bool) -> Callable[..., Any]:
    """`function` itself; in training, its result and gradients, from (cotangent, *arguments)."""
    if not training:
        return function

    def both(cotangent, *arguments):
        out, vjp = jax.vjp(function, *arguments)
        return out, vjp(cotangent)

    return both
