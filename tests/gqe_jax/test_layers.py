"""Rotary embedding, SwiGLU and RMSNorm against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gqe_jax.model import layers
from tests import oracle


def test_rope_equals_the_oracle_at_any_position():
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 8))
    positions = np.array([[0, 1, 2, 3, 4], [7, 9, 1000, 3, 131071]])
    turned = layers.apply_rope(jnp.float32(x), jnp.asarray(positions), 10000.0)
    for b in range(2):
        for h in range(3):
            expected = oracle.rotate(np, x[b, :, h], positions[b], 10000.0)
            # float32 holds an angle of 131,071 radians to about 0.008.
            np.testing.assert_allclose(turned[b, :4, h], expected[:4], atol=2e-4)
            np.testing.assert_allclose(turned[b, 4, h], expected[4], atol=3e-2)


def test_rope_scores_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(at, distance):
        turn = lambda x, p: layers.apply_rope(x, jnp.array([[p]]), 10000.0)  # noqa: E731
        return jnp.sum(turn(q, at + distance) * turn(k, at))

    np.testing.assert_allclose(score(3, 5), score(40, 5), rtol=1e-4)


def test_swiglu():
    mlp = layers.SwiGLU(4, 6, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((1, 3, 4))
    gate, up, down = (
        np.asarray(getattr(mlp, name).kernel[...], np.float64) for name in ("gate", "up", "down")
    )
    hidden = x @ gate
    expected = (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down
    np.testing.assert_allclose(mlp(jnp.float32(x)), expected, atol=1e-5)


def test_rms_norm():
    norm = layers.rms_norm(4, epsilon=1e-6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = np.array([[1.0, 2.0, 3.0, 4.0]])
    assert norm.scale.dtype == jnp.float32
    expected = x / np.sqrt(np.mean(x**2) + 1e-6)
    np.testing.assert_allclose(norm(jnp.float32(x)).astype(jnp.float32), expected, rtol=1e-2)


def test_initial_weights_have_variance_one_over_fan_in():
    kernel = layers.projection(1024, 2048, ("embed", "mlp"), rngs=nnx.Rngs(0)).kernel[...]
    np.testing.assert_allclose(jnp.std(kernel), 1024**-0.5, rtol=1e-2)
    assert float(jnp.abs(kernel).max()) < 2.4 * 1024**-0.5
