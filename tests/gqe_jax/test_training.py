"""The train step: the same numbers on every mesh and with every accumulation."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from gqe_jax.compile_for import hlo
from gqe_jax.compile_for.collectives import collectives
from gqe_jax.config import (
    AttentionConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)
from gqe_jax.data import Batch
from gqe_jax.sharding import OnMesh, batch_sharding, global_batch, make_mesh
from gqe_jax.training.state import lay_out_state
from gqe_jax.training.steps import Teacher, gradients, make_steps

CONFIG = RunConfig(
    model=ModelConfig(
        attention=AttentionConfig(embed_dim=32, num_query_experts=8, num_kv_heads=4),
        num_layers=2,
        mlp_dim=64,
        vocab_size=64,
        dtype="float32",
    ),
    optimizer=OptimizerConfig(peak_learning_rate=3e-3, router_z_loss_weight=1e-3),
    steps=20,
    batch_size=16,
    sequence_length=24,
)


def make_batch(step: int, segments: bool = False) -> Batch:
    """A small grammar, so that there is something to learn; the last row is half padding."""
    rng = np.random.default_rng(step)
    tokens = np.cumsum(rng.integers(1, 4, (16, 25)), axis=1, dtype=np.int32) % 64
    weights = np.ones((16, 24), np.float32)
    weights[-1, 12:] = 0.0
    ids = np.where(weights > 0, 1 + (np.arange(24) >= 9), 0).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, ids if segments else None)


def losses(config: RunConfig, devices: int, segments: bool = False) -> list[float]:
    """The losses of 20 steps on the first `devices` devices."""
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    steps = make_steps(config, mesh)
    state, values = steps.layout.init(), []
    for step in range(config.steps):
        batch = global_batch(batch_sharding(mesh), 16, make_batch(step, segments))
        state, metrics = steps.train_step(state, batch)
        values.append(float(metrics["loss"]))
    assert int(state.step) == config.steps
    return values


def test_a_teacher_that_agrees_leaves_the_text_its_share():
    """Its divergence is 0, with gradient 0: what is left is 1 - distillation_weight of the text."""
    attention = dataclasses.replace(CONFIG.model.attention, variant="gqa")
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, attention=attention),
        optimizer=dataclasses.replace(CONFIG.optimizer, distillation_weight=0.75),
    )
    steps = make_steps(config, make_mesh(config.mesh, jax.devices()[:1]))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jax.numpy.float32(rng.normal(size=x.shape) / 6), steps.layout.abstract.params
    )

    def of(teacher):
        grads = jax.jit(
            lambda p: gradients(config, steps.layout.graphdef, p, make_batch(0), teacher)[0]
        )
        return grads(params)

    def compare(with_teacher, alone):
        scale = float(np.abs(alone).max())
        np.testing.assert_allclose(with_teacher, 0.25 * alone, atol=1e-4 * scale)

    jax.tree.map(compare, of(Teacher(steps.layout.graphdef, params)), of(None))


@pytest.fixture(scope="module")
def on_one_device():
    return losses(CONFIG, 1)


def test_the_model_learns(on_one_device):
    assert on_one_device[-1] < on_one_device[0] - 0.5


@pytest.mark.parametrize(
    ("devices", "mesh"),
    [
        (8, MeshConfig(data=1, fsdp=2, context=2, tensor=2)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else str(value.sizes),
)
def test_every_mesh_gives_the_same_losses(devices, mesh, on_one_device):
    values = losses(dataclasses.replace(CONFIG, mesh=mesh), devices)
    np.testing.assert_allclose(values, on_one_device, atol=1e-4)


def _shard_bytes(tree) -> int:
    """Bytes of the shards on one device."""
    shards = ((x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree))
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shards)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=4, fsdp=2)])
def test_optimizer_state_sharded_over_data_gives_the_same_losses(mesh, on_one_device):
    optimizer = dataclasses.replace(CONFIG.optimizer, shard_state_over_data=True)
    config = dataclasses.replace(CONFIG, mesh=mesh, optimizer=optimizer)
    np.testing.assert_allclose(losses(config, 8), on_one_device, atol=1e-4)

    abstract = make_steps(config, make_mesh(mesh)).layout.abstract
    assert _shard_bytes(abstract.opt_state) < 1.1 * 2 * _shard_bytes(abstract.params) / mesh.data


@pytest.mark.slow
def test_segments_on_a_mixed_mesh():
    mixed = dataclasses.replace(CONFIG, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(
        losses(mixed, 8, segments=True), losses(CONFIG, 1, segments=True), atol=1e-4
    )


@pytest.mark.slow
def test_accumulation_counts_every_token_alike(on_one_device):
    """Without the router's losses, which are per part, the parts add up to the whole."""
    optimizer = dataclasses.replace(
        CONFIG.optimizer, load_balancing_weight=0.0, router_z_loss_weight=0.0
    )
    whole = dataclasses.replace(CONFIG, optimizer=optimizer)
    parts = dataclasses.replace(whole, accumulation_steps=4, mesh=MeshConfig(data=2, fsdp=2))
    np.testing.assert_allclose(losses(parts, 4), losses(whole, 1), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("distils", [False, True])
def test_gradients_that_are_summed_once_over_data_are_those_of_one_device(distils):
    """With padding that only one replica has, and router losses that weigh much."""
    one = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, num_layers=1),
        optimizer=dataclasses.replace(
            CONFIG.optimizer, load_balancing_weight=1.0, router_z_loss_weight=0.1
        ),
        accumulation_steps=2,
    )

    def of(config, devices):
        mesh = make_mesh(config.mesh, jax.devices()[:devices])
        layout = lay_out_state(config, mesh)
        params = layout.init().params
        batch = global_batch(batch_sharding(mesh), 16, make_batch(0, segments=True))

        def function(params, batch):
            teacher = Teacher(layout.graphdef, params) if distils else None
            return gradients(config, layout.graphdef, params, batch, teacher)

        compiled = OnMesh(mesh, jax.jit(function)).lower(params, batch).compile()
        program = hlo.parse(compiled.as_text())
        sent = {c.times for c in collectives(program, mesh.shape, 1) if c.bytes > 1000}
        assert sent == ({1} if devices > 1 else set())
        return jax.device_get(compiled(params, batch))

    def compare(actual, expected):
        scale = float(np.abs(expected).max(initial=1e-3))
        np.testing.assert_allclose(actual, expected, atol=1e-5 * scale)

    jax.tree.map(compare, of(dataclasses.replace(one, mesh=MeshConfig(data=4)), 4), of(one, 1))


