"""The served model computes what ours does, with any paged attention; the engine is not needed."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from gqe_jax.config import AttentionConfig, ConfigError, ModelConfig, RopeScaling
from gqe_jax.config_json import to_dict
from gqe_jax.interop.tensors import WeightsError
from gqe_jax.model.transformer import Transformer
from gqe_jax.serving.model import GroupedQueryExpertsForCausalLM
from gqe_jax.serving.paged import cache_heads
from tests.gqe_jax import pages

ATTENTION = AttentionConfig(
    embed_dim=32, num_query_experts=8, num_kv_heads=4, head_dim=8, top_k=1, router_init_std=1.0
)
MODEL = ModelConfig(
    ATTENTION, num_layers=1, mlp_dim=48, vocab_size=40, dtype="float32", embedding_init_std=1.0
)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 16)
ATTENTIONS = {
    "k1": {},
    "k2": {"top_k": 2, "qk_norm": True, "rope_scaling": LLAMA3},
    "k1_wide": {"head_dim": 128},
    "group_0": {"shared_kv": "group_0"},
    "own": {"shared_kv": "own", "top_k": 2},
    "hard_concat": {"variant": "hard_concat"},
    "weighted_concat": {"variant": "weighted_concat", "top_k": 2},
    "gqa": {"variant": "gqa", "qk_norm": True},
}


class Plain(GroupedQueryExpertsForCausalLM):
    """The served model with pages of plain JAX."""

    axes = {"group": "model", "mlp": "model", "mlp_rows": "model", "vocab": ("data", "model")}  # noqa: RUF012

    def paged_attention(self, cache, query, key, value, metadata, mesh, *, sm_scale):
        rows = jnp.stack([key, value], axis=1)
        return pages.attend(
            query, rows, cache, metadata, sm_scale, lambda x: (x[:, :, 0], x[:, :, 1])
        )


def engine_config(config, directory, **parallel):
    """What the model reads of the engine's configuration."""
    sizes = {"pipeline_parallel_size": 1, "decode_context_parallel_size": 1} | parallel
    return types.SimpleNamespace(
        model_config=types.SimpleNamespace(
            model=str(directory),
            dtype=jnp.dtype(config.dtype),
            hf_config=types.SimpleNamespace(model=to_dict(config)),
        ),
        cache_config=types.SimpleNamespace(cache_dtype="auto"),
        parallel_config=types.SimpleNamespace(**sizes),
    )


def engine_mesh(shards):
    return Mesh(np.array(jax.devices()[:shards]).reshape(1, shards), ("data", "model"))


def served(config, directory, mesh, kind=Plain):
    """The model, made and loaded as by the engine."""
    with jax.set_mesh(mesh):
        make = lambda: kind(engine_config(config, directory), jax.random.key(0), mesh)  # noqa: E731
        model = nnx.eval_shape(make, graph_updates=False)
        model.load_weights(jax.random.key(0))
    return model


@functools.cache
def original(config):
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    params = jax.jit(lambda: nnx.state(Transformer(config, rngs=nnx.Rngs(5)), nnx.Param))()
    return nnx.merge(graphdef, params)


@functools.cache
def whole(config):
    """Our model's logits of whole sequences, jitted."""
    graphdef, params = nnx.split(original(config))

    @jax.jit
    def logits(params, tokens):
        model = nnx.merge(graphdef, params)
        return model.logits(model(tokens)[0])

    return functools.partial(logits, params)


def expected(config, prompts):
    """The logits of our model for whole sequences; those after a sequence are no one's."""
    longest = max(map(len, prompts))
    return whole(config)(np.stack([np.pad(x, (0, longest - len(x))) for x in prompts]))


def random_prompts(*lengths):
    rng = np.random.default_rng(1)
    return [rng.integers(0, MODEL.vocab_size, length) for length in lengths]


