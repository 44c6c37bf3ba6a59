"""The train and eval steps: pure functions of state and batch, jitted with their shardings."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from gqe_jax.config import RunConfig
from gqe_jax.data.batch import Batch
from gqe_jax.model import routing
from gqe_jax.model.attention import AttentionAux
from gqe_jax.sharding import OnMesh, batch_sharding, constrain, free_axes, shardings
from gqe_jax.training import loss as losses
from gqe_jax.training import spikes
from gqe_jax.training.average import update_average
from gqe_jax.training.compiler_options import compiler_options
from gqe_jax.training.optimizer import (
    balance_selection,
    gradient_norms,
    learning_rate_schedule,
    make_optimizer,
)
from gqe_jax.training.state import StateLayout, TrainState, lay_out_state
from gqe_kernels import Implementation


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained model that a run distils."""

    graphdef: nnx.GraphDef
    params: nnx.State


@dataclasses.dataclass(frozen=True)
class Steps:
    """The compiled steps of a run, and the layout of the state that they take."""

    layout: StateLayout
    train_step: OnMesh
    """(state, batch) -> (the next state, metrics); the state is donated."""
    eval_step: OnMesh
    """(params, batch) -> (summed nats, number of tokens)."""
    lay_out: OnMesh
    """average -> the same in the layout of the parameters."""

    @property
    def mesh(self) -> Mesh:
        return self.layout.mesh

    def weights(self, state: TrainState) -> nnx.State:
        """The parameters to evaluate: their average, where the state has one."""
        return state.params if state.average is None else self.lay_out(state.average)


def forward_loss(
    config: RunConfig,
    graphdef: nnx.GraphDef,
    params: nnx.State,
    batch: Batch,
    token_count: Float[Array, ""],
    teacher: Teacher | None = None,
    replicas: str | None = None,
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], AttentionAux]]:
    """Returns the loss, and with it (cross-entropy, aux).

    The loss is the summed cross-entropy over `token_count`, plus the z-loss and the router's
    losses. With a teacher, the divergence from it replaces `distillation_weight` of the
    cross-entropy.

    Args:
      replicas: a manual axis of the mesh, over whose replicas the batch is sharded. The loss and
        the cross-entropy are then a replica's share, and the sums over replicas are theirs; the aux
        is that of all tokens.
    """
    model = nnx.merge(graphdef, params)
    hidden, aux, _ = model(batch.inputs, segment_ids=batch.segment_ids)
    objective, cross_entropy = losses.chunked_loss(
        hidden,
        model.logit_table,
        batch.targets,
        batch.weights / token_count,
        z_loss_weight=config.optimizer.z_loss_weight,
        teacher=None if teacher is None else _output(teacher, batch, config),
    )
    if replicas is None:
        return objective + losses.router_loss(aux, config.optimizer), (cross_entropy, aux)
    aux = _of_all_tokens(aux, batch, replicas)
    share = losses.router_loss(aux, config.optimizer) / jax.lax.axis_size(replicas)
    return objective + share, (cross_entropy, aux)


def _of_all_tokens(aux: AttentionAux, batch: Batch, replicas: str) -> AttentionAux:
    """The router's statistics of all replicas, each of which has those of its own tokens."""
    is_token = jnp.ones(batch.inputs.shape) if batch.segment_ids is None else batch.segment_ids != 0
    tokens = jnp.sum(is_token, dtype=jnp.float32)
    share = tokens / jnp.maximum(jax.lax.psum(tokens, replicas), 1.0)
    means = jax.lax.psum(jax.tree.map(lambda mean: share * mean, aux), replicas)
    balancing = routing.load_balancing_loss(means.mean_probs, means.expert_load)
    return dataclasses.replace(means, load_balancing_loss=balancing)


