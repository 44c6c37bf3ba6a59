"""The layers against the float64 oracle, and through the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqe_jax import AttentionConfig, ConfigError, KVCache
from gqe_jax.model.attention import make_attention
from gqe_kernels import contract, get_attention
from tests import oracle
from tests.gqe_kernels.contract import assert_close

VARIANTS = ("gqe", "hard_concat", "weighted_concat", "gqa")
BATCH, LENGTH, EMBED = 2, 12, 16


def make_config(variant="gqe", top_k=1, experts_per_group=2, **kwargs):
    return AttentionConfig(
        variant=variant,
        embed_dim=EMBED,
        num_query_experts=2 * experts_per_group,
        num_kv_heads=2,
        top_k=top_k,
        head_dim=4,
        router_init_std=0.5,
        **kwargs,
    )


def make_layer(config, **kwargs):
    """The layer, its parameters by name, and an input."""
    layer = make_attention(config, rngs=nnx.Rngs(0), **kwargs)
    _, params = nnx.split(layer)
    for norm in ("query_norm", "key_norm"):  # scales of 1 would hide a norm that ignores them
        if norm in params:
            scale = params[norm]["scale"]
            scale[...] = jax.random.uniform(jax.random.key(3), scale.shape, minval=0.5, maxval=2.0)
    nnx.update(layer, params)
    named = {name: next(iter(value.values()))[...] for name, value in params.items()}
    x = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, EMBED))
    return layer, named, x


SEGMENTS = np.array([[1] * 5 + [2] * 7, [1] * 3 + [2] * 4 + [0] * 5], np.int32)


@pytest.mark.parametrize(
    ("top_k", "experts", "segments"),
    [
        (1, 2, None),
        pytest.param(2, 2, SEGMENTS, marks=pytest.mark.slow),
        (1, 4, SEGMENTS),
        pytest.param(2, 4, None, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, int) else "whole" if value is None else "segments",
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_equals_the_oracle(variant, top_k, experts, segments):
    check_layer(make_config(variant, top_k, experts), segments)


@pytest.mark.parametrize("shared_kv", ["group_0", "own"])
def test_sources_of_the_shared_head_equal_the_oracle(shared_kv):
    check_layer(make_config(shared_kv=shared_kv), SEGMENTS)


@pytest.mark.parametrize("variant", ["gqe", "gqa"])
def test_norms_of_queries_and_keys_equal_the_oracle(variant):
    config = make_config(variant, qk_norm=True, qk_norm_epsilon=0.1, shared_kv="own")
    check_layer(config, SEGMENTS)


def check_layer(config, segments):
    layer, named, x = make_layer(config)
    graphdef, params = nnx.split(layer)
    cotangent = np.random.default_rng(5).standard_normal(x.shape)

    def oracle_loss(xp, named, x):
        y, balance = oracle.layer(xp, config, named, x, index, segments)
        return xp.sum(y * cotangent) + 0.3 * balance

    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), (named, x))
    index = None if config.variant == "gqa" else oracle.select(*exact, config.top_k)
    expected, balance = oracle.layer(np, config, *exact, index, segments)
    expected_grads = oracle.gradients(oracle_loss, exact)

    @jax.jit
    def loss(params, x):
        y, aux, _ = nnx.merge(graphdef, params)(x, segment_ids=segments)
        return jnp.sum(y * cotangent) + 0.3 * aux.load_balancing_loss, (y, aux)

    grads, (y, aux) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    assert_close(y, expected, 1e-5, "output")
    assert float(aux.load_balancing_loss) == pytest.approx(balance, abs=1e-6)
    for name, grad in expected_grads[0].items():
        (ours,) = grads[0][name].values()
        assert_close(ours[...], grad, 1e-4, f"gradient of {name}")
    assert_close(grads[1], expected_grads[1], 1e-4, "gradient of x")


@pytest.mark.parametrize(
    "variant", [pytest.param("gqe", marks=pytest.mark.slow), "hard_concat", "weighted_concat"]
)
def test_only_the_weighted_paths_let_the_loss_reach_the_router(variant):
    layer, _, x = make_layer(make_config(variant))
    graphdef, params = nnx.split(layer)
    grads = jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(x)[0] ** 2))(params)
    reached = np.abs(np.asarray(grads["router"]["kernel"][...])).max()
    if variant == "hard_concat":
        assert reached == 0.0
    else:
        assert reached > 1e-3


@pytest.mark.parametrize("implementation", [None, "xla"], ids=str)
def test_a_selection_bias_changes_which_experts_are_selected_alone(implementation):
    config = make_config("gqe", 2, 4, selection_bias=True)
    plain, named, x = make_layer(make_config("gqe", 2, 4))
    layer = make_attention(config, implementation=implementation, rngs=nnx.Rngs(0))
    bias = np.random.default_rng(4).normal(size=(2, 4)).astype(np.float32)
    nnx.update(layer, nnx.state(plain, nnx.Param))
    layer.selection_bias[...] = jnp.asarray(bias)

    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), (named, x))
    logits = np.einsum("bld,dgm->blgm", exact[1], exact[0]["router"])
    index = np.argsort(-(logits + bias), axis=-1, kind="stable")[..., :2]
    assert np.any(index != oracle.select(*exact, 2))
    expected, _ = oracle.layer(np, config, *exact, index)
    y, aux, _ = layer(x, return_routing=True)
    np.testing.assert_array_equal(aux.expert_index, index)
    assert_close(y, expected, 1e-5, "output")
    grads = nnx.grad(lambda layer: jnp.sum(layer(x)[0] ** 2))(layer)
    np.testing.assert_array_equal(grads["selection_bias"][...], 0.0)


@pytest.mark.parametrize("top_k", [1, 2])
def test_straight_through_changes_the_router_s_gradient_alone(top_k):
    """The gradient of a slot's weight is that of the slot times the slot, summed over features."""
    layer, _, x = make_layer(make_config("hard_concat", top_k, 4))
    through, _, _ = make_layer(make_config("hard_concat", top_k, 4, straight_through=True))
    graphdef, params = nnx.split(through)
    grads = jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(x)[0] ** 2))(params)
    plain = jax.grad(lambda p: jnp.sum(nnx.merge(nnx.graphdef(layer), p)(x)[0] ** 2))(params)
    for name in ("query", "key", "value", "out"):
        assert_close(grads[name]["kernel"][...], plain[name]["kernel"][...], 1e-6, name)

    slots, aux, _ = layer.slots(x, return_routing=True)
    np.testing.assert_array_equal(layer(x)[0], through(x)[0])
    d_slots = jax.grad(lambda slots: jnp.sum(layer.project_slots(slots) ** 2))(slots)
    d_log = np.sum(np.float64(d_slots * slots), axis=-1).reshape(BATCH, LENGTH, 2, top_k)
    probs, index = np.float64(aux.router_probs), np.asarray(aux.expert_index)
    chosen = np.eye(4)[index]  # [batch, length, group, k, expert]
    d_logits = np.einsum("blgk,blgkm->blgm", d_log, chosen - probs[:, :, :, None])
    expected = np.einsum("bld,blgm->dgm", np.float64(x), d_logits)
    assert_close(grads["router"]["kernel"][...], expected, 1e-5, "gradient of the router")


