"""Sequences over the context axis: the same loss, gradients and statistics as on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqe_jax.config import AttentionConfig, ConfigError, MeshConfig, ModelConfig, RunConfig
from gqe_jax.data import Batch
from gqe_jax.model.attention import make_attention
from gqe_jax.model.sharded_attention import sharded
from gqe_jax.model.transformer import Transformer
from gqe_jax.model.zigzag import from_zigzag, to_zigzag
from gqe_jax.sharding import OnMesh, batch_sharding, check_divides, global_batch, make_mesh
from gqe_jax.training.state import lay_out_state
from gqe_jax.training.steps import gradients
from gqe_kernels import get_attention, routed_attention

LENGTH = 64
ATTENTION = AttentionConfig(embed_dim=32, num_query_experts=8, num_kv_heads=4)


def make_config(mesh: MeshConfig, accumulation_steps: int = 1, **attention) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            attention=dataclasses.replace(ATTENTION, **attention),
            num_layers=2,
            mlp_dim=64,
            vocab_size=64,
            dtype="float32",
        ),
        mesh=mesh,
        steps=1,
        batch_size=8,
        sequence_length=LENGTH,
        accumulation_steps=accumulation_steps,
    )


def make_batch() -> Batch:
    """Three documents a row, whose ends stand at no multiple of a shard, and a padded end."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (8, LENGTH + 1)).astype(np.int32)
    ends = np.sort(rng.choice(np.arange(3, LENGTH - 9), (8, 2)) // 8 * 8 + 3, axis=1)
    place = np.arange(LENGTH)
    segments = 1 + (place[None, :, None] >= ends[:, None, :]).sum(-1)
    segments[:, LENGTH - 5 :] = 0
    weights = (segments > 0).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, segments.astype(np.int32))


def computed(config: RunConfig, num_devices: int):
    """Gradients, cross-entropy and the router's statistics of the first step."""
    mesh = make_mesh(config.mesh, jax.devices()[:num_devices])
    check_divides(config, dict(mesh.shape))
    layout = lay_out_state(config, mesh)
    batch = global_batch(batch_sharding(mesh), config.batch_size, make_batch())
    function = jax.jit(functools.partial(gradients, config, layout.graphdef))
    return jax.device_get(OnMesh(mesh, function)(layout.init().params, batch))


@functools.cache
def on_one_device(accumulation_steps: int, **attention):
    return computed(make_config(MeshConfig(), accumulation_steps, **attention), 1)


def assert_same(actual, expected):
    def compare(x, y):
        scale = max(float(np.abs(y).max(initial=0.0)), 1e-2)
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * scale)

    jax.tree.map(compare, actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "accumulation_steps", "attention"),
    [
        ({"context": 4}, 1, {"num_query_experts": 16, "top_k": 2, "shared_kv": "own"}),
        ({"context": 2, "fsdp": 2, "tensor": 2}, 4, {}),
        ({"context": 4, "data": 2}, 1, {"variant": "gqa"}),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_one_device(mesh, accumulation_steps, attention):
    config = make_config(MeshConfig(**{"data": 1} | mesh), accumulation_steps, **attention)
    actual = computed(config, int(np.prod(list(mesh.values()))))
    assert_same(actual, on_one_device(accumulation_steps, **attention))


@pytest.mark.parametrize("context", [2, 4, 8])
def test_each_shard_holds_an_early_and_a_late_piece(context):
    mesh = make_mesh(MeshConfig(data=1, context=context), jax.devices()[:context])
    natural = jax.device_put(np.arange(LENGTH)[None], batch_sharding(mesh))
    placed = OnMesh(mesh, jax.jit(to_zigzag))(natural)
    pieces = np.arange(LENGTH).reshape(2 * context, -1)
    for shard in placed.addressable_shards:
        c = shard.index[1].start // (LENGTH // context)
        np.testing.assert_array_equal(shard.data[0], [*pieces[c], *pieces[2 * context - 1 - c]])
    back = OnMesh(mesh, jax.jit(from_zigzag))(placed)
    np.testing.assert_array_equal(back, natural)


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "context": 4}, {"data": 1, "context": 2, "fsdp": 2, "tensor": 2}], ids=str
)
def test_routing_is_returned_in_natural_order(sizes):
    """With a selection bias, which decides for some tokens."""
    config = make_config(MeshConfig(), selection_bias=True).model
    model = Transformer(config, rngs=nnx.Rngs(0))
    bias = model.layers.attention.selection_bias
    bias[...] = 0.1 * jax.random.normal(jax.random.key(1), bias.shape)
    tokens = make_batch().inputs
    call = jax.jit(lambda tokens: model(tokens, return_routing=True)[1])
    expected = call(tokens)
    most_probable = expected.router_probs.argmax(axis=-1)
    assert 0.01 < np.mean(expected.expert_index[..., 0] != most_probable) < 0.99
    mesh = make_mesh(MeshConfig(**sizes))
    actual = OnMesh(mesh, jax.jit(lambda tokens: model(tokens, return_routing=True)[1]))(tokens)
    np.testing.assert_array_equal(actual.expert_index, expected.expert_index)
    np.testing.assert_allclose(actual.router_probs, expected.router_probs, atol=1e-5)