def _output(teacher: Teacher, batch: Batch, config: RunConfig) -> losses.TeacherOutput:
    model = nnx.merge(teacher.graphdef, teacher.params)
    hidden, _, _ = model(batch.inputs, segment_ids=batch.segment_ids)
    weight = config.optimizer.distillation_weight
    return losses.TeacherOutput(hidden, model.logit_table, weight)


def gradients(
    config: RunConfig,
    graphdef: nnx.GraphDef,
    params: nnx.State,
    batch: Batch,
    teacher: Teacher | None = None,
) -> tuple[nnx.State, Float[Array, ""], AttentionAux]:
    """Returns the gradients of the loss over the batch, the cross-entropy, and the mean aux.

    With accumulation every token has the same weight in the cross-entropy. The router's statistics
    are computed over each part of the batch, on all devices, and their losses averaged over parts.
    On a mesh of the data axis alone the gradients are summed over it once, after those of the parts
    were added up; on others, for each part. (With `data` manual beside `fsdp`, XLA partitions the
    products of `gqe_7b` so that its step takes four times as long.)
    """
    token_count = jnp.maximum(jnp.sum(batch.weights), 1.0)
    if config.accumulation_steps == 1:
        (_, (cross_entropy, aux)), grads = jax.value_and_grad(
            functools.partial(forward_loss, config, graphdef, teacher=teacher), has_aux=True
        )(params, batch, token_count)
        return grads, cross_entropy, aux
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(free_axes(mesh)) != {"data"}:
        return _accumulated(config, graphdef, None, params, batch, token_count, teacher)

    def of_replica(params, batch, token_count, teacher_params):
        guide = None if teacher is None else dataclasses.replace(teacher, params=teacher_params)
        grads, cross_entropy, aux = _accumulated(
            config, graphdef, "data", params, batch, token_count, guide
        )
        return *jax.lax.psum((grads, cross_entropy), "data"), aux

    whole = PartitionSpec()
    return jax.shard_map(
        of_replica,
        in_specs=(whole, PartitionSpec("data"), whole, whole),
        out_specs=whole,
        check_vma=False,  # a Pallas call does not say over which axes its outputs vary
    )(params, batch, token_count, None if teacher is None else teacher.params)


def _accumulated(
    config: RunConfig,
    graphdef: nnx.GraphDef,
    replicas: str | None,
    params: nnx.State,
    batch: Batch,
    token_count: Float[Array, ""],
    teacher: Teacher | None,
) -> tuple[nnx.State, Float[Array, ""], AttentionAux]:
    """What `gradients` returns, from one part of the batch after the other; `replicas` as in
    `forward_loss`, of whose replicas each has its own sums of gradients and cross-entropy."""
    parts = config.accumulation_steps
    value_and_grad = jax.value_and_grad(
        functools.partial(forward_loss, config, graphdef, teacher=teacher, replicas=replicas),
        has_aux=True,
    )

    def split(x):
        # Part i takes row i and every parts-th after it, so that it has rows of every device.
        x = jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
        return constrain(x, None, "batch", "sequence")

    def add_part(sums, part):
        (_, extra), grads = value_and_grad(params, part, token_count / parts)
        return jax.tree.map(jnp.add, sums, (grads, *extra)), None

    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(
            lambda: (lambda out: (out[1], *out[0][1]))(value_and_grad(params, batch, token_count))
        ),
    )
    sums, _ = jax.lax.scan(add_part, zeros, jax.tree.map(split, batch))
    return jax.tree.map(lambda x: x / parts, sums)


def abstract_batch(config: RunConfig, mesh: Mesh) -> Batch:
    """Returns shapes, types and shardings of the step's batch."""
    rows = config.batch_size, config.sequence_length
    tokens, weights = (np.broadcast_to(dtype(0), rows) for dtype in (np.int32, np.float32))
    segments = tokens if config.data.document_masking else None
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)),
        Batch(tokens, tokens, weights, segments),
    )


