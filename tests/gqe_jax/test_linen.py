"""The Linen modules are the NNX layers, and live in Linen's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec

from gqe_jax import AttentionConfig, KVCache, linen
from gqe_jax.model.attention import make_attention
from gqe_jax.sharding import RULES

X = jax.random.normal(jax.random.key(1), (2, 6, 16))


def make_config(variant, **kwargs):
    return AttentionConfig(
        variant, embed_dim=16, num_query_experts=4, num_kv_heads=2, shared_kv="own", **kwargs
    )


@pytest.mark.parametrize("variant", ["gqe", "hard_concat", "weighted_concat", "gqa"])
def test_equals_the_nnx_layer_with_the_same_parameters(variant):
    config = make_config(variant, qk_norm=variant in ("gqe", "gqa"))
    kind = linen.GroupedQueryAttention if variant == "gqa" else linen.GroupedQueryExperts
    layer = kind(config)
    variables = nn.unbox(layer.init(jax.random.key(0), X))
    graphdef, state = nnx.split(make_attention(config, rngs=nnx.Rngs(0)))
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(
        jnp.shape, nnx.to_pure_dict(state)
    )
    nnx.replace_by_pure_dict(state, variables["params"])
    expected, expected_aux, _ = nnx.merge(graphdef, state)(X)
    y, aux, cache = layer.apply(variables, X)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    np.testing.assert_allclose(aux.load_balancing_loss, expected_aux.load_balancing_loss)
    assert cache is None


def test_decodes_through_the_cache():
    config = make_config("gqe")
    layer = linen.GroupedQueryExperts(config)
    variables = layer.init(jax.random.key(0), X)
    full, _, _ = layer.apply(variables, X)
    cache = KVCache.create(config, 2, 6, jnp.float32)
    _, _, cache = layer.apply(variables, X[:, :5], cache=cache)
    last, _, _ = layer.apply(variables, X[:, 5:], cache=cache)
    np.testing.assert_allclose(last, full[:, 5:], atol=1e-5)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y, aux, _ = linen.GroupedQueryExperts(make_config("gqe"), name="attention")(x)
        return x + y, aux.load_balancing_loss


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layer"},
        )
        return stack(name="layers")(x, None)


def test_under_scan_and_remat_with_logical_axes():
    model = Model()
    variables = model.init(jax.random.key(0), X)
    spec = nn.get_partition_spec(variables)["params"]["layers"]["attention"]["query"]["kernel"]
    assert spec == PartitionSpec("layer", "embed", "group", None, None)
    assert {axis for axis in spec if axis} <= set(RULES)

    def loss(variables):
        y, aux = model.apply(variables, X)
        return jnp.sum(y**2) + jnp.sum(aux)

    grads = nn.unbox(jax.jit(jax.grad(loss))(variables))["params"]["layers"]["attention"]
    for name, weight in grads.items():
        assert np.abs(weight["kernel"]).reshape(3, -1).max(axis=1).min() > 0, name
