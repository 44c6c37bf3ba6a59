"""The training objective: cross-entropy and divergence in chunks of the sequence, router losses."""

from collections.abc import Callable

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
    table = table.astype(hidden.dtype)

    def one_chunk(hidden, targets, weights):
        logits = _logits(hidden, table)
        logsumexp = jax.nn.logsumexp(logits, axis=-1)
        at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nats = jnp.sum(weights * (logsumexp - at_target))
        return nats, jnp.sum(weights * jnp.square(logsumexp))

    return _sums_over_chunks(one_chunk, (hidden, targets, weights.astype(jnp.float32)), chunk)


def chunked_divergence(
    hidden: Float[Array, "batch length embed"],
    table: Float[Array, "vocab embed"],
    teacher_hidden: Float[Array, "batch length teacher_embed"],
    teacher_table: Float[Array, "vocab teacher_embed"],
    weights: Float[Array, "batch length"],
    *,
    chunk: int = 512,
) -> Float[Array, ""]:
    """Summed KL divergence of our predictions from the teacher's, in nats, each token times its
    weight: the sum over the vocabulary of p_teacher · log(p_teacher / p). Arguments and memory as
    in `chunked_cross_entropy`.
    """
    table, teacher_table = table.astype(hidden.dtype), teacher_table.astype(teacher_hidden.dtype)

    def one_chunk(hidden, teacher_hidden, weights):
        ours = jax.nn.log_softmax(_logits(hidden, table))
        theirs = jax.nn.log_softmax(_logits(teacher_hidden, teacher_table))
        return (jnp.sum(weights * jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)),)

    inputs = (hidden, teacher_hidden, weights.astype(jnp.float32))
    return _sums_over_chunks(one_chunk, inputs, chunk)[0]


def _logits(hidden: Array, table: Array) -> Array:
    return jnp.einsum("bte,ve->btv", hidden, table, preferred_element_type=jnp.float32)


def _sums_over_chunks(
    one_chunk: Callable[..., tuple[Array, ...]], inputs: tuple[Array, ...], chunk: int
) -> tuple[Array, ...]:
    """Sums of what `one_chunk` makes of `chunk` positions at a time; the last are padded with 0."""
    batch, length = inputs[0].shape[:2]
    chunk = min(chunk, length)
    padding = -length % chunk

    def chunks(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    inputs = tuple(chunks(x) for x in inputs)
    first = jax.eval_shape(one_chunk, *(x[0] for x in inputs))
    start = tuple(jnp.zeros(x.shape, x.dtype) for x in first)
    step = jax.checkpoint(one_chunk)
    sums, _ = jax.lax.scan(
        lambda sums, x: (jax.tree.map(jnp.add, sums, step(*x)), None), start, inputs
    )
    return sums


def router_loss(aux: AttentionAux, config: OptimizerConfig) -> Float[Array, ""]:
    """The weighted sum over layers of the router's auxiliary losses (paper.md, Losses)."""
    balancing = config.load_balancing_weight * jnp.sum(aux.load_balancing_loss)
    return balancing + config.router_z_loss_weight * jnp.sum(aux.router_z_loss)
