"""The train and eval steps: pure functions of state and batch, jitted with their shardings."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from gqe_jax.config import RunConfig
from gqe_jax.model.attention import AttentionAux
from gqe_jax.model.transformer import Transformer
from gqe_jax.sharding import batch_sharding, constrain, on_mesh, shardings
from gqe_jax.training import loss as losses
from gqe_jax.training.optimizer import gradient_norms, make_optimizer, warmup_stable_decay


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds: `step` optimizer steps are done."""

    step: Int[Array, ""]
    params: nnx.State
    opt_state: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Windows of the token stream."""

    inputs: Int[Array, "batch length"]
    targets: Int[Array, "batch length"]
    weights: Float[Array, "batch length"]
    """1 for a target that counts, 0 for padding."""
    segment_ids: Int[Array, "batch length"] | None = None


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained model whose predictions a run learns."""

    graphdef: nnx.GraphDef
    params: nnx.State


@dataclasses.dataclass(frozen=True)
class Steps:
    """The compiled functions of a run, and the layout of what they take."""

    mesh: Mesh
    graphdef: nnx.GraphDef
    abstract_state: TrainState
    state_sharding: TrainState
    init: Callable[[], TrainState]
    begin: Callable[[nnx.State], TrainState]
    """The state of step 0 with these parameters, which are donated."""
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]
    eval_step: Callable[[nnx.State, Batch], tuple[Float[Array, ""], Float[Array, ""]]]


def forward_loss(
    config: RunConfig,
    graphdef: nnx.GraphDef,
    params: nnx.State,
    batch: Batch,
    token_count: Float[Array, ""],
    teacher: Teacher | None = None,
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], AttentionAux]]:
    """Cross-entropy over `token_count` plus the router's losses; (cross-entropy, aux) beside it.

    With a teacher, `distillation_weight` of the cross-entropy gives way to the divergence from it.
    """
    model = nnx.merge(graphdef, params)
    hidden, aux, _ = model(batch.inputs, segment_ids=batch.segment_ids)
    nats, squares = losses.chunked_cross_entropy(
        hidden, model.logit_table, batch.targets, batch.weights
    )
    cross_entropy = nats / token_count
    z_loss = config.optimizer.z_loss_weight * squares / token_count
    objective = cross_entropy
    if teacher is not None:
        nats = _divergence(model, hidden, teacher, batch)
        weight = config.optimizer.distillation_weight
        objective = (1 - weight) * cross_entropy + weight * nats / token_count
    total = objective + z_loss + losses.router_loss(aux, config.optimizer)
    return total, (cross_entropy, aux)


def _divergence(
    model: Transformer, hidden: Array, teacher: Teacher, batch: Batch
) -> Float[Array, ""]:
    other = nnx.merge(teacher.graphdef, teacher.params)
    other_hidden, _, _ = other(batch.inputs, segment_ids=batch.segment_ids)
    return losses.chunked_divergence(
        hidden, model.logit_table, other_hidden, other.logit_table, batch.weights
    )


def gradients(
    config: RunConfig,
    graphdef: nnx.GraphDef,
    params: nnx.State,
    batch: Batch,
    teacher: Teacher | None = None,
) -> tuple[nnx.State, Float[Array, ""], AttentionAux]:
    """Gradients of the loss over the whole batch, cross-entropy, and the mean aux of its parts.

    With accumulation, every token counts alike wherever it stands; the router's statistics are
    those of each part of the batch, over all devices, and their losses the mean over the parts.
    """
    parts = config.accumulation_steps
    value_and_grad = jax.value_and_grad(
        functools.partial(forward_loss, config, graphdef, teacher=teacher), has_aux=True
    )
    token_count = jnp.maximum(jnp.sum(batch.weights), 1.0)
    if parts == 1:
        (_, (cross_entropy, aux)), grads = value_and_grad(params, batch, token_count)
        return grads, cross_entropy, aux

    def split(x):
        # Rows are dealt out in turn, so that each part spreads over all devices as the batch does.
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


def make_steps(
    config: RunConfig,
    mesh: Mesh,
    *,
    implementation: str | None = None,
    teacher: Teacher | None = None,
) -> Steps:
    """The functions that train and evaluate `config` on `mesh`.

    Args:
      config: the run; its sizes must divide over the mesh (`sharding.check_divides`).
      mesh: from `sharding.make_mesh`.
      implementation: of the attention kernel; None: the best for the platform.
      teacher: what the train step distils, its parameters on `mesh`; None: nothing.
    """
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = warmup_stable_decay(config.optimizer, config.steps)

    def create() -> Transformer:
        rngs = nnx.Rngs(params=config.seed)
        return Transformer(config.model, implementation=implementation, rngs=rngs)

    graphdef, _ = nnx.split(nnx.eval_shape(create), nnx.Param)

    def begin(params: nnx.State) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    def init() -> TrainState:
        return begin(nnx.state(create(), nnx.Param))

    def train_step(
        state: TrainState, batch: Batch, teacher_params: nnx.State | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        guide = teacher and dataclasses.replace(teacher, params=teacher_params)
        grads, cross_entropy, aux = gradients(config, graphdef, state.params, batch, guide)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
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
        return TrainState(state.step + 1, params, opt_state), metrics

    def eval_step(params: nnx.State, batch: Batch) -> tuple[Array, Array]:
        """Summed nats and the number of tokens."""
        model = nnx.merge(graphdef, params)
        hidden, _, _ = model(batch.inputs, segment_ids=batch.segment_ids)
        nats, _ = losses.chunked_cross_entropy(
            hidden, model.logit_table, batch.targets, batch.weights
        )
        return nats, jnp.sum(batch.weights)

    abstract = jax.eval_shape(init)
    layout = shardings(abstract, mesh)
    batch_layout = batch_sharding(mesh)
    replicated = shardings(jnp.zeros(()), mesh)
    # The teacher is an argument of the compiled step, not a constant in it.
    teacher_layout = () if teacher is None else (shardings(teacher.params, mesh),)
    compiled_step = jax.jit(
        train_step,
        in_shardings=(layout, batch_layout, *teacher_layout),
        out_shardings=(layout, replicated),
        donate_argnums=0,
    )

    def guided_step(state: TrainState, batch: Batch):
        return compiled_step(state, batch, teacher.params)

    return Steps(
        mesh=mesh,
        graphdef=graphdef,
        abstract_state=abstract,
        state_sharding=layout,
        init=on_mesh(mesh, jax.jit(init, out_shardings=layout)),
        begin=on_mesh(
            mesh,
            jax.jit(begin, in_shardings=(layout.params,), out_shardings=layout, donate_argnums=0),
        ),
        train_step=on_mesh(mesh, compiled_step if teacher is None else guided_step),
        eval_step=on_mesh(
            mesh,
            jax.jit(
                eval_step, in_shardings=(layout.params, batch_layout), out_shardings=replicated
            ),
        ),
    )