def test_experts_of_a_group_start_as_alike_as_they_are_told_to():
    def kernel(spread):
        config = AttentionConfig(
            embed_dim=256, num_query_experts=8, num_kv_heads=2, expert_init_spread=spread
        )
        return np.asarray(make_attention(config, rngs=nnx.Rngs(0)).query.kernel[...])

    np.testing.assert_array_equal(kernel(0.0), np.repeat(kernel(0.0)[:, :, :1], 4, axis=2))
    for spread in (0.0, 0.1, 0.7, 1.0):
        weights = kernel(spread)
        assert weights.std() == pytest.approx(256**-0.5, rel=0.03)
        alike = np.corrcoef(weights[:, :, 0].ravel(), weights[:, :, 3].ravel())[0, 1]
        assert alike == pytest.approx(1 - spread**2, abs=0.03)
        groups = np.corrcoef(weights[:, 0].ravel(), weights[:, 1].ravel())[0, 1]
        assert abs(groups) < 0.05


def test_a_model_can_start_without_the_weighted_and_the_shared_slot():
    layer, params, x = make_layer(make_config("gqe", 1, 4, extra_slot_scale=0.0))
    full, others, _ = make_layer(make_config("gqe", 1, 4))
    np.testing.assert_array_equal(params["out"][:2], others["out"][:2])
    np.testing.assert_array_equal(params["out"][2:], 0)
    slots, _, _ = layer.slots(x)
    expected = np.einsum(
        "blsf,sfd->bld", np.float64(slots)[:, :, :2], np.float64(others["out"][:2])
    )
    assert_close(layer(x)[0], expected, 1e-5, "output")
    np.testing.assert_array_equal(slots, full.slots(x)[0])


