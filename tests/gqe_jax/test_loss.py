"""The chunked losses against those of the whole batch, and the router's losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqe_jax.config import MeshConfig, OptimizerConfig
from gqe_jax.model.attention import AttentionAux
from gqe_jax.sharding import OnMesh, make_mesh
from gqe_jax.training.loss import TeacherOutput, chunked_loss, chunked_scores, router_loss


def _softmax(logits):
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("mesh", "chunk", "teacher_weight"),
    [
        (None, 5, None),
        (None, 512, 0.25),
        (MeshConfig(data=2, context=2, tensor=2), 3, 0.25),
        (MeshConfig(fsdp=2, tensor=4), 3, None),
    ],
)
def test_losses_and_gradients_are_those_of_the_whole_batch(mesh, chunk, teacher_weight):
    """Against float64 NumPy, scaled by a cotangent; a teacher of another width."""
    rng = np.random.default_rng(0)
    hidden, table = rng.standard_normal((4, 12, 8)), rng.standard_normal((16, 8))
    other_hidden, other_table = rng.standard_normal((4, 12, 4)), rng.standard_normal((16, 4))
    targets = rng.integers(0, 16, (4, 12))
    weights = rng.random((4, 12)) * (rng.random((4, 12)) > 0.3)
    share, z = teacher_weight or 0.0, 0.1

    logits = hidden @ table.T
    ours, theirs = _softmax(logits), _softmax(other_hidden @ other_table.T)
    logsumexp = np.log(np.exp(logits).sum(axis=-1))
    nats = logsumexp - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    divergence = np.sum(theirs * np.log(theirs / ours), axis=-1)
    objective = (1 - share) * nats + share * divergence + z * logsumexp**2
    d_logits = (1 - share) * (ours - np.eye(16)[targets]) + share * (ours - theirs)
    d_logits = weights[..., None] * (d_logits + 2 * z * logsumexp[..., None] * ours)

    def losses(hidden, table):
        teacher = None
        if teacher_weight is not None:
            teacher = TeacherOutput(
                jnp.float32(other_hidden), jnp.float32(other_table), teacher_weight
            )
        each = jnp.float32(weights)
        found = chunked_loss(
            hidden, table, targets, each, z_loss_weight=z, teacher=teacher, chunk=chunk
        )
        return 3 * found[0], found  # the cotangent

    def on_mesh(function):
        return jax.jit(function) if mesh is None else OnMesh(make_mesh(mesh), jax.jit(function))

    arrays = jnp.float32(hidden), jnp.float32(table)
    expected = np.sum(weights * objective), np.sum(weights * nats)
    _, without_gradient = on_mesh(losses)(*arrays)
    np.testing.assert_allclose(without_gradient, expected, rtol=1e-5)
    gradients = jax.value_and_grad(losses, argnums=(0, 1), has_aux=True)
    (_, found), (d_hidden, d_table) = on_mesh(gradients)(*arrays)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(d_hidden, 3 * d_logits @ table, atol=2e-4)
    np.testing.assert_allclose(d_table, 3 * np.einsum("btv,bte->ve", d_logits, hidden), atol=2e-4)


def test_bfloat16_gradients_are_within_its_rounding():
    """Against float64 NumPy: up to three roundings of each number that is summed."""
    rng = np.random.default_rng(1)
    hidden, table = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((2, 64, 32), (256, 32))
    )
    targets, weights = rng.integers(0, 256, (2, 64)), np.full((2, 64), 1 / 128)
    exact = [np.asarray(x, np.float64) for x in (hidden, table)]
    d_logits = (_softmax(exact[0] @ exact[1].T) - np.eye(256)[targets]) / 128
    expected = d_logits @ exact[1], np.einsum("btv,bte->ve", d_logits, exact[0])
    loss = lambda *arrays: chunked_loss(*arrays, targets, weights, chunk=16)[0]  # noqa: E731
    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, table)
    for ours, theirs in zip(found, expected, strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float64) - theirs)
        assert error < 3 * 2**-9 * np.linalg.norm(theirs)


@pytest.mark.parametrize("gradient", [False, True])
def test_the_logits_are_computed_once(gradient):
    """One product for the losses, and two more for their gradients."""
    arrays = jnp.ones((2, 8, 4)), jnp.ones((16, 4)), np.ones((2, 8), int), jnp.ones((2, 8))
    loss = lambda hidden, table: chunked_loss(hidden, table, *arrays[2:], chunk=4)[0]  # noqa: E731
    function = jax.grad(loss, argnums=(0, 1)) if gradient else loss
    program = jax.jit(function).lower(*arrays[:2]).as_text()
    assert program.count("dot_general") == (3 if gradient else 1)


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, context=2, tensor=2)])
def test_scores_of_each_row(mesh):
    """Targets that are the most probable, some of them tied with a later token, and others."""
    rng = np.random.default_rng(0)
    hidden, table = rng.standard_normal((2, 12, 8)), rng.standard_normal((16, 8))
    table[13] = table[2]
    logits = hidden @ table.T
    targets = np.where(rng.random((2, 12)) > 0.5, logits.argmax(-1), rng.integers(0, 16, (2, 12)))
    weights = (rng.random((2, 12)) > 0.3).astype(np.float64)
    at_target = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = at_target - np.log(np.exp(logits).sum(axis=-1))
    arrays = jnp.float32(hidden), jnp.float32(table), targets, jnp.float32(weights)
    score = jax.jit(functools.partial(chunked_scores, chunk=5))
    sums, misses = (score if mesh is None else OnMesh(make_mesh(mesh), score))(*arrays)
    np.testing.assert_allclose(sums, np.sum(weights * nats, axis=1), rtol=1e-5)
    np.testing.assert_allclose(misses, np.sum(weights * (logits.argmax(-1) != targets), axis=1))
    assert (misses > 0).all()


def test_the_logits_of_the_whole_batch_never_exist():
    batch, length, embed, vocab = 4, 4096, 64, 32000
    shapes = [
        jax.ShapeDtypeStruct((batch, length, embed), jnp.bfloat16),
        jax.ShapeDtypeStruct((vocab, embed), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), jnp.float32),
    ]
    grad = jax.jit(jax.grad(lambda *a: chunked_loss(*a)[0], argnums=(0, 1)))
    peak = grad.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert peak < batch * length * vocab * 4 / 2


def test_router_losses_are_summed_over_layers_with_their_weights():
    layers = jnp.array([1.0, 2.0, 4.0])
    of_experts = jnp.zeros((3, 1, 2))
    aux = AttentionAux(layers, 10 * layers, of_experts, jnp.zeros((3, 1)), of_experts)
    config = OptimizerConfig(load_balancing_weight=0.01, router_z_loss_weight=0.001)
    assert float(router_loss(aux, config)) == pytest.approx(0.07 + 0.07)
