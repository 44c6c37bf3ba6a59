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
from gqe_jax.sharding import free_axes, partition_spec


class TeacherOutput(NamedTuple):
    """What a teacher predicts, which gets no gradient.

    Attributes:
      hidden: its final hidden states.
      table: its `Transformer.logit_table`.
      weight: share of the divergence from it in the objective.
    """

    hidden: Float[Array, "batch length teacher_embed"]
    table: Float[Array, "vocab teacher_embed"]
    weight: float


@jax.named_scope("loss")
def chunked_loss(
    hidden: Float[Array, "batch length embed"],
    table: Float[Array, "vocab embed"],
    targets: Int[Array | np.ndarray, "batch length"],
    weights: Float[Array | np.ndarray, "batch length"],
    *,
    z_loss_weight: float = 0.0,
    teacher: TeacherOutput | None = None,
    chunk: int = 512,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums over tokens of the objective, and of the cross-entropy in nats.

    The objective of a token is its cross-entropy plus `z_loss_weight` times its squared logsumexp.
    With a teacher, KL(teacher || student) = Σ p_teacher · log(p_teacher / p) over the vocabulary
    replaces `teacher.weight` of the cross-entropy. Only the objective has a gradient, with respect
    to `hidden` and `table`.

    Logits exist for `chunk` positions of a device's sequences at a time, so that
    [batch, length, vocab] is never stored. Where a gradient is asked for, the forward pass computes
    it chunk by chunk, and the backward pass scales it by the objective's cotangent, a scalar: the
    logits are computed once.

    Args:
      hidden: final hidden states; logits are their products with the table's rows, accumulated in
        float32.
      table: `Transformer.logit_table`.
      targets: the token that each position predicts.
      weights: weight of each position, 0 to exclude it. For a mean, weights that sum to 1: then the
        cotangent is 1, and the gradient is rounded once.
      z_loss_weight: weight of the squared logsumexp.
      teacher: None: no distillation.
      chunk: positions per chunk.
    """
    per_token, fixed, teacher_weight = (targets, weights.astype(jnp.float32)), (), 0.0
    if teacher is not None:
        per_token = *per_token, teacher.hidden
        fixed = (teacher.table.astype(teacher.hidden.dtype),)
        teacher_weight = teacher.weight
    one_chunk = functools.partial(_losses, z_loss_weight, teacher_weight)
    objective, nats = _sums_over_chunks(
        functools.partial(_local_losses, one_chunk, chunk), table, hidden, per_token, fixed
    )
    return objective, nats


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
    probable token, without gradient. Arguments and memory as in `chunked_loss`.
    """
    per_token = targets, weights.astype(jnp.float32)
    local = functools.partial(_local_sums, _scores, chunk)
    log_likelihood, misses = _sums_over_chunks(local, table, hidden, per_token, (), by_row=True)
    return log_likelihood, misses


class _Axes(NamedTuple):
    """Mesh axes over which the table's two axes are sharded."""

    vocab: str | tuple[str, ...] | None
    embed: str | tuple[str, ...] | None


def _losses(
    z_loss_weight: float,
    teacher_weight: float,
    axes: _Axes,
    hidden: Array,
    table: Array,
    targets: Array,
    weights: Array,
    *teacher: Array,
) -> tuple[Array, Array]:
    """The objective and the cross-entropy of a chunk; `teacher` is its hidden states and table."""
    logits = _logits(hidden, table)
    logsumexp = _logsumexp(logits, axes)
    nats = logsumexp - _at_target(logits, targets, axes)
    objective = (1 - teacher_weight) * nats + z_loss_weight * jnp.square(logsumexp)
    if teacher:
        theirs = _logits(*teacher)
        theirs -= _logsumexp(theirs, axes)[..., None]
        ours = logits - logsumexp[..., None]
        divergence = _psum_vocab(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1), axes)
        objective += teacher_weight * divergence
    return jnp.sum(weights * objective), jnp.sum(weights * nats)


