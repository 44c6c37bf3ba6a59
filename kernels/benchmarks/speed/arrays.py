"""The random arrays that contenders take, and the functions that they time."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.benchmarks.speed.cases import SpeedCase
from kernels.benchmarks.speed.timing import Contender, repeated


def contender(
    name: str,
    side: str,
    function: Callable[..., Any],
    arguments: tuple,
    flops: float,
    options: Mapping[str, Any] | None = None,
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    slots: Callable[[Any], jax.Array] | None = None,
    compiler_options: Mapping[str, Any] | None = None,
) -> Contender:
    """A contender whose program repeats `function`, traced within `around`."""

    def lower(times: int) -> jax.stages.Lowered:
        with around():
            return jax.jit(repeated(function, times)).lower(*arguments)

    flags = compiler_options or {}
    return Contender(
        name,
        side,
        lower,
        arguments,
        flops,
        {**(options or {}), **flags},
        compiler_options=flags,
        slots=slots,
    )


def normal(seed: int, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """An array of standard normal values."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def selection(case: SpeedCase, groups: int, experts: int) -> jax.Array:
    """Random experts for each token and group: [batch, length, group, k]."""
    shape = (case.batch, case.length, groups, experts)
    order = np.argsort(np.random.default_rng(0).random(shape, np.float32), axis=-1)
    return jnp.asarray(order[..., : case.top_k], jnp.int32)


def with_gradients(function: Callable[..., Any], training: bool) -> Callable[..., Any]:
    """`function` itself; in training, its result and gradients, from (cotangent, *floats)."""
    if not training:
        return function

    def both(cotangent, *floats):
        out, vjp = jax.vjp(function, *floats)
        return out, vjp(cotangent)

    return both
