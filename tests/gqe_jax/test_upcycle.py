"""A dense model becomes Grouped Query Experts: what it computes then, and that training goes on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqe_jax import AttentionConfig, ModelConfig, Transformer
from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.interop.layout import abstract_params
from gqe_jax.interop.upcycle import UpcycleConfig, convert, fit_out, upcycle
from gqe_jax.runs import SPREAD, Run, load_config, write_run
from gqe_jax.sharding import make_mesh
from gqe_jax.training.loop import train
from tests import oracle
from tests.gqe_jax.runs import make_corpus, saved_state, small_config

DENSE = ModelConfig(
    attention=AttentionConfig(
        "gqa", embed_dim=32, num_query_experts=6, num_kv_heads=2, head_dim=8, qk_norm=True
    ),
    num_layers=2,
    mlp_dim=48,
    vocab_size=40,
    dtype="float32",
    tied_embedding=False,
)
TOKENS = np.random.default_rng(1).integers(0, 40, (3, 4, 12))


def routed_config(top_k):
    attention = dataclasses.replace(DENSE.attention, variant="gqe", top_k=top_k)
    return dataclasses.replace(DENSE, attention=attention)


def dense_params(twins=False):
    """Random weights; `twins`: the heads of a group all agree."""
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: jnp.float32(rng.normal(size=x.shape) / 6), abstract_params(DENSE)
    )
    attention = params["layers"]["attention"]
    query, out = attention["query"]["kernel"], attention["out"]["kernel"]
    if twins:
        query[...] = np.broadcast_to(query[...][:, :, :, :1], query.shape)
        groups = out[...].reshape(2, 2, 3, 8, 32)
        out[...] = np.broadcast_to(groups[:, :, :1], groups.shape).reshape(out.shape)
    return params


@functools.cache
def forward(config):
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graphdef, _ = nnx.split(abstract, nnx.Param)

    @jax.jit
    def logits(params):
        model = nnx.merge(graphdef, params)
        return model.logits(model(TOKENS[0])[0])

    return logits


def logits(config, params):
    return forward(config)(params)


def test_groups_whose_heads_agree_lose_nothing():
    """Whatever the router picks; W_O has M/k times the mean, or is found by least squares."""
    params, config = dense_params(twins=True), routed_config(top_k=2)
    expected = logits(DENSE, params)
    assert float(np.abs(expected).max()) > 0.02
    scaled = convert(params, config, seed=0, scaled=True)
    np.testing.assert_allclose(logits(config, scaled), expected, atol=1e-4)
    plain = convert(params, config, seed=0, scaled=False)
    assert float(np.abs(logits(config, plain) - expected).max()) > 0.1
    fitted = fit_out(DENSE, params, config, plain, TOKENS, ridge=1e-7)
    np.testing.assert_allclose(logits(config, fitted), expected, atol=2e-3)


def test_least_squares_equals_the_oracles():
    """Layer 0: the normal equations of the float64 oracle's slots and outputs, and the pull."""
    params, config, ridge = dense_params(), routed_config(1), 1e-2
    start = convert(params, config, seed=0, scaled=True)
    fitted = fit_out(DENSE, params, config, start, TOKENS, ridge=ridge)

    def first_layer(state):
        attention = jax.tree.map(lambda x: np.asarray(x[0], np.float64), state["layers"])
        return {
            name: next(iter(value.values()))[...] for name, value in attention["attention"].items()
        }

    x = np.asarray(params["embedding"]["embedding"][...], np.float64)[TOKENS.reshape(12, 12)]
    x /= np.sqrt((x**2).mean(-1, keepdims=True) + DENSE.norm_epsilon)
    x *= np.asarray(params["layers"]["attention_norm"]["scale"][0], np.float64)
    target, _ = oracle.layer(np, DENSE.attention, first_layer(params), x, None)
    routed = first_layer(start)
    index = oracle.select(routed, x, 1)
    as_is = routed | {"out": np.eye(32).reshape(4, 8, 32)}
    slots, _ = oracle.layer(np, config.attention, as_is, x, index)
    slots, target = slots.reshape(-1, 32), target.reshape(-1, 32)
    pull = np.sqrt(ridge * np.mean(np.sum(slots**2, axis=0)))
    expected, *_ = np.linalg.lstsq(
        np.concatenate([slots, pull * np.eye(32)]),
        np.concatenate([target, pull * routed["out"].reshape(32, 32)]),
    )
    ours = first_layer(fitted)["out"].reshape(32, 32)
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(ours - routed["out"].reshape(32, 32)).max() > 0.02