@pytest.mark.parametrize("length", [LENGTH, 60, 15])
def test_a_layer_alone_takes_sequences_in_natural_order(length):
    """60 divides over 4 shards, not over their halves; 15 does not divide."""
    layer = make_attention(ATTENTION, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, length, 32))
    mesh = make_mesh(MeshConfig(data=2, context=4))
    actual = OnMesh(mesh, jax.jit(lambda x: layer(x)[0]))(x)
    np.testing.assert_allclose(actual, layer(x)[0], atol=1e-5)


@pytest.mark.parametrize(
    "masking",
    [{"scale": 1.5, "causal": False}, {"q_offset": np.array([[0, 8], [3, 20]])}],
    ids=["scale and causality", "queries in two pieces"],
)
def test_every_head_is_masked_as_the_call_says(masking):
    rng = np.random.default_rng(0)
    shapes = {"query": (4, 2, 8), "key": (4, 8), "value": (4, 8), "shared_query": (8,)}
    arrays = {
        name: jnp.float32(rng.standard_normal((2, 16, *shape))) for name, shape in shapes.items()
    }
    arrays["expert_index"] = jnp.asarray(rng.integers(0, 2, (2, 16, 4, 1)))
    arrays["slot_weight"] = jnp.float32(rng.random((2, 16, 4, 1)))
    on_a_mesh = sharded(get_attention("reference"))

    def call(implementation):
        return jax.jit(lambda a: routed_attention(**a, **masking, implementation=implementation))

    mesh = make_mesh(MeshConfig(data=1, context=2, tensor=4))
    actual = OnMesh(mesh, call(on_a_mesh))(arrays)
    np.testing.assert_allclose(actual, call("reference")(arrays), atol=1e-5)


def test_a_sequence_that_does_not_divide_is_named():
    config = dataclasses.replace(make_config(MeshConfig(data=1, context=8)), sequence_length=40)
    with pytest.raises(ConfigError, match=r"sequence_length is 40; .* 2 × mesh.context = 16"):
        check_divides(config, dict(make_mesh(config.mesh).shape))


def test_the_shared_head_is_computed_once_over_the_tensor_axis():
    """Each of T shards attends for 1/T of the queries, not for all of them."""
    layer = make_attention(
        dataclasses.replace(ATTENTION, num_query_experts=4, head_dim=8),
        implementation="reference",
        rngs=nnx.Rngs(0),
    )
    x = jnp.zeros((1, 512, 32))

    def attention_flops(tensor: int) -> float:
        mesh = make_mesh(MeshConfig(data=1, tensor=tensor), jax.devices()[:tensor])
        compiled = OnMesh(mesh, lambda x: jax.jit(lambda x: layer(x)[0]).lower(x).compile())(x)
        return compiled.cost_analysis()["flops"]

    # Four hard heads and the shared one; projections are small beside 512 x 512 logits.
    assert attention_flops(4) < attention_flops(1) * (5 / 4 + 0.15) / 5
