"""The state of a run and its layout over a mesh."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from gqe_jax.config import ModelConfig, RunConfig
from gqe_jax.model.transformer import Transformer
from gqe_jax.sharding import OnMesh, shardings
from gqe_jax.training import spikes
from gqe_jax.training.optimizer import make_optimizer
from gqe_jax.training.spikes import SpikeState
from gqe_kernels import Implementation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds: the state after `step` optimizer steps."""

    step: Int[Array, ""]
    params: nnx.State
    opt_state: optax.OptState
    average: nnx.State | None = None
    """The average of the parameters, with `optimizer.average_decay`."""
    spikes: SpikeState | None = None
    """The statistics of the loss, with `optimizer.skip_spikes`."""


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """Where a run's state lies on a mesh, and how it begins."""

    mesh: Mesh
    graphdef: nnx.GraphDef
    """The model without its parameters."""
    abstract: TrainState
    """Shapes, types and shardings of the arrays."""
    init: Callable[[], TrainState]
    """Creates the state of step 0, with parameters drawn from the run's seed."""
    begin: Callable[[nnx.State], TrainState]
    """Creates the state of step 0 with these parameters, which are donated."""
    complete: Callable[[TrainState], TrainState]
    """Adds to a restored state what the configuration asks for and its checkpoint lacks: an average
    that begins with the parameters, and empty statistics. The state is donated."""

    @property
    def sharding(self) -> TrainState:
        """The sharding of each array."""
        return jax.tree.map(lambda x: x.sharding, self.abstract)


def lay_out_params(
    config: ModelConfig, mesh: Mesh, *, implementation: Implementation | None = None
) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns the model without its parameters, and their shapes, types and shardings.

    Args:
      config: the model.
      mesh: from `sharding.make_mesh`.
      implementation: the attention kernel; None: each call takes the best for its platform.
    """
    model = nnx.eval_shape(
        lambda: Transformer(config, implementation=implementation, rngs=nnx.Rngs(0))
    )
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, _with_shardings(params, mesh)


def lay_out_state(
    config: RunConfig, mesh: Mesh, *, implementation: Implementation | None = None
) -> StateLayout:
    """Lays out the state of a run over a mesh; the arguments are those of `make_steps`."""
    optimizer = make_optimizer(config.optimizer, config.steps)

    def begin(params: nnx.State) -> TrainState:
        return complete(TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params)))

    def complete(state: TrainState) -> TrainState:
        average, watched = state.average, state.spikes
        if config.optimizer.average_decay is not None and average is None:
            average = jax.tree.map(jnp.copy, state.params)
        if config.optimizer.skip_spikes is not None and watched is None:
            watched = spikes.begin()
        return dataclasses.replace(state, average=average, spikes=watched)

    def init() -> TrainState:
        model = Transformer(config.model, rngs=nnx.Rngs(params=config.seed))
        return begin(nnx.state(model, nnx.Param))

    graphdef, _ = lay_out_params(config.model, mesh, implementation=implementation)
    shapes = jax.eval_shape(init)
    over_data = config.optimizer.shard_state_over_data
    abstract = dataclasses.replace(
        _with_shardings(shapes, mesh),
        opt_state=_with_shardings(shapes.opt_state, mesh, over_data=over_data),
        average=_with_shardings(shapes.average, mesh, over_data=over_data),
    )
    layout = jax.tree.map(lambda x: x.sharding, abstract)
    return StateLayout(
        mesh=mesh,
        graphdef=graphdef,
        abstract=abstract,
        init=OnMesh(mesh, jax.jit(init, out_shardings=layout)),
        begin=OnMesh(
            mesh,
            jax.jit(begin, in_shardings=(layout.params,), out_shardings=layout, donate_argnums=0),
        ),
        complete=OnMesh(mesh, jax.jit(complete, out_shardings=layout, donate_argnums=0)),
    )


def _with_shardings[Tree](abstract: Tree, mesh: Mesh, *, over_data: bool = False) -> Tree:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings(abstract, mesh, over_data=over_data),
    )
