"""AdamW, the schedule and ZClip against plain Python from their papers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gqe_jax import ModelConfig, Transformer
from gqe_jax.config import AttentionConfig, OptimizerConfig
from gqe_jax.training.optimizer import (
    decay_mask,
    gradient_norms,
    learning_rate_schedule,
    make_optimizer,
    zclip,
)


def zclip_in_python(norms, alpha=0.97, threshold=2.5, warmup=25, cap=1.0):
    """ZClip by arXiv 2504.02507, in plain Python: the clipped norms, in order."""
    collected, passed, mean, variance = [], [], None, None
    for norm in norms:
        if len(collected) < warmup:
            collected.append(norm)
            passed.append(min(norm, cap))
            if len(collected) == warmup:
                mean, variance = np.mean(collected), np.var(collected)
            continue
        std = np.sqrt(variance)
        z = (norm - mean) / (std + 1e-6)
        target = mean + threshold * std / (z / threshold) if z > threshold else norm
        passed.append(min(target, cap))
        mean = alpha * mean + (1 - alpha) * target
        variance = alpha * variance + (1 - alpha) * (target - mean) ** 2
    return passed


@pytest.mark.parametrize("scale", [0.5, 5.0], ids=["below the cap", "above the cap"])
def test_zclip_follows_its_paper(scale):
    rng = np.random.default_rng(0)
    norms = scale * (1 + 0.1 * rng.standard_normal(80))
    norms[[30, 31, 55]] *= [8.0, 3.0, 20.0]
    expected = zclip_in_python(norms)
    clip = zclip()
    update = jax.jit(clip.update)
    state = clip.init(None)
    for norm, passed in zip(norms, expected, strict=True):
        gradient = {"a": jnp.array([0.6 * norm, 0.0]), "b": jnp.array([[0.8 * norm]])}
        clipped, state = update(gradient, state)
        assert float(optax.tree.norm(clipped)) == pytest.approx(passed, rel=2e-4)
        assert float(state.norm) == pytest.approx(norm, rel=1e-5)
        assert float(state.clipped_norm) == pytest.approx(passed, rel=2e-4)
        np.testing.assert_allclose(clipped["a"][0] / clipped["b"][0, 0], 0.75, rtol=1e-5)


def test_a_spike_hardly_moves_the_running_mean():
    clip = zclip(warmup_steps=4)
    state = clip.init(None)
    for norm in (0.4, 0.5, 0.6, 0.5, 100.0):
        _, state = clip.update({"a": jnp.array([norm])}, state)
    assert float(state.mean) < 0.52


def test_schedule_warms_up_stays_and_decays_to_the_floor_at_the_last_step():
    config = OptimizerConfig(peak_learning_rate=5e-4, final_learning_rate=1e-5)
    schedule = learning_rate_schedule(config, 100)
    rates = [float(schedule(step)) for step in range(100)]
    assert rates[0] == 0.0
    assert rates[5] == pytest.approx(2.5e-4)
    np.testing.assert_allclose(rates[10:80], 5e-4, rtol=1e-6)
    assert rates[79] == pytest.approx(5e-4)
    np.testing.assert_allclose(np.diff(rates[79:]), (1e-5 - 5e-4) / 20, rtol=1e-3)
    assert rates[99] == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, ["peak"]),
        (2, ["peak", "floor"]),
        (3, [0.0, "peak", "floor"]),
        (4, [0.0, "peak", "peak", "floor"]),
        (5, [0.0, "peak", "peak", "peak", "floor"]),
        (10, [0.0, *["peak"] * 7, "half", "floor"]),
    ],
)
def test_a_short_schedule_has_its_warmup_peak_and_floor(steps, expected):
    config = OptimizerConfig(peak_learning_rate=3e-3, final_learning_rate=1e-3)
    rates = {"peak": 3e-3, "half": 2e-3, "floor": 1e-3}
    schedule = learning_rate_schedule(config, steps)
    found = [float(schedule(step)) for step in range(steps)]
    assert found == pytest.approx([rates.get(name, name) for name in expected])


@pytest.mark.parametrize("steps", range(3, 11))
def test_every_schedule_from_three_steps_on_has_all_phases(steps):
    config = OptimizerConfig(peak_learning_rate=3e-3, final_learning_rate=1e-3)
    rates = [float(learning_rate_schedule(config, steps)(step)) for step in range(steps)]
    assert rates[0] == 0.0
    assert max(rates) == pytest.approx(3e-3)
    assert rates[-1] == pytest.approx(1e-3)


def test_the_schedule_has_a_length_of_its_own():
    config = OptimizerConfig(schedule_steps=20)
    alone, longer = (
        learning_rate_schedule(OptimizerConfig(), 20),
        learning_rate_schedule(config, 100),
    )
    assert [float(longer(step)) for step in range(20)] == [float(alone(step)) for step in range(20)]
    np.testing.assert_allclose([longer(step) for step in range(20, 100)], 1e-5, rtol=1e-5)


def test_adamw_follows_its_formula():
    config = OptimizerConfig(zclip=False, clip_cap=1e9, warmup_fraction=0.0, decay_fraction=0.0)
    optimizer = make_optimizer(config, 10)
    params = {"kernel": jnp.array([1.0, -2.0]), "scale": jnp.array([3.0])}
    state = optimizer.init(params)
    rng = np.random.default_rng(0)
    expected = {name: np.asarray(p, np.float64) for name, p in params.items()}
    first = {name: np.zeros_like(p) for name, p in expected.items()}
    second = {name: np.zeros_like(p) for name, p in expected.items()}
    for step in range(1, 6):
        grads = {name: rng.standard_normal(p.shape) for name, p in expected.items()}
        updates, state = optimizer.update(jax.tree.map(jnp.float32, grads), state, params)
        params = optax.apply_updates(params, updates)
        for name, g in grads.items():
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            adam = first[name] / (1 - 0.9**step)
            adam = adam / (np.sqrt(second[name] / (1 - 0.95**step)) + 1e-7)
            decay = 0.1 * expected[name] if name == "kernel" else 0.0
            expected[name] = expected[name] - 5e-4 * (adam + decay)
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-5, err_msg=name)
    assert float(gradient_norms(state)[0]) == pytest.approx(
        np.sqrt(sum(np.sum(g**2) for g in grads.values())), rel=1e-5
    )


def test_a_first_moment_in_bfloat16_changes_updates_by_its_rounding():
    """Against float64; the sum of a few roundings to 8 bits."""
    config = OptimizerConfig(
        zclip=False, clip_cap=1e9, warmup_fraction=0.0, weight_decay=0.0, decay_fraction=0.0
    )
    config = dataclasses.replace(config, first_moment_dtype="bfloat16")
    optimizer = make_optimizer(config, 10)
    params = {"kernel": jnp.array([1.0, -2.0])}
    state = optimizer.init(params)
    rng, first, second = np.random.default_rng(0), np.zeros(2), np.zeros(2)
    for step in range(1, 6):
        g = rng.standard_normal(2)
        updates, state = optimizer.update({"kernel": jnp.float32(g)}, state, params)
        first, second = 0.9 * first + 0.1 * g, 0.95 * second + 0.05 * g**2
        adam = first / (1 - 0.9**step) / np.sqrt(second / (1 - 0.95**step))
        np.testing.assert_allclose(updates["kernel"], -5e-4 * adam, atol=5e-4 * 2**-6)
    dtypes = {x.dtype.name for x in jax.tree.leaves(state) if x.shape == (2,)}
    assert dtypes == {"bfloat16", "float32"}


def test_only_the_norms_and_the_bias_are_spared_the_decay():
    attention = AttentionConfig(
        embed_dim=16, num_query_experts=4, num_kv_heads=2, selection_bias=True
    )
    config = ModelConfig(attention=attention, num_layers=2, mlp_dim=16, vocab_size=16)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    mask = nnx.to_flat_state(decay_mask(nnx.state(model, nnx.Param)))
    spared = {"/".join(map(str, path)) for path, value in mask if not value.get_value()}
    bias = "layers/attention/selection_bias"
    norms = {"layers/attention_norm/scale", "layers/mlp_norm/scale", "final_norm/scale"}
    assert spared == {bias, *norms}


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 100])
def test_a_schedule_without_a_plateau_falls_from_the_peak_to_the_floor(kind, steps):
    config = OptimizerConfig(schedule=kind, peak_learning_rate=3e-3, final_learning_rate=1e-3)
    schedule = learning_rate_schedule(config, steps)
    warmup = min(max(steps // 10, 1), max(steps - 2, 0))
    for step in range(steps):
        done = max(step - warmup, 0) / max(steps - 1 - warmup, 1)
        left = 0.5 * (1 + np.cos(np.pi * done)) if kind == "cosine" else 1 - done
        expected = 3e-3 * step / warmup if step < warmup else 1e-3 + 2e-3 * left
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5, abs=1e-9), step


def newton_schulz_in_numpy(matrix):
    """Five steps of Newton-Schulz with Muon's coefficients, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def test_muon_makes_each_matrix_of_a_kernel_orthogonal():
    """Against NumPy: the first update, whose momentum with Nesterov is the gradient."""
    attention = AttentionConfig(embed_dim=16, num_query_experts=4, num_kv_heads=2, head_dim=6)
    config = ModelConfig(attention=attention, num_layers=2, mlp_dim=24, vocab_size=16)
    params = nnx.state(Transformer(config, rngs=nnx.Rngs(0)), nnx.Param)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.float32(rng.standard_normal(p.shape)), params)
    options = OptimizerConfig(
        name="muon", zclip=False, clip_cap=1e9, warmup_fraction=0.0, weight_decay=0.0
    )
    optimizer = make_optimizer(options, 10)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    grads = {"/".join(map(str, p)): np.float64(v[...]) for p, v in nnx.to_flat_state(grads)}
    updates = {"/".join(map(str, p)): np.float64(v[...]) for p, v in nnx.to_flat_state(updates)}
    matrices = {
        "attention/query": lambda x: np.moveaxis(x, 1, 3).reshape(8, 16, 6),
        "attention/key": lambda x: x.reshape(2, 16, 12),
        "attention/value": lambda x: x.reshape(2, 16, 12),
        "attention/out": lambda x: x.reshape(2, 24, 16),
        "attention/shared_query": lambda x: x,
        "mlp/gate": lambda x: x,
        "mlp/up": lambda x: x,
        "mlp/down": lambda x: x,
    }
    for name, split in matrices.items():
        path = f"layers/{name}/kernel"
        pairs = zip(split(grads.pop(path)), split(updates.pop(path)), strict=True)
        for gradient, update in pairs:
            expected = -5e-4 * 0.2 * max(gradient.shape) ** 0.5 * newton_schulz_in_numpy(gradient)
            np.testing.assert_allclose(update, expected, rtol=1e-3, atol=1e-7, err_msg=name)
    assert "layers/attention/router/kernel" in grads
    for name, gradient in grads.items():  # Adam's first update is the sign
        np.testing.assert_allclose(updates[name], -5e-4 * np.sign(gradient), rtol=1e-3)