def make_steps(
    config: RunConfig,
    mesh: Mesh,
    *,
    implementation: Implementation | None = None,
    teacher: Teacher | None = None,
) -> Steps:
    """Returns the jitted functions that train and evaluate `config` on `mesh`.

    Args:
      config: the run; its sizes must divide over the mesh (`sharding.check_divides`).
      mesh: from `sharding.make_mesh`.
      implementation: the attention kernel; None: each call takes the best for its platform.
      teacher: the model that the train step distils, its parameters on `mesh`; None: none.
    """
    layout = lay_out_state(config, mesh, implementation=implementation)
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = learning_rate_schedule(config.optimizer, config.steps)

    def train_step(
        state: TrainState, batch: Batch, teacher_params: nnx.State | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        guide = None
        if teacher is not None and teacher_params is not None:
            guide = dataclasses.replace(teacher, params=teacher_params)
        grads, cross_entropy, aux = gradients(config, layout.graphdef, state.params, batch, guide)
        with jax.named_scope("optimizer"):
            if config.optimizer.shard_state_over_data:
                spread = shardings(layout.abstract.params, mesh, over_data=True)
                grads = jax.lax.with_sharding_constraint(grads, spread)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)
            if config.model.attention.selection_bias:
                rate = config.optimizer.selection_bias_rate
                params = balance_selection(params, aux.expert_load, rate)
            average = state.average
            if average is not None and config.optimizer.average_decay is not None:
                average = update_average(
                    average, params, state.step, config.optimizer.average_decay
                )
        norm, clipped_norm = gradient_norms(opt_state)
        metrics = {
            "loss": cross_entropy,
            "aux_loss": jnp.sum(aux.load_balancing_loss),
            "learning_rate": schedule(state.step),
            "grad_norm": norm,
            "clipped_grad_norm": clipped_norm,
        }
        if config.model.attention.variant != "gqa":
            metrics["expert_load"] = aux.expert_load
            metrics["router_entropy"] = aux.router_entropy
        watched, threshold = state.spikes, config.optimizer.skip_spikes
        if watched is not None and threshold is not None:
            spike, watched = spikes.watch(
                watched,
                cross_entropy,
                norm,
                threshold=threshold,
                warmup_steps=config.optimizer.zclip_warmup_steps,
            )
            params, average = spikes.keep_if(
                spike, (state.params, state.average), (params, average)
            )
            opt_state = spikes.keep_optimizer_if(spike, state.opt_state, opt_state)
            metrics["skipped_in_a_row"] = watched.in_a_row
        return TrainState(state.step + 1, params, opt_state, average, watched), metrics

    def eval_step(params: nnx.State, batch: Batch) -> tuple[Array, Array]:
        model = nnx.merge(layout.graphdef, params)
        hidden, _, _ = model(batch.inputs, segment_ids=batch.segment_ids)
        _, nats = losses.chunked_loss(hidden, model.logit_table, batch.targets, batch.weights)
        return nats, jnp.sum(batch.weights)

    state, rows = layout.sharding, batch_sharding(mesh)
    options = compiler_options(config.libtpu_flags, mesh)
    replicated = shardings(jnp.zeros(()), mesh)
    # The teacher's parameters are an argument of the compiled step, not constants in it.
    extra = () if teacher is None else (teacher.params,)
    return Steps(
        layout=layout,
        train_step=OnMesh(
            mesh,
            jax.jit(
                train_step,
                in_shardings=(state, rows, *(shardings(params, mesh) for params in extra)),
                out_shardings=(state, replicated),
                donate_argnums=0,
                compiler_options=options,
            ),
            extra,
        ),
        eval_step=OnMesh(
            mesh,
            jax.jit(
                eval_step,
                in_shardings=(state.params, rows),
                out_shardings=replicated,
                compiler_options=options,
            ),
        ),
        lay_out=OnMesh(mesh, jax.jit(lambda average: average, out_shardings=state.params)),
    )