@pytest.mark.slow
def test_a_selection_bias_moves_against_the_load():
    """By its rate a step, whatever the optimizer does to all other parameters."""
    attention = dataclasses.replace(CONFIG.model.attention, selection_bias=True)
    optimizer = dataclasses.replace(
        CONFIG.optimizer, name="muon", load_balancing_weight=0.0, selection_bias_rate=0.125
    )
    model = dataclasses.replace(CONFIG.model, num_layers=1, attention=attention)
    config = dataclasses.replace(CONFIG, model=model, optimizer=optimizer)
    steps = make_steps(config, make_mesh(config.mesh, jax.devices()[:1]))
    state, expected = steps.layout.init(), np.zeros((1, 4, 2))
    for step in range(4):
        state, metrics = steps.train_step(state, make_batch(step))
        expected += 0.125 * np.sign(0.5 - np.asarray(metrics["expert_load"]))
    bias = dict(nnx.to_flat_state(state.params))["layers", "attention", "selection_bias"]
    np.testing.assert_array_equal(bias[...], expected)


def test_losses_and_gradient_equal_the_definition():
    """loss = cross-entropy + 0.01 · aux, from the logits of the whole batch."""
    steps = make_steps(CONFIG, make_mesh(CONFIG.mesh, jax.devices()[:1]))
    state = steps.layout.init()
    batch = make_batch(0)
    model = nnx.merge(steps.layout.graphdef, jax.device_get(state.params))
    hidden, aux, _ = model(batch.inputs)
    logits = np.asarray(model.logits(hidden), np.float64)
    nats = (
        np.log(np.exp(logits).sum(-1))
        - np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    )
    expected = np.sum(nats * batch.weights) / np.sum(batch.weights)
    balance = float(np.sum(aux.load_balancing_loss))

    _, metrics = steps.train_step(state, batch)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["aux_loss"]) == pytest.approx(balance, rel=1e-5)
    assert metrics["expert_load"].shape == (2, 4, 2)


def test_eval_step_sums_nats_and_tokens():
    steps = make_steps(CONFIG, make_mesh(CONFIG.mesh, jax.devices()[:1]))
    state = steps.layout.init()
    nats, tokens = steps.eval_step(state.params, make_batch(0))
    _, metrics = steps.train_step(state, make_batch(0))
    assert float(tokens) == 16 * 24 - 12
    assert float(nats / tokens) == pytest.approx(float(metrics["loss"]), rel=1e-5)
