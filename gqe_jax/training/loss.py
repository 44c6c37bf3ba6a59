"""The training objective: cross-entropy and KL divergence in sequence chunks, and router losses.

On a mesh, `shard_map` gives each device its own rows, positions and shard of the vocabulary, so
that the table is gathered once and its gradient reduced once instead of for every chunk.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from gqe_jax.config import OptimizerConfig
from gqe_jax.model.attention import AttentionAux
from gqe_jax.sharding import partition_spec


@jax.named_scope("loss")
def chunked_cross_entropy(
    hidden: Float[Array, "batch length embed"],
    table: Float[Array, "vocab embed"],
    targets: Int[Array | np.ndarray, "batch length"],
    weights: Float[Array | np.ndarray, "batch length"],
    *,
    chunk: int = 512,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums over tokens of the cross-entropy, in nats, and of the squared logsumexp.

    Logits exist for `chunk` positions of a device's sequences at a time, and the backward pass
    recomputes them, so that [batch, length, vocab] is never stored.

    Args:
      hidden: final hidden states; logits are their products with the table's rows, accumulated in
        float32.
      table: `Transformer.logit_table`.
      targets: the token that each position predicts.
      weights: weight of each position, 0 to exclude it; without gradient.
      chunk: positions per chunk.
    """
    per_token = targets, weights.astype(jnp.float32)
    nats, squares = _sums_over_chunks(_cross_entropy, chunk, table, hidden, per_token, ())
    return nats, squares


@jax.named_scope("loss")
def chunked_divergence(
    hidden: Float[Array, "batch length embed"],
    table: Float[Array, "vocab embed"],
    teacher_hidden: Float[Array, "batch length teacher_embed"],
    teacher_table: Float[Array, "vocab teacher_embed"],
    weights: Float[Array | np.ndarray, "batch length"],
    *,
    chunk: int = 512,
) -> Float[Array, ""]:
    """Weighted sum over tokens of KL(teacher || student), in nats: the sum over the vocabulary of
    p_teacher · log(p_teacher / p). Arguments and memory as in `chunked_cross_entropy`; the teacher
    gets no gradient.
    """
    per_token = teacher_hidden, weights.astype(jnp.float32)
    fixed = (teacher_table.astype(teacher_hidden.dtype),)
    return _sums_over_chunks(_divergence, chunk, table, hidden, per_token, fixed)[0]


@jax.named_scope("loss")
def chunked_scores(
    hidden: Float[Array, "batch length embed"],
    table: Float[Array, "vocab embed"],
    targets: Int[Array | np.ndarray, "batch length"],
    weights: Num[Array | np.ndarray, "batch length"] | Bool[Array | np.ndarray, "batch length"],
    *,
    chunk: int = 256,
) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
    """Each row's weighted log-likelihood, and its weighted number of targets that are not the most
    probable token. Arguments and memory as in `chunked_cross_entropy`.
    """
    per_token = targets, weights.astype(jnp.float32)
    sums = _sums_over_chunks(_scores, chunk, table, hidden, per_token, (), by_row=True)
    log_likelihood, misses = sums
    return log_likelihood, misses


class _Axes(NamedTuple):
    """Mesh axes over which the table's two axes are sharded."""

    vocab: str | tuple[str, ...] | None
    embed: str | tuple[str, ...] | None


def _cross_entropy(axes: _Axes, hidden, table, targets, weights):
    logits = _logits(hidden, table)
    logsumexp = _logsumexp(logits, axes)
    nats = jnp.sum(weights * (logsumexp - _at_target(logits, targets, axes)))
    return nats, jnp.sum(weights * jnp.square(logsumexp))


def _scores(axes: _Axes, hidden, table, targets, weights):
    logits = _logits(hidden, table)
    log_likelihood = _at_target(logits, targets, axes) - _logsumexp(logits, axes)
    is_other = _most_probable(logits, axes) != targets
    return tuple(jnp.sum(weights * x, axis=1) for x in (log_likelihood, is_other))


def _divergence(axes: _Axes, hidden, table, teacher_hidden, weights, teacher_table):
    ours, theirs = _logits(hidden, table), _logits(teacher_hidden, teacher_table)
    ours -= _logsumexp(ours, axes)[..., None]
    theirs -= _logsumexp(theirs, axes)[..., None]
    nats = _psum_vocab(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1), axes)
    return (jnp.sum(weights * nats),)


def _at_target(logits: Array, targets: Array, axes: _Axes) -> Array:
    first = _first_token(logits, axes)
    own = (targets >= first) & (targets < first + logits.shape[-1])
    index = jnp.where(own, targets - first, 0)[..., None]
    at_target = jnp.where(own, jnp.take_along_axis(logits, index, axis=-1)[..., 0], 0.0)
    return _psum_vocab(at_target, axes)


def _most_probable(logits: Array, axes: _Axes) -> Array:
    """The token with the largest logit; the first one if several tie."""
    token = jnp.argmax(logits, axis=-1) + _first_token(logits, axes)
    if not axes.vocab:
        return token
    largest = jnp.max(logits, axis=-1)
    is_largest = largest == jax.lax.pmax(largest, axes.vocab)
    return jax.lax.pmin(jnp.where(is_largest, token, jnp.iinfo(token.dtype).max), axes.vocab)


def _first_token(logits: Array, axes: _Axes) -> Array | int:
    """The token id of the first logit in a device's shard of the vocabulary."""
    return jax.lax.axis_index(axes.vocab) * logits.shape[-1] if axes.vocab else 0


