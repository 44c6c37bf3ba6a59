"""Chunked cross-entropy against the whole, and the router's losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqe_jax.config import MeshConfig, OptimizerConfig
from gqe_jax.model.attention import AttentionAux
from gqe_jax.sharding import OnMesh, make_mesh
from gqe_jax.training.loss import (
    chunked_cross_entropy,
    chunked_divergence,
    chunked_scores,
    router_loss,
)


@pytest.mark.parametrize("chunk", [1, 3, 5, 11, 512])
def test_chunks_add_up_to_the_whole(chunk):
    rng = np.random.default_rng(0)
    hidden, table = rng.standard_normal((2, 11, 8)), rng.standard_normal((17, 8))
    targets = rng.integers(0, 17, (2, 11))
    weights = (rng.random((2, 11)) > 0.3).astype(np.float64)
    logits = hidden @ table.T
    logsumexp = np.log(np.exp(logits).sum(axis=-1))
    at_target = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]

    def sums(hidden, table):
        return chunked_cross_entropy(hidden, table, targets, jnp.asarray(weights), chunk=chunk)

    nats, squares = sums(jnp.float32(hidden), jnp.float32(table))
    assert float(nats) == pytest.approx(np.sum(weights * (logsumexp - at_target)), rel=1e-5)
    assert float(squares) == pytest.approx(np.sum(weights * logsumexp**2), rel=1e-5)

    probs = np.exp(logits - logsumexp[..., None])
    d_logits = weights[..., None] * (probs - np.eye(17)[targets])
    grads = jax.grad(lambda *a: sums(*a)[0], argnums=(0, 1))(
        jnp.float32(hidden), jnp.float32(table)
    )
    np.testing.assert_allclose(grads[0], d_logits @ table, atol=1e-4)
    np.testing.assert_allclose(grads[1], np.einsum("btv,bte->ve", d_logits, hidden), atol=1e-4)


@pytest.mark.parametrize("chunk", [3, 512])
def test_divergence_from_a_teacher_of_another_width(chunk):
    rng = np.random.default_rng(0)
    hidden, table = rng.standard_normal((2, 7, 8)), rng.standard_normal((17, 8))
    other_hidden, other_table = rng.standard_normal((2, 7, 4)), rng.standard_normal((17, 4))
    weights = (rng.random((2, 7)) > 0.3).astype(np.float64)

    def softmax(logits):
        return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)

    ours, theirs = softmax(hidden @ table.T), softmax(other_hidden @ other_table.T)
    expected = np.sum(weights * np.sum(theirs * np.log(theirs / ours), axis=-1))
    arrays = [jnp.float32(x) for x in (hidden, table, other_hidden, other_table, weights)]
    assert float(chunked_divergence(*arrays, chunk=chunk)) == pytest.approx(expected, rel=1e-5)

    grad = jax.grad(lambda h: chunked_divergence(h, *arrays[1:], chunk=chunk))(arrays[0])
    np.testing.assert_allclose(grad, weights[..., None] * (ours - theirs) @ table, atol=1e-4)


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
    grad = jax.jit(jax.grad(lambda *a: chunked_cross_entropy(*a)[0], argnums=(0, 1)))
    peak = grad.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert peak < batch * length * vocab * 4 / 2


def test_router_losses_are_summed_over_layers_with_their_weights():
    layers = jnp.array([1.0, 2.0, 4.0])
    aux = AttentionAux(layers, 10 * layers, jnp.zeros((3, 1, 2)), jnp.zeros((3, 1)))
    config = OptimizerConfig(load_balancing_weight=0.01, router_z_loss_weight=0.001)
    assert float(router_loss(aux, config)) == pytest.approx(0.07 + 0.07)
