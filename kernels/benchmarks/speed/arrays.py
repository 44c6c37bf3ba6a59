"""What contenders are made of: random arrays, and functions of them."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.benchmarks.speed.cases import Case
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
    """One whose program is `function`, traced within `around`."""

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
    """Standard normal."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def selection(case: Case, groups: int, experts: int) -> jax.Array:
    """Experts of each token and group, all equally likely: [batch, length, group, k]."""
    shape = (case.batch, case.length, groups, experts)
    order = np.argsort(np.random.default_rng(0).random(shape, np.float32), axis=-1)
    return jnp.asarray(order[..., : case.top_k], jnp.int32)


def with_gradients(function: Callable[..., Any], training: bool) -> Callable[..., Any]:
    """`function(*floats)`; or, of (cotangent, *floats), its result and all gradients."""
    if not training:
        return function

    def both(cotangent, *floats):
        out, vjp = jax.vjp(function, *floats)
        return out, vjp(cotangent)

    return both