def stepping(model, prompts):
    """The model with jitted steps and empty caches."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, caches, ids, metadata):
        model = nnx.merge(graphdef, state)
        caches, hidden, _, _ = model(caches, ids, metadata)
        return caches, model.compute_logits(hidden)

    config = model.config
    shape = (pages.NUM_PAGES, pages.PAGE, 2, *cache_heads(config.attention, model.shards))
    caches = [jnp.zeros(shape, config.dtype)] * config.num_layers
    return pages.Steps(functools.partial(run, state), caches, prompts)


# Whole prompts, chunks, a chunk beside decoded tokens, decoded tokens; the last request ends early.
COUNTS = [(13, 20, 2), (4, 9, 1), (1, 7, 1), *[(1, 1, 1)] * 4]


def check_steps(model, config):
    totals = np.sum(COUNTS, axis=0)
    prompts = random_prompts(*totals)
    steps = stepping(model, prompts)
    parts = [steps(counts) for counts in COUNTS]
    for request, right in enumerate(expected(config, prompts)):
        got = np.concatenate([part[request] for part in parts])
        np.testing.assert_allclose(got, right[: len(got)], atol=1e-4)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_steps_over_shuffled_pages_give_the_logits_of_whole_sequences(name, tmp_path):
    attention = dataclasses.replace(ATTENTION, **ATTENTIONS[name])
    config = dataclasses.replace(
        MODEL, attention=attention, tied_embedding=name != "k2", num_layers=2 if name == "k2" else 1
    )
    directory = pages.export(tmp_path / "exported", original(config))
    check_steps(served(config, directory, engine_mesh(1)), config)


@pytest.mark.parametrize(("shards", "k"), [(2, 1), (4, 2)])
def test_tensor_parallel_shards_have_a_copy_of_the_shared_head(shards, k, tmp_path):
    config = dataclasses.replace(MODEL, attention=dataclasses.replace(ATTENTION, top_k=k))
    directory = pages.export(tmp_path / "exported", original(config))
    model = served(config, directory, engine_mesh(shards))
    layer = model.transformer.layers[0].attention
    assert layer.query.kernel[...].sharding.shard_shape((32, 4, 2, 8)) == (32, 4 // shards, 2, 8)
    assert layer.out.kernel[...].sharding.shard_shape((10, 8, 32))[2] == 32 // shards
    check_steps(model, config)


def test_bfloat16_keeps_the_router_and_norms_in_float32(tmp_path):
    directory = pages.export(tmp_path / "exported", original(MODEL))
    model = served(dataclasses.replace(MODEL, dtype="bfloat16"), directory, engine_mesh(1))
    layer = model.transformer.layers[0]
    assert layer.attention.query.kernel.dtype == jnp.bfloat16
    assert layer.attention.router.kernel.dtype == layer.mlp_norm.scale.dtype == jnp.float32
    steps = stepping(model, random_prompts(20))
    got = steps([20])[0]
    right = expected(MODEL, steps.prompts)[0]
    assert got.dtype == jnp.float32
    assert np.mean(np.abs(got - right)) < 0.05 * np.mean(np.abs(right))


def test_the_cache_has_one_more_head_for_each_shard():
    wide = dataclasses.replace(ATTENTION, head_dim=128)
    assert [cache_heads(wide, shards) for shards in (1, 2, 4)] == [(5, 128), (6, 128), (8, 128)]
    dense = dataclasses.replace(ATTENTION, variant="gqa")
    assert [cache_heads(dense, shards) for shards in (1, 2, 4)] == [(4, 8)] * 3
    # In pairs, those of a shard are rounded up to an even number.
    assert [cache_heads(ATTENTION, shards) for shards in (1, 2, 4)] == [(3, 16), (4, 16), (4, 16)]
    with pytest.raises(ConfigError, match=r"num_kv_heads is 4, which tensor_parallel_size \(3\)"):
        cache_heads(ATTENTION, 3)


def test_what_cannot_be_served_is_named(tmp_path):
    mesh, key = engine_mesh(1), jax.random.key(0)
    with pytest.raises(ConfigError, match="pipeline_parallel_size is 2; it must be 1"):
        Plain(engine_config(MODEL, "", pipeline_parallel_size=2), key, mesh)
    quantized = engine_config(MODEL, "")
    quantized.cache_config.cache_dtype = "fp8"
    with pytest.raises(ConfigError, match="kv-cache-dtype is 'fp8'; it must be auto"):
        Plain(quantized, key, mesh)
    other = dataclasses.replace(MODEL, mlp_dim=56)
    directory = pages.export(tmp_path / "exported", original(other))
    with pytest.raises(WeightsError, match=r"mlp.*shape"):
        served(MODEL, directory, mesh)