def _scores(axes: _Axes, hidden, table, targets, weights):
    logits = _logits(hidden, table)
    log_likelihood = _at_target(logits, targets, axes) - _logsumexp(logits, axes)
    is_other = _most_probable(logits, axes) != targets
    return tuple(jnp.sum(weights * x, axis=1) for x in (log_likelihood, is_other))


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
    local_sums: Callable[..., tuple[Array, ...]],
    table: Array,
    hidden: Array,
    per_token: tuple[Array | np.ndarray, ...],
    fixed: tuple[Array, ...],
    *,
    by_row: bool = False,
) -> tuple[Array, ...]:
    """Sums over all devices of `local_sums(axes, table, hidden, per_token, fixed)` of their shards.

    Args:
      per_token: further arrays [batch, length, ...].
      fixed: further tables [vocab, ...].
      by_row: the sums are of each row of the batch, not of all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not free_axes(mesh):
        return local_sums(_Axes(None, None), table, hidden, per_token, fixed)

    def rows(x):
        axes = ("batch", "sequence", *(None,) * (x.ndim - 2))
        return partition_spec(axes, x.shape, mesh)

    table_spec = partition_spec(("vocab", "embed"), table.shape, mesh)
    axes = _Axes(*table_spec)
    batch, sequence, _ = rows(hidden)
    summed = tuple(jax.tree.leaves(sequence if by_row else (batch, sequence)))

    def local(table, hidden, per_token, fixed):
        sums = local_sums(axes, table, hidden, per_token, fixed)
        return jax.lax.psum(sums, summed) if summed else sums

    vocab_rows = partition_spec(("vocab", None), table.shape, mesh)
    in_specs = table_spec, rows(hidden), tuple(map(rows, per_token)), (vocab_rows,) * len(fixed)
    return jax.shard_map(
        local,
        in_specs=in_specs,
        out_specs=jax.sharding.PartitionSpec(batch) if by_row else jax.sharding.PartitionSpec(),
        check_vma=False,
    )(table, hidden, per_token, fixed)


def _local_sums(one_chunk, chunk, axes, table, hidden, per_token, fixed):
    """Sums `one_chunk(axes, hidden, table, *per_token, *fixed)` over chunks of positions."""
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


_local_losses = jax.custom_vjp(_local_sums, nondiff_argnums=(0, 1, 2))


def _local_losses_forward(one_chunk, chunk, axes, shard, hidden, per_token, fixed):
    """The sums, and the first one's gradients; the table's is summed over chunks in float32."""
    table = _gathered(shard, hidden.dtype, axes)

    def part(carry, x):
        sums, d_table = carry
        hidden, *per_token = x
        (objective, nats), (d_hidden, d_part) = jax.value_and_grad(
            lambda hidden, table: one_chunk(axes, hidden, table, *per_token, *fixed),
            argnums=(0, 1),
            has_aux=True,
        )(hidden, table)
        sums = jax.tree.map(jnp.add, sums, (objective, nats))
        return (sums, d_table + d_part.astype(jnp.float32)), d_hidden

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero), jnp.zeros(table.shape, jnp.float32)
    (sums, d_table), d_hidden = jax.lax.scan(part, start, _chunks((hidden, *per_token), chunk))
    if axes.embed:
        d_table = jax.lax.psum_scatter(d_table, axes.embed, scatter_dimension=1, tiled=True)
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])
    return sums, (d_table.astype(shard.dtype), d_hidden[:, : hidden.shape[1]])


def _local_losses_backward(one_chunk, chunk, axes, gradients, d_sums):
    """Scales the gradients of the first sum; the second one has none."""
    d_table, d_hidden = ((d_sums[0] * x.astype(jnp.float32)).astype(x.dtype) for x in gradients)
    return d_table, d_hidden, None, None


_local_losses.defvjp(_local_losses_forward, _local_losses_backward)


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
