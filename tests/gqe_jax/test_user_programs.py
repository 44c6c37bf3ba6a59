"""The layer in a user's shard_map, under pmap, and on meshes that are not ours."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gqe_jax import AttentionConfig, ConfigError, KVCache
from gqe_jax.compile_for.topology import get_topology
from gqe_jax.model.attention import make_attention
from gqe_jax.sharding import RULES

CONFIG = AttentionConfig(embed_dim=32, num_query_experts=8, num_kv_heads=4)
GRAPHDEF, PARAMS = nnx.split(make_attention(CONFIG, rngs=nnx.Rngs(0)))
X = jax.random.normal(jax.random.key(0), (8, 16, 32))


def apply(params, x):
    return nnx.merge(GRAPHDEF, params)(x)[0]


def total(apply):
    return lambda params, x: jnp.sum(apply(params, x) ** 2)


@pytest.fixture(scope="module")
def expected():
    """The output and the gradient on one device."""
    return jax.jit(apply)(PARAMS, X), jax.jit(jax.grad(total(apply)))(PARAMS, X)


def make_mesh(names, kind=AxisType.Auto):
    return jax.make_mesh((4, 2), names, axis_types=(kind, kind))


def assert_same(actual, expected):
    compare = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4)  # noqa: E731
    jax.tree.map(compare, jax.device_get(actual), jax.device_get(expected))


@pytest.mark.parametrize(
    ("names", "check_vma", "is_set"),
    [
        (("data", "tensor"), True, True),
        (("data", "tensor"), False, False),
        (("x", "y"), True, False),
        (("x", "y"), False, True),
    ],
)
def test_inside_a_shard_map_over_all_axes(expected, names, check_vma, is_set):
    mesh, rows = make_mesh(names), P(names[0])
    mapped = jax.shard_map(
        apply, mesh=mesh, in_specs=(P(), rows), out_specs=rows, check_vma=check_vma
    )
    both = jax.jit(lambda *args: (mapped(*args), jax.grad(total(mapped))(*args)))
    if is_set:
        with jax.set_mesh(mesh):
            assert_same(both(PARAMS, X), expected)
    else:
        assert_same(both(PARAMS, X), expected)


def test_a_gradient_inside_a_shard_map(expected):
    """With check_vma on, the gradient of what is the same on all devices is summed over them."""
    mesh = make_mesh(("x", "y"))
    inside = jax.shard_map(jax.grad(total(apply)), mesh=mesh, in_specs=(P(), P("x")), out_specs=P())
    assert_same(jax.jit(inside)(PARAMS, X), expected[1])


def test_inside_a_shard_map_over_some_axes(expected):
    mesh, rows = make_mesh(("data", "tensor")), P("data")
    options = {"in_specs": (P(), rows), "out_specs": rows, "axis_names": {"data"}}
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(apply, check_vma=False, **options)
        both = jax.jit(lambda *args: (mapped(*args), jax.grad(total(mapped))(*args)))
        assert_same(both(PARAMS, X), expected)
        with pytest.raises(ConfigError, match=r"leaves the mesh axes tensor.*check_vma=False"):
            jax.eval_shape(jax.shard_map(apply, **options), PARAMS, X)


def test_under_pmap(expected):
    y = jax.pmap(apply, in_axes=(None, 0))(PARAMS, X[:, None])
    assert_same(y[:, 0], expected[0])
    grads = jax.pmap(jax.grad(total(apply)), in_axes=(None, 0))(PARAMS, X[:, None])
    assert_same(jax.tree.map(lambda g: g.sum(axis=0), grads), expected[1])


@pytest.mark.parametrize("names", [("data", "tensor"), ("data", "fsdp")])
def test_on_a_mesh_with_explicit_axes(expected, names):
    mesh = make_mesh(names, AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
        both = jax.jit(lambda *args: (apply(*args), jax.grad(total(apply))(*args)))
        y, grads = both(params, x)
        assert jax.typeof(y).sharding.spec == P("data", None, None)
        assert_same((y, grads), expected)

        cache = KVCache.create(CONFIG, 8, 24, jnp.float32)
        cache = jax.device_put(cache, NamedSharding(mesh, P("data")))
        call = jax.jit(lambda params, x, cache: nnx.merge(GRAPHDEF, params)(x, cache=cache))
        first, _, cache = call(params, x[:, :15], cache)
        last, _, cache = call(params, x[:, 15:], cache)
        assert jax.typeof(cache.key).sharding.spec[0] == "data"
    assert_same(jnp.concatenate(jax.device_get((first, last)), axis=1), expected[0])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_other_names_of_axes_are_refused_until_the_rules_have_them(expected, monkeypatch, kind):
    mesh = make_mesh(("replica", "model"), kind)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("replica")))
        params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
        with pytest.raises(ConfigError, match=r"axes 'replica', 'model'.*RULES\['batch'\] ="):
            jax.jit(apply)(params, x)
        monkeypatch.setitem(RULES, "batch", ("replica",))
        with pytest.raises(ConfigError, match=r"axes 'model'.*RULES\['repeated'\] = \('model',\)"):
            jax.jit(apply)(params, x)
        monkeypatch.setitem(RULES, "repeated", ("model",))
        compiled = jax.jit(apply).lower(params, x).compile()
        assert_same(compiled(params, x), expected[0])
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", compiled.as_text())
    assert all(np.prod(list(map(int, shape.split(",")))) < X.size for shape in shapes), shapes


@pytest.mark.libtpu
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("x", "y"), id="inside"),
        pytest.param(("data", "tensor"), id="around", marks=pytest.mark.slow),
    ],
)
def test_on_tpus_they_use_the_kernel(names):
    """Inside a shard_map with its checks on, and on a mesh with explicit axes, in bfloat16."""
    devices = np.array(get_topology("v5e:2x2").devices).reshape(2, 2)
    mesh = Mesh(devices, names, axis_types=(AxisType.Explicit, AxisType.Explicit))
    config = AttentionConfig(
        embed_dim=256, num_query_experts=8, num_kv_heads=4, head_dim=64, qk_norm=True
    )
    layer = nnx.eval_shape(lambda: make_attention(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(layer)
    specs = {"in_specs": (P(), P("x"), P("x")), "out_specs": P("x")}

    def call(params, x, ids):
        return nnx.merge(graphdef, params)(x, segment_ids=ids)[0]

    def shape(x, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    mapped = jax.shard_map(call, mesh=mesh, **specs) if "x" in names else call
    rows = P(names[0])
    x = jax.ShapeDtypeStruct((4, 256, 256), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    arguments = (jax.tree.map(lambda p: shape(p, P()), params), shape(x, rows), shape(ids, rows))
    loss = lambda *arguments: jnp.sum(mapped(*arguments).astype(jnp.float32) ** 2)  # noqa: E731
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
    kernels = re.findall(r"%(gqe_[a-z_]+)[\d.]* = .*custom-call", compiled.as_text())
    attention = {"gqe_forward", "gqe_backward", "gqe_backward_prepare"}
    assert {"gqe_project", *attention} == set(kernels)  # with normed heads, its gradient is plain