@pytest.mark.parametrize(
    ("variant", "shared_kv"),
    [
        ("gqe", "mean"),
        ("gqe", "group_0"),
        ("gqe", "own"),
        ("weighted_concat", "mean"),
        ("gqa", "mean"),
    ],
)
def test_prefill_then_decode_equals_the_full_forward(variant, shared_kv):
    """For prompts split at every position."""
    config = make_config(variant, shared_kv=shared_kv)
    layer, _, x = make_layer(config)
    x = x[:, :8]
    full, _, _ = layer(x)
    run = nnx.jit(lambda layer, x, cache: layer(x, cache=cache))
    for split in range(1, 8):
        cache = KVCache.create(config, BATCH, 8, jnp.float32)
        start, _, cache = run(layer, x[:, :split], cache)
        assert_close(start, full[:, :split], 1e-5, f"prefill of {split}")
        step, _, cache = run(layer, x[:, split : split + 1], cache)
        assert_close(step, full[:, split : split + 1], 1e-5, f"token {split}")
        np.testing.assert_array_equal(cache.length, split + 1)


def test_rows_of_different_lengths_share_a_cache():
    config = make_config()
    layer, _, x = make_layer(config)
    full, _, _ = layer(x)
    lengths = np.array([7, 4])
    mask = np.arange(8) < lengths[:, None]
    cache = KVCache.create(config, BATCH, LENGTH, jnp.float32)
    start, _, cache = layer(x[:, :8], cache=cache, mask=mask)
    for row, length in enumerate(lengths):
        assert_close(start[row, :length], full[row, :length], 1e-5, "prefill")
    np.testing.assert_array_equal(cache.length, lengths)
    step, _, _ = layer(jnp.stack([x[0, 7:8], x[1, 4:5]]), cache=cache)
    assert_close(step, jnp.stack([full[0, 7:8], full[1, 4:5]]), 1e-5, "decode")


def test_the_cache_refuses_more_tokens_than_it_can_hold():
    config = make_config()
    layer, _, x = make_layer(config)
    with pytest.raises(ValueError, match="capacity is 8 and 12 tokens"):
        layer(x, cache=KVCache.create(config, BATCH, 8, jnp.float32))


def test_padding_changes_nothing_and_stays_out_of_the_statistics():
    layer, _, x = make_layer(make_config())
    mask = np.arange(LENGTH) < np.array([[LENGTH], [5]])
    y, aux, _ = layer(x, mask=mask)
    noisy, noisy_aux, _ = layer(jnp.where(mask[..., None], x, 100.0), mask=mask)
    np.testing.assert_array_equal(y[mask], noisy[mask])
    np.testing.assert_array_equal(y[~mask], 0.0)
    assert float(aux.load_balancing_loss) == float(noisy_aux.load_balancing_loss)
    np.testing.assert_allclose(aux.expert_load.sum(axis=-1), 1.0, rtol=1e-6)


def test_bfloat16_computes_in_bfloat16_but_routes_in_float32():
    config = make_config()
    layer, _, x = make_layer(config, dtype=jnp.bfloat16)
    y, aux, _ = layer(x.astype(jnp.bfloat16), return_routing=True)
    assert y.dtype == jnp.bfloat16
    assert aux.router_probs.dtype == jnp.float32
    exact, _, _ = make_layer(config)[0](x)
    assert_close(y.astype(jnp.float32), exact, 3e-2, "output")


def test_zero_router_sends_every_token_to_expert_0():
    layer, _, x = make_layer(
        AttentionConfig(embed_dim=EMBED, num_query_experts=4, num_kv_heads=2, router_init_std=0.0)
    )
    _, aux, _ = layer(x, return_routing=True)
    assert not np.asarray(aux.expert_index).any()