def recipe_updates(steps=4, **fields):
    """The parameters at the start, and after each of some steps with random gradients."""
    attention = AttentionConfig(
        embed_dim=16, num_query_experts=4, num_kv_heads=2, expert_init_spread=0.0
    )
    config = ModelConfig(attention=attention, num_layers=2, mlp_dim=24, vocab_size=16)
    params = nnx.state(Transformer(config, rngs=nnx.Rngs(0)), nnx.Param)
    optimizer = make_optimizer(OptimizerConfig(warmup_fraction=0.0, weight_decay=0.0, **fields), 8)
    state, rng, seen = optimizer.init(params), np.random.default_rng(0), []
    for _ in range(steps):
        grads = jax.tree.map(lambda p: jnp.float32(rng.standard_normal(p.shape)), params)
        updates, state = optimizer.update(grads, state, params)
        seen.append({"/".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(updates)})
    return seen


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_tied_experts_move_together_and_then_apart(name):
    """Over half of 8 steps the part of the mean is 1, 3/4, 1/2, 1/4, and then 0."""
    plain, tied = (recipe_updates(6, name=name, tied_fraction=fraction) for fraction in (0.0, 0.5))
    for own, ours, part in zip(plain, tied, (1.0, 0.75, 0.5, 0.25, 0.0, 0.0), strict=True):
        for path, update in own.items():
            if path.endswith("query/kernel") and "shared" not in path:
                mean = np.mean(update, axis=-2, keepdims=True)
                update = part * mean + (1 - part) * update
            np.testing.assert_allclose(ours[path], update, rtol=1e-5, atol=1e-9, err_msg=path)


def test_the_router_has_its_own_learning_rate():
    for own, ours in zip(
        recipe_updates(), recipe_updates(router_learning_rate_factor=0.1), strict=True
    ):
        for path, update in own.items():
            factor = 0.1 if path.endswith("router/kernel") else 1.0
            np.testing.assert_allclose(ours[path], factor * update, rtol=1e-6, err_msg=path)