def _logits(hidden: Array, table: Array) -> Array:
    return jnp.einsum("bte,ve->btv", hidden, table, preferred_element_type=jnp.float32)


def _psum_vocab(x: Array, axes: _Axes) -> Array:
    return jax.lax.psum(x, axes.vocab) if axes.vocab else x


def _logsumexp(logits: Float[Array, "batch length vocab"], axes: _Axes) -> Array:
    if not axes.vocab:
        return jax.nn.logsumexp(logits, axis=-1)
    largest = jnp.max(jax.lax.stop_gradient(logits), axis=-1)
    largest = jax.lax.pmax(largest, axes.vocab)
    total = _psum_vocab(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1), axes)
    return largest + jnp.log(total)


def _sums_over_chunks(
    one_chunk: Callable[..., tuple[Array, ...]],
    chunk: int,
    table: Array,
    hidden: Array,
    per_token: tuple[Array | np.ndarray, ...],
    fixed: tuple[Array, ...],
    *,
    by_row: bool = False,
) -> tuple[Array, ...]:
    """Sums `one_chunk(axes, hidden, table, *per_token, *fixed)` over chunks of `chunk` positions;
    only `table` and `hidden` have gradients.

    Args:
      per_token: further arrays [batch, length, ...] to be cut into chunks.
      fixed: further tables [vocab, ...].
      by_row: `one_chunk` returns a sum for each row of the batch, not one of all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _local_sums(one_chunk, chunk, _Axes(None, None), table, hidden, per_token, fixed)

    def rows(x):
        axes = ("batch", "sequence", *(None,) * (x.ndim - 2))
        return partition_spec(axes, x.shape, mesh)

    table_spec = partition_spec(("vocab", "embed"), table.shape, mesh)
    axes = _Axes(*table_spec)
    batch, sequence, _ = rows(hidden)
    summed = tuple(jax.tree.leaves(sequence if by_row else (batch, sequence)))

    def local(table, hidden, per_token, fixed):
        sums = _local_sums(one_chunk, chunk, axes, table, hidden, per_token, fixed)
        return jax.lax.psum(sums, summed) if summed else sums

    vocab_rows = partition_spec(("vocab", None), table.shape, mesh)
    in_specs = table_spec, rows(hidden), tuple(map(rows, per_token)), (vocab_rows,) * len(fixed)
    return jax.shard_map(
        local,
        in_specs=in_specs,
        out_specs=jax.sharding.PartitionSpec(batch) if by_row else jax.sharding.PartitionSpec(),
        check_vma=False,
    )(table, hidden, per_token, fixed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _local_sums(one_chunk, chunk, axes, table, hidden, per_token, fixed):
    table = _gathered(table, hidden.dtype, axes)
    inputs = _chunks((hidden, *per_token), chunk)

    def part(hidden, *per_token):
        return one_chunk(axes, hidden, table, *per_token, *fixed)

    first = jax.eval_shape(part, *(x[0] for x in inputs))
    start = tuple(jnp.zeros(x.shape, x.dtype) for x in first)
    sums, _ = jax.lax.scan(
        lambda sums, x: (jax.tree.map(jnp.add, sums, part(*x)), None), start, inputs
    )
    return sums


def _local_sums_forward(one_chunk, chunk, axes, *arrays):
    return _local_sums(one_chunk, chunk, axes, *arrays), arrays


def _local_sums_backward(one_chunk, chunk, axes, arrays, d_sums):
    """Sums the table's gradient over chunks and devices in float32."""
    shard, hidden, per_token, fixed = arrays
    table = _gathered(shard, hidden.dtype, axes)

    def part(d_table, x):
        own_hidden, *own_per_token = x
        _, pullback = jax.vjp(
            lambda hidden, table: one_chunk(axes, hidden, table, *own_per_token, *fixed),
            own_hidden,
            table,
        )
        d_hidden, d_part = pullback(d_sums)
        return d_table + d_part.astype(jnp.float32), d_hidden

    d_table, d_hidden = jax.lax.scan(
        part, jnp.zeros(table.shape, jnp.float32), _chunks((hidden, *per_token), chunk)
    )
    if axes.embed:
        d_table = jax.lax.psum_scatter(d_table, axes.embed, scatter_dimension=1, tiled=True)
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])
    return d_table.astype(shard.dtype), d_hidden[:, : hidden.shape[1]], None, None


_local_sums.defvjp(_local_sums_forward, _local_sums_backward)


def _gathered(table: Array, dtype: Any, axes: _Axes) -> Array:
    table = table.astype(dtype)
    return jax.lax.all_gather(table, axes.embed, axis=1, tiled=True) if axes.embed else table


def _chunks(arrays: tuple[Array | np.ndarray, ...], chunk: int) -> tuple[Array, ...]:
    """Reshapes [batch, length, ...] to [chunks, batch, chunk, ...], padded with zeros."""
    batch, length = arrays[0].shape[:2]
    chunk = min(chunk, length)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    return tuple(cut(x) for x in arrays)


def router_loss(aux: AttentionAux, config: OptimizerConfig) -> Float[Array, ""]:
    """The weighted sum over layers of the load-balancing loss and the router's z-loss."""
    balancing = config.load_balancing_weight * jnp.sum(aux.load_balancing_loss)
    return balancing + config.router_z_loss_weight * jnp.sum(aux.router_z_loss)
