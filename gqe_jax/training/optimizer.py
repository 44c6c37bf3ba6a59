"""The optimizer, its schedules and ZClip, as Optax transformations (recipe: arXiv 2606.20945)."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from gqe_jax.config import OptimizerConfig
from gqe_jax.training.muon import muon, names_of


class ZClipState(NamedTuple):
    """State of `zclip`; `norm` and `clipped_norm` are the last step's, for logging."""

    count: Int[Array, ""]
    warmup_norms: Float[Array, "warmup"]
    mean: Float[Array, ""]
    variance: Float[Array, ""]
    norm: Float[Array, ""]
    clipped_norm: Float[Array, ""]


def zclip(
    *, alpha: float = 0.97, threshold: float = 2.5, warmup_steps: int = 25, cap: float = 1.0
) -> optax.GradientTransformation:
    """Adaptive clipping of gradient-norm spikes: ZClip, arXiv 2504.02507.

    During warm-up, norms are clipped only at `cap`; their mean and variance initialise the running
    statistics. Afterwards a norm whose z-score exceeds `threshold` is clipped to
    `mean + threshold · std / (z / threshold)`, and every norm to `cap`. The running statistics use
    the z-clipped norm, not the raw one.

    Args:
      alpha: decay of the running mean and variance.
      threshold: z-score above which a norm is a spike.
      warmup_steps: number of warm-up steps.
      cap: upper bound of the clipped norm.
    """

    def init(params: optax.Params) -> ZClipState:
        del params
        zero = jnp.zeros((), jnp.float32)
        return ZClipState(
            jnp.zeros((), jnp.int32), jnp.zeros(warmup_steps, jnp.float32), zero, zero, zero, zero
        )

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None):
        del params
        norm = optax.tree.norm(updates).astype(jnp.float32)
        warming_up = state.count < warmup_steps

        warmup_norms = jnp.where(jnp.arange(warmup_steps) == state.count, norm, state.warmup_norms)
        first_mean, first_variance = jnp.mean(warmup_norms), jnp.var(warmup_norms)

        std = jnp.sqrt(state.variance)
        z = (norm - state.mean) / (std + 1e-6)
        spike = z > threshold
        z_clipped = state.mean + threshold * std / (jnp.where(spike, z, threshold) / threshold)
        target = jnp.where(spike & ~warming_up, z_clipped, norm)
        mean = alpha * state.mean + (1 - alpha) * target
        variance = alpha * state.variance + (1 - alpha) * jnp.square(target - mean)

        clipped = jnp.minimum(target, cap)
        factor = jnp.where(norm > clipped, clipped / jnp.maximum(norm, 1e-30), 1.0)
        new = ZClipState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            warmup_norms=warmup_norms,
            mean=jnp.where(warming_up, first_mean, mean),
            variance=jnp.where(warming_up, first_variance, variance),
            norm=norm,
            clipped_norm=clipped,
        )
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), new

    return optax.GradientTransformation(init, update)


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, a plateau if the schedule is `wsd`, and decay to the floor.

    The phases are those of `config.phases(steps)`; the last step of the schedule has the floor.
    """
    warmup, decay, length = config.phases(steps)
    peak, floor = config.peak_learning_rate, config.final_learning_rate
    if config.schedule == "cosine" and decay > 0:
        falling = optax.cosine_decay_schedule(peak, decay, alpha=floor / peak)
    else:
        falling = optax.linear_schedule(peak, floor, decay)
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak), falling],
        [warmup, length - 1 - decay],
    )


def decay_mask(params: optax.Params) -> optax.Params:
    """Mask of the parameters with weight decay: all but scales of norms and selection biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not {"scale", "selection_bias"} & set(names_of(path)), params
    )


def balance_selection[Params](
    params: Params, load: Float[Array, "*layers group expert"], rate: float
) -> Params:
    """The parameters, with each selection bias `rate` higher or lower: arXiv 2408.15664.

    The bias of an expert that more tokens than the mean of its group selected falls, that of one
    with fewer rises. Its gradient is zero; keep weight decay off it (`decay_mask`).

    Args:
      params: of one layer, or of layers stacked along a leading axis.
      load: the share of tokens that selected each expert, `AttentionAux.expert_load`.
      rate: in logits.
    """
    change = rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)

    return jax.tree_util.tree_map_with_path(
        lambda path, x: x + change if "selection_bias" in names_of(path) else x, params
    )


def tie_experts(part: optax.Schedule) -> optax.GradientTransformation:
    """Replaces a part of each query expert's update by the mean over its group.

    Where the part is 1, experts that are equal stay equal, and the model is a dense one with k
    heads in a group; where it is 0, each goes its own way.

    Args:
      part: of a step, from 0 to 1.
    """

    def init(params: optax.Params) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None):
        del params
        of_mean = part(state.count)

        def tie(path, update):
            if not _is_kernel_of("query", path):
                return update
            mean = jnp.mean(update, axis=-2, keepdims=True)  # [..., embed, group, expert, head_dim]
            return update + (of_mean * (mean - update)).astype(update.dtype)

        tied = jax.tree_util.tree_map_with_path(tie, updates)
        return tied, optax.ScaleByScheduleState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformation(init, update)


def _scale_router(
    transformation: optax.GradientTransformation, factor: float
) -> optax.GradientTransformation:
    """The same transformation, with the same state, and `factor` times the router's updates."""

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None):
        updates, state = transformation.update(updates, state, params)
        scaled = jax.tree_util.tree_map_with_path(
            lambda path, x: factor * x if _is_kernel_of("router", path) else x, updates
        )
        return scaled, state

    return optax.GradientTransformation(transformation.init, update)


def _is_kernel_of(name: str, path: tuple) -> bool:
    return names_of(path)[-2:] == [name, "kernel"]


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """ZClip, then AdamW or Muon, with the learning rates of a schedule over `steps` steps."""
    clip = zclip(
        alpha=config.zclip_alpha,
        threshold=config.zclip_threshold if config.zclip else float("inf"),
        warmup_steps=config.zclip_warmup_steps,
        cap=config.clip_cap,
    )
    scale = optax.scale_by_adam(
        config.beta1, config.beta2, config.epsilon, mu_dtype=config.first_moment_dtype
    )
    if config.name == "muon":
        scale = muon(scale, momentum_dtype=config.first_moment_dtype)
    if config.router_learning_rate_factor != 1.0:
        scale = _scale_router(scale, config.router_learning_rate_factor)
    tie = []
    if config.tied_fraction:
        length = config.tied_fraction * config.phases(steps)[-1]
        tie.append(tie_experts(optax.linear_schedule(1.0, 0.0, round(length))))
    return optax.chain(
        clip,
        scale,
        *tie,
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate_schedule(config, steps)),
    )


def gradient_norms(opt_state: optax.OptState) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The last step's global gradient norm, before and after clipping."""
    clip = cast(tuple[ZClipState, ...], opt_state)[0]
    return clip.norm, clip.clipped_norm
