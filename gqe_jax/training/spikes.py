"""Steps whose loss or gradient norm is a spike: found inside the train step, and undone there."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

_DECAY = 0.97  # of the running mean and variance, as in ZClip
_LEAST_DEVIATION = 0.01  # of the mean: below it no deviation counts as noise
MOST_IN_A_ROW = 10
"""So many skipped steps without another between them end a run."""


class SpikeState(NamedTuple):
    """Running statistics of the loss and of the gradient norm, in that order."""

    count: Int[Array, ""]
    mean: Float[Array, "2"]
    variance: Float[Array, "2"]
    in_a_row: Int[Array, ""]
    """The number of steps that were skipped one after another, up to the last."""


def begin() -> SpikeState:
    """The statistics before the first step."""
    zero, zeros = jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.float32)
    return SpikeState(zero, zeros, zeros, zero)


def watch(
    state: SpikeState, loss: Array, norm: Array, *, threshold: float, warmup_steps: int
) -> tuple[Bool[Array, ""], SpikeState]:
    """Whether a step is a spike, and the statistics after it.

    A spike is not finite, or exceeds the running mean by `threshold` standard deviations; the
    latter only after `warmup_steps` steps. It moves the statistics by no more than the largest
    value that would pass, so that they follow a loss that stays on another level.
    """
    values = jnp.stack([loss, norm]).astype(jnp.float32)
    finite = jnp.isfinite(values)
    deviation = jnp.maximum(jnp.sqrt(state.variance), _LEAST_DEVIATION * jnp.abs(state.mean))
    largest = jnp.where(state.count < warmup_steps, jnp.inf, state.mean + threshold * deviation)
    spike = ~jnp.all(finite & (values <= largest))
    weight = jnp.maximum(1 - _DECAY, 1 / (state.count + 1))
    change = jnp.where(finite, jnp.minimum(values, largest) - state.mean, 0.0)
    return spike, SpikeState(
        count=jnp.asarray(optax.safe_increment(state.count)),
        mean=state.mean + weight * change,
        variance=(1 - weight) * (state.variance + weight * jnp.square(change)),
        in_a_row=jnp.where(spike, state.in_a_row + 1, 0),
    )


def keep_if[Tree](spike: Bool[Array, ""], old: Tree, new: Tree) -> Tree:
    """`old` where the step is a spike, else `new`."""
    return jax.tree.map(lambda a, b: jnp.where(spike, a, b), old, new)


def keep_optimizer_if(spike: Bool[Array, ""], old: Any, new: Any) -> Any:
    """Returns what `keep_if` does, for the state of the optimizer's chain.

    The steps that its schedules have counted go on where a step is skipped.
    """
    return tuple(
        after if isinstance(after, optax.ScaleByScheduleState) else keep_if(spike, before, after)
        for before, after in zip(old, new, strict=True)
    )
