"""The training objective: cross-entropy in chunks of the sequence, z-loss, router losses."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gqe_jax.attention import AttentionAux
from gqe_jax.config import OptimizerConfig


def chunked_cross_entropy(
    hidden: Float[Array, "batch length embed"],
    table: Float[Array, "vocab embed"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    *,
    chunk: int = 512,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed cross-entropy and summed squared logsumexp, in nats, each token times its weight.

    Logits exist for `chunk` positions of the sequence at a time; the backward pass computes them
    again, so [batch, length, vocab] never exists.

    Args:
      hidden: final hidden states; logits are their products with the table's rows, accumulated in
        float32.
      table: `Transformer.logit_table`.
      targets: the token that each position predicts.
      weights: 0 leaves a position out.
      chunk: positions in a chunk.
    """
    batch, length, _ = hidden.shape
    chunk = min(chunk, length)
    padding = -length % chunk
    table = table.astype(hidden.dtype)

    def chunks(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one_chunk(sums, inputs):
        hidden, targets, weights = inputs
        logits = jnp.einsum("bte,ve->btv", hidden, table, preferred_element_type=jnp.float32)
        logsumexp = jax.nn.logsumexp(logits, axis=-1)
        at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nats = jnp.sum(weights * (logsumexp - at_target))
        squares = jnp.sum(weights * jnp.square(logsumexp))
        return (sums[0] + nats, sums[1] + squares), None

    start = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    inputs = (chunks(hidden), chunks(targets), chunks(weights.astype(jnp.float32)))
    return jax.lax.scan(one_chunk, start, inputs)[0]


def router_loss(aux: AttentionAux, config: OptimizerConfig) -> Float[Array, ""]:
    """The weighted sum over layers of the router's auxiliary losses (paper.md, Losses)."""
    balancing = config.load_balancing_weight * jnp.sum(aux.load_balancing_loss)
    return balancing + config.router_z_loss_weight * jnp.sum(aux.router_z_loss)
