"""The router of Grouped Query Experts and its losses: pure functions, float32.

The equations are those of `gqe_jax/model/attention.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.named_scope("routing")
def router_probabilities(
    logits: Float[Array, "batch length group expert"],
) -> Float[Array, "batch length group expert"]:
    """Softmax inside each group, before selection, in float32 (3)."""
    return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


@jax.named_scope("routing")
def select_top_k(
    logits: Float[Array, "batch length group expert"], top_k: int
) -> Int[Array, "batch length group k"]:
    """The k most probable experts of each group, by rank (3); ties go to the lower index."""
    return jax.lax.top_k(jax.lax.stop_gradient(logits), top_k)[1]


@jax.named_scope("routing")
def probabilities_of(
    probs: Float[Array, "batch length group expert"], index: Int[Array, "batch length group k"]
) -> Float[Array, "batch length group k"]:
    """The probabilities of the selected experts (3); by a mask, so that no gather is needed."""
    chosen = index[..., None] == jnp.arange(probs.shape[-1])
    return jnp.sum(jnp.where(chosen, probs[..., None, :], 0.0), axis=-1)


@jax.named_scope("routing")
def straight_through(
    selected: Float[Array, "batch length group k"],
) -> Float[Array, "batch length group k"]:
    """One, with the gradient of the logarithm of `selected`: what multiplies a hard slot."""
    return selected / jnp.maximum(jax.lax.stop_gradient(selected), 1e-9)


@jax.named_scope("routing")
def slot_weights(
    selected: Float[Array, "batch length group k"],
) -> Float[Array, "batch length group k"]:
    """Weights of the weighted slot: one normalisation over all groups and ranks (5)."""
    total = jnp.sum(selected, axis=(-2, -1), keepdims=True)
    return selected / jnp.maximum(total, 1e-9)


@jax.named_scope("routing")
def _token_mean(x: Float[Array, "batch length *rest"], is_token: Float[Array, "batch length"]):
    """Mean over the tokens of the global batch, padding excluded."""
    count = jnp.maximum(jnp.sum(is_token), 1.0)
    weight = is_token.reshape(*is_token.shape, *(1,) * (x.ndim - 2))
    return jnp.sum(x * weight, axis=(0, 1)) / count


@jax.named_scope("routing")
def expert_load(
    expert_index: Int[Array, "batch length group k"],
    experts_per_group: int,
    is_token: Float[Array, "batch length"],
) -> Float[Array, "group expert"]:
    """The share of tokens that selected each expert; it sums to k in a group."""
    selected = jax.nn.one_hot(expert_index, experts_per_group, dtype=jnp.float32).sum(axis=-2)
    return _token_mean(selected, is_token)


@jax.named_scope("routing")
def mean_probabilities(
    probs: Float[Array, "batch length group expert"], is_token: Float[Array, "batch length"]
) -> Float[Array, "group expert"]:
    """The mean probability of each expert; it sums to 1 in a group."""
    return _token_mean(probs, is_token)


@jax.named_scope("routing")
def load_balancing_loss(
    mean_probs: Float[Array, "*layers group expert"], load: Float[Array, "*layers group expert"]
) -> Float[Array, "*layers"]:
    """Switch's loss, M · sum over m of f[m] · P[m], mean over groups: the authors' published code.

    f[m] is `load`, P[m] is `mean_probs`, both of the tokens of the global batch. Uniform top-1
    routing gives 1. The gradient flows through `mean_probs` alone.
    """
    of_groups = jnp.sum(jax.lax.stop_gradient(load) * mean_probs, axis=-1)
    return load.shape[-1] * jnp.mean(of_groups, axis=-1)


@jax.named_scope("routing")
def router_z_loss(
    logits: Float[Array, "batch length group expert"], is_token: Float[Array, "batch length"]
) -> Float[Array, ""]:
    """Mean over tokens and groups of logsumexp²; ours, off by default."""
    squared = jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1))
    return jnp.mean(_token_mean(squared, is_token))


@jax.named_scope("routing")
def router_entropy(
    probs: Float[Array, "batch length group expert"], is_token: Float[Array, "batch length"]
) -> Float[Array, "group"]:
    """Mean entropy of the tokens' routing distributions, in nats; log M is undecided."""
    return _token_mean(-jnp.sum(jax.scipy.special.xlogy(probs, probs), axis=-1), is_token)
