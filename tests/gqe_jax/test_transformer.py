"""The scanned model against its blocks one by one, and against itself without memory savings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import CONFIGS
from gqe_jax import AttentionConfig, ModelConfig, Transformer
from gqe_jax.model.flops import matmul_flops_per_token
from tests.gqe_kernels.contract import assert_close

CONFIG = ModelConfig(
    attention=AttentionConfig(embed_dim=32, num_query_experts=4, num_kv_heads=2),
    num_layers=3,
    mlp_dim=48,
    vocab_size=40,
    dtype="float32",
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 10), 0, 40)


def make_model(**changes):
    return Transformer(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(1))


def test_scan_equals_the_blocks_one_by_one():
    model = make_model()
    hidden, aux, _ = model(TOKENS)
    graphdef, params = nnx.split(model.layers)
    x = model.embedding(TOKENS)
    for layer in range(3):
        block = nnx.merge(graphdef, jax.tree.map(lambda p, layer=layer: p[layer], params))
        x, block_aux, _ = block(x, positions=None, segment_ids=None, cache=None)
        np.testing.assert_allclose(
            aux.load_balancing_loss[layer], block_aux.load_balancing_loss, rtol=1e-5
        )
    assert_close(hidden, model.final_norm(x), 1e-5, "hidden")
    kernels = params["attention"]["query"]["kernel"][...]
    assert float(jnp.abs(kernels[0] - kernels[1]).max()) > 0.01  # each layer has its own weights


OTHERS = [pytest.param(r, marks=pytest.mark.slow) for r in ("keep_dots", "keep_attention")]


@pytest.mark.parametrize("remat", ["offload", "keep_nothing", *OTHERS])
def test_remat_changes_memory_and_no_value(remat):
    cotangent = jax.random.normal(jax.random.key(2), (2, 10, 32))

    def gradients(remat):
        graphdef, params = nnx.split(make_model(remat=remat))
        objective = lambda p: jnp.sum(nnx.merge(graphdef, p)(TOKENS)[0] * cotangent)  # noqa: E731
        return jax.jit(jax.grad(objective))(params)

    jax.tree.map(
        lambda a, b: assert_close(a, b, 1e-5, remat),
        gradients(remat),
        gradients("keep_everything"),
    )


def test_logits_are_tied_to_the_embedding():
    model = make_model()
    hidden, _, _ = model(TOKENS)
    expected = np.asarray(hidden) @ np.asarray(model.embedding.embedding[...]).T
    logits = model.logits(hidden)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_no_token_sees_a_later_one():
    model = make_model()
    hidden, _, _ = model(TOKENS)
    changed, _, _ = model(TOKENS.at[:, 6:].set(0))
    np.testing.assert_allclose(hidden[:, :6], changed[:, :6], atol=1e-6)
    assert float(jnp.abs(hidden[:, 6:] - changed[:, 6:]).max()) > 1e-3


def test_prefill_and_decode_through_all_layers():
    model = make_model()
    full, _, _ = model(TOKENS)
    start, _, cache = model(TOKENS[:, :7], cache=model.create_cache(2, 10))
    steps = [start]
    run = nnx.jit(lambda model, token, cache: model(token, cache=cache))
    for t in range(7, 10):
        hidden, _, cache = run(model, TOKENS[:, t : t + 1], cache)
        steps.append(hidden)
    assert_close(jnp.concatenate(steps, axis=1), full, 1e-5, "hidden")


def test_bfloat16_keeps_float32_parameters():
    model = make_model(dtype="bfloat16")
    hidden, aux, _ = model(TOKENS)
    assert hidden.dtype == jnp.bfloat16
    assert aux.load_balancing_loss.dtype == jnp.float32
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {
        jnp.dtype(jnp.float32)
    }
    assert_close(hidden.astype(jnp.float32), make_model()(TOKENS)[0], 5e-2, "hidden")


def test_every_weight_names_its_axes():
    model = nnx.eval_shape(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0)))
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        axes = param.get_metadata()["out_sharding"]
        assert len(axes) == len(param.shape), path
        assert ("layers" in path) == (axes[0] == "layer"), path


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("gqe_40m", 38e6, 45e6),
        ("gqe_250m", 245e6, 255e6),
        ("gqa_250m", 245e6, 255e6),
        ("tiny", 0.7e6, 0.9e6),
    ],
)
def test_sizes_of_the_configurations(name, least, most):
    model = nnx.eval_shape(lambda: Transformer(CONFIGS[name].model, rngs=nnx.Rngs(0)))
    count = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert least < count < most


def test_flops_of_a_small_model_counted_by_hand():
    # d = 32, D = 8, N = 4, G = 2: queries 4, keys and values 4, shared query 1, slots 4 heads of 8.
    projections = 32 * 8 * (4 + 4 + 1 + 4) + 32 * 4
    mlp = 3 * 32 * 48
    attention = 3 * 8 * 100  # k·G + 1 = 3 heads; 100 keys, half of them masked, QK and PV
    expected = 2 * (3 * (projections + mlp + attention) + 32 * 40)
    assert matmul_flops_per_token(CONFIG, 100) == expected