def test_aux_has_the_routing_only_when_asked():
    layer, _, x = make_layer(make_config())
    assert layer(x)[1].router_probs is None
    assert layer(x, return_routing=True)[1].expert_index.shape == (BATCH, LENGTH, 2, 1)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": jnp.zeros((2, 12, 8))}, r"x has shape \(2, 12, 8\).*embed_dim \(16\)"),
        ({"positions": jnp.zeros((2, 3), "int32")}, r"positions has shape \(2, 3\)"),
        ({"mask": jnp.zeros((2, 3), bool)}, r"mask has shape \(2, 3\)"),
    ],
)
def test_bad_shapes_are_named(arguments, message):
    layer, _, x = make_layer(make_config())
    with pytest.raises(ValueError, match=message):
        layer(**{"x": x, **arguments})


def test_the_wrong_variant_is_refused():
    from gqe_jax import GroupedQueryAttention, GroupedQueryExperts

    with pytest.raises(ConfigError, match="GroupedQueryAttention for the dense"):
        GroupedQueryExperts(make_config("gqa"), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="GroupedQueryExperts for the routed"):
        GroupedQueryAttention(make_config("gqe"), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_stands_at_padding_reaches_nothing(variant, bad):
    """Neither outputs, nor statistics, nor gradients change, and padding's outputs are zero."""
    layer, _, x = make_layer(make_config(variant, shared_kv="own" if variant == "gqe" else "mean"))
    graphdef, params = nnx.split(layer)
    padding = SEGMENTS == 0

    @jax.jit
    def outputs_and_gradients(params, x):
        def total(params, x):
            y, aux, _ = nnx.merge(graphdef, params)(x, segment_ids=jnp.asarray(SEGMENTS))
            return jnp.sum(y**2) + aux.load_balancing_loss, (y, aux)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x)

    clean = outputs_and_gradients(params, x)
    dirty = outputs_and_gradients(params, x.at[padding].set(bad))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    (_, (y, _)), (_, d_x) = dirty
    for rows in (y, d_x):
        assert not np.asarray(rows)[padding].any()
        assert np.asarray(rows)[~padding].all(axis=-1).all()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("shape", [(0, 5, EMBED), (2, 0, EMBED)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_rows_and_no_tokens(variant, shape, cached):
    config = make_config(variant, qk_norm=True)
    layer, _, _ = make_layer(config)
    cache = KVCache.create(config, shape[0], 8, jnp.float32) if cached else None

    @nnx.value_and_grad(has_aux=True)
    def total(layer, x):
        y, aux, new = layer(x, cache=cache)
        return jnp.sum(y) + aux.load_balancing_loss, (y, new)

    (value, (y, new)), grads = total(layer, jnp.ones(shape))
    assert y.shape == shape
    assert value == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))
    assert new is None or (new.length == 0).all()


@pytest.mark.parametrize("variant", ["gqe", "gqa"])
@pytest.mark.parametrize(
    ("dtype", "param_dtype", "x_dtype", "expected"),
    [
        (None, "bfloat16", "bfloat16", "bfloat16"),
        (None, "bfloat16", "float32", "float32"),
        ("bfloat16", "bfloat16", "float32", "bfloat16"),
        ("bfloat16", "float32", "float32", "bfloat16"),
        ("float16", "bfloat16", "bfloat16", "float16"),
    ],
)
def test_operands_have_one_dtype_with_normed_queries(
    variant, dtype, param_dtype, x_dtype, expected
):
    seen = []

    def attention(routed, mask, scale):
        seen.append(routed)
        return get_attention("reference")(routed, mask, scale)

    config = make_config(variant, qk_norm=True, shared_kv="own" if variant == "gqe" else "mean")
    layer = make_attention(
        config,
        dtype=None if dtype is None else jnp.dtype(dtype),
        param_dtype=jnp.dtype(param_dtype),
        implementation=attention,
        rngs=nnx.Rngs(0),
    )
    y, aux, _ = layer(jnp.ones((BATCH, LENGTH, EMBED), x_dtype))
    contract.check(seen[0])
    assert seen[0].query.dtype == y.dtype == expected
    assert {leaf.dtype.name for leaf in jax.tree.leaves(aux)} == {"float32"}