def test_only_w_o_the_router_and_the_shared_head_are_new():
    params, config = dense_params(), routed_config(1)
    attention = dataclasses.replace(config.attention, selection_bias=True)
    config = dataclasses.replace(config, attention=attention)
    routed = dict(nnx.to_flat_state(convert(params, config, seed=0, scaled=True)))
    assert not np.any(routed["layers", "attention", "selection_bias"][...])
    given = dict(nnx.to_flat_state(params))
    new = {path[2] for path in routed.keys() - given.keys()}
    assert new == {"router", "selection_bias", "shared_query"}
    assert given.keys() < routed.keys()
    for path, value in given.items():
        if path[2:3] != ("out",):
            np.testing.assert_array_equal(routed[path][...], value[...], err_msg=str(path))
    query = np.asarray(given["layers", "attention", "query", "kernel"][...])
    shared = routed["layers", "attention", "shared_query", "kernel"][...]
    np.testing.assert_allclose(shared, query.reshape(2, 32, 6, 8).mean(axis=2), atol=1e-6)


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    """A run of a dense model, at step 0."""
    folder = tmp_path_factory.mktemp("dense")
    config = small_config(make_corpus(folder), folder / "run")
    attention = dataclasses.replace(config.model.attention, variant="gqa")
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, attention=attention)
    )
    rng = np.random.default_rng(4)
    params = jax.tree.map(
        lambda x: jnp.float32(rng.normal(size=x.shape) / 6), abstract_params(config.model)
    )
    write_run(config, params, None)
    return config, folder


@pytest.mark.slow
def test_an_upcycled_run_trains_on_under_its_teacher(dense_run):
    dense, folder = dense_run
    run = upcycle(UpcycleConfig(folder / "run", folder / "upcycled", 1, steps=3, distill=True))
    assert load_config(folder / "upcycled") == run
    assert (run.steps, run.teacher) == (3, dense.run_dir)
    found = Run.find(run.run_dir)
    step, (_, params) = found.step, found.load(make_mesh(SPREAD))
    assert step == 0
    before = [np.asarray(x) for x in jax.tree.leaves(params)]
    # Nothing has been trained yet, so the recipe may change; the model may not.
    wrong = dataclasses.replace(run, model=dataclasses.replace(run.model, num_layers=3))
    with pytest.raises(ConfigError, match=r"model.num_layers is 3, the checkpoint has 2"):
        train(wrong)
    slow = dataclasses.replace(run.optimizer, peak_learning_rate=1e-6, final_learning_rate=0.0)
    assert int(train(dataclasses.replace(run, optimizer=slow, seed=5)).step) == 3
    after = saved_state(run, 3)
    for old, new in zip(before, after[1 : 1 + len(before)], strict=True):
        np.testing.assert_allclose(new, old, atol=1e-4)
    assert any((old != new).any() for old, new in zip(before, after[1:], strict=False))


@pytest.mark.slow
def test_a_model_that_cannot_be_upcycled_is_named(dense_run, tmp_path):
    dense, folder = dense_run
    config = UpcycleConfig(folder / "run", tmp_path / "new", top_k=3)
    with pytest.raises(ConfigError, match="top_k is 3; a group has 2 experts"):
        upcycle(config)
    routed = tmp_path / "routed"
    params = convert(dense_params(), routed_config(1), seed=0, scaled=True)
    write_run(RunConfig(routed_config(1), run_dir=str(routed)), params, None)
    with pytest.raises(ConfigError, match="has variant 'gqe'; it must be gqa"):
        upcycle(dataclasses.replace(config, dense=routed, top_k=1))
    with pytest.raises(ConfigError, match=r"is no run directory; .* name --corpus"):
        upcycle(dataclasses.replace(config, dense=tmp_path, top_k=1))
    wrong = dataclasses.replace(dense, teacher=str(routed), run_dir=str(tmp_path / "pupil"))
    with pytest.raises(ConfigError, match=r"vocabulary of 40; it must be .* \(256\)"):
        train(wrong)
    assert not (tmp_path / "new").exists()
