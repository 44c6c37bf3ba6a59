"""The router's functions, against hand-worked values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqe_jax.model import routing

ALL = jnp.ones((1, 4))


def balancing_loss(probs, load, is_token):
    return routing.load_balancing_loss(routing.mean_probabilities(probs, is_token), load)


def test_softmax_is_inside_each_group():
    logits = jnp.array([[[[0.0, jnp.log(3.0)], [5.0, 5.0]]]])
    np.testing.assert_allclose(
        routing.router_probabilities(logits)[0, 0], [[0.25, 0.75], [0.5, 0.5]], rtol=1e-6
    )


def test_softmax_is_float32_of_bfloat16_logits():
    probs = routing.router_probabilities(jnp.ones((1, 1, 1, 3), jnp.bfloat16))
    assert probs.dtype == jnp.float32
    np.testing.assert_allclose(probs, 1 / 3, rtol=1e-6)


def test_selection_is_by_rank_and_ties_go_to_the_lower_index():
    probs = jnp.array([[[[0.1, 0.4, 0.1, 0.4], [0.25, 0.25, 0.25, 0.25]]]])
    index = routing.select_top_k(jnp.log(probs), 3)
    selected = routing.probabilities_of(probs, index)
    np.testing.assert_array_equal(index[0, 0], [[1, 3, 0], [0, 1, 2]])
    np.testing.assert_allclose(selected[0, 0], [[0.4, 0.4, 0.1], [0.25, 0.25, 0.25]])


def test_slot_weights_have_one_sum_over_all_groups_and_ranks():
    weights = routing.slot_weights(jnp.array([[[[0.5, 0.3], [0.9, 0.1]]]]))
    np.testing.assert_allclose(weights[0, 0], np.array([[0.5, 0.3], [0.9, 0.1]]) / 1.8, rtol=1e-6)
    assert np.isfinite(routing.slot_weights(jnp.zeros((1, 1, 2, 1)))).all()


def test_uniform_top_1_routing_gives_a_balancing_loss_of_1():
    probs = jnp.full((1, 4, 3, 2), 0.5)
    index = jnp.tile(jnp.array([0, 1, 0, 1])[None, :, None, None], (1, 1, 3, 1))
    load = routing.expert_load(index, 2, ALL)
    np.testing.assert_allclose(load, 0.5)
    assert float(balancing_loss(probs, load, ALL)) == pytest.approx(1.0)


def test_balancing_loss_of_a_collapsed_router():
    probs = jnp.tile(jnp.array([0.8, 0.2]), (1, 4, 1, 1))
    load = routing.expert_load(jnp.zeros((1, 4, 1, 1), jnp.int32), 2, ALL)
    assert float(balancing_loss(probs, load, ALL)) == pytest.approx(2 * 0.8)


def test_load_of_two_experts_a_token_sums_to_2():
    index = jnp.array([[[[0, 1]], [[0, 2]], [[1, 2]], [[0, 1]]]])
    load = routing.expert_load(index, 3, ALL)
    np.testing.assert_allclose(load, [[0.75, 0.75, 0.5]])


def test_padding_is_left_out():
    is_token = jnp.array([[1.0, 1.0, 0.0, 0.0]])
    index = jnp.array([0, 1, 1, 1])[None, :, None, None]
    probs = jnp.array([[0.5, 0.5], [0.3, 0.7], [0, 1], [0, 1]])[None, :, None]
    load = routing.expert_load(index, 2, is_token)
    np.testing.assert_allclose(load, [[0.5, 0.5]])
    loss = balancing_loss(probs, load, is_token)
    assert float(loss) == pytest.approx(2 * (0.5 * 0.4 + 0.5 * 0.6))


def test_the_gradient_of_the_balancing_loss_flows_through_the_probabilities_alone():
    load = jnp.array([[0.75, 0.25]])
    grad = jax.grad(balancing_loss)(jnp.full((1, 4, 1, 2), 0.5), load, ALL)
    np.testing.assert_allclose(grad[0, :, 0], np.tile([2 * 0.75 / 4, 2 * 0.25 / 4], (4, 1)))


def test_z_loss_and_entropy():
    logits = jnp.tile(jnp.log(jnp.array([1.0, 3.0])), (1, 4, 2, 1))
    expected = np.log(4.0) ** 2
    assert float(routing.router_z_loss(logits, ALL)) == pytest.approx(expected, rel=1e-6)
    entropy = routing.router_entropy(routing.router_probabilities(logits), ALL)
    np.testing.assert_allclose(entropy, -0.25 * np.log(0.25) - 0.75 * np.log(0.75), rtol=1e-6)
    certain = jnp.tile(jnp.array([1.0, 0.0]), (1, 4, 1, 1))
    np.testing.assert_array_equal(routing.router_entropy(certain, ALL), 0.0)
