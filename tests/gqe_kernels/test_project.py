"""The projection, plain and by the TPU kernels, against float64 NumPy and its gradients."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqe_kernels.pallas_tpu import projection as kernels
from gqe_kernels.project import project
from gqe_kernels.projection import Projection, gradients, reference
from tests.gqe_kernels.interpreter import interpreter as interpreter

FIELDS = ("query", "key", "value", "shared_query", "shared_key", "shared_value")
WEIGHTS = ("query", "key", "value", "router", "shared_query", "query_scale", "key_scale")


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int = 1
    length: int = 140
    group: int = 4
    expert: int = 2
    k: int = 1
    head_dim: int = 64
    routed: bool = True
    shared: bool = True
    means: bool = True
    norm: bool = False
    biased: bool = False
    rows_of_angles: int = 1
    chunks: int = 1
    dtype: str = "float32"

    def __str__(self):
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return "-".join(f"{f.name}={getattr(self, f.name)}" for f in changed) or "default"


CASES = (
    Case(),
    Case(batch=2, rows_of_angles=2, length=260, k=2),
    Case(group=2, expert=3, k=2, biased=True),
    Case(head_dim=128, group=3, norm=True),
    Case(group=4, norm=True, means=False),
    Case(head_dim=128, group=4, expert=4, k=3, chunks=2),
    Case(expert=4, k=2, chunks=2, biased=True),
    Case(head_dim=256, group=1, shared=False, means=False),
    Case(routed=False, shared=False, means=False),
    Case(dtype="bfloat16", k=2),
)


def every_other(cases):
    """All cases, of which the default run has every other one."""
    return [
        pytest.param(case, marks=pytest.mark.slow) if number % 2 else case
        for number, case in enumerate(cases)
    ]


def make(case: Case) -> tuple[jax.Array, Projection]:
    rng, embed = np.random.default_rng(0), 128

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(embed), case.dtype)

    angle = rng.uniform(0, 6, (case.rows_of_angles, case.length, case.head_dim // 2))
    scales = [jnp.asarray(rng.uniform(0.5, 1.5, case.head_dim), jnp.float32) for _ in range(2)]
    router = draw(embed, case.group, case.expert).astype(jnp.float32)
    bias = jnp.asarray(rng.normal(size=(case.group, case.expert)), jnp.float32)
    projection = Projection(
        draw(embed, case.group, case.expert, case.head_dim),
        draw(embed, case.group, case.head_dim),
        draw(embed, case.group, case.head_dim),
        # The bits beyond bfloat16 count.
        router * (1 + jnp.float32(2**-10)) if case.routed else None,
        draw(embed, case.head_dim) if case.shared else None,
        jnp.asarray(np.cos(angle), jnp.float32),
        jnp.asarray(np.sin(angle), jnp.float32),
        bias if case.biased else None,
        *(scales if case.norm else (None, None)),
        top_k=case.k,
        means=case.means,
    )
    return jnp.asarray(rng.normal(size=(case.batch, case.length, embed)), case.dtype), projection


def oracle(xp: types.ModuleType, case: Case, index, x, weights) -> dict:
    """Head by head; `weights` are those of `WEIGHTS`, then the cosines and sines."""
    query, key, value, router, shared_query, query_scale, key_scale, cos, sin = weights

    def head(weight, scale):
        y = x @ weight
        if scale is not None:
            y = y / xp.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * scale
        a, b = y[..., : case.head_dim // 2], y[..., case.head_dim // 2 :]
        return xp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    groups, out = range(case.group), {}
    keys = [head(key[:, g], key_scale) for g in groups]
    values = [x @ value[:, g] for g in groups]
    queries = []
    for g in groups:
        of_group = [head(query[:, g, m], query_scale) for m in range(case.expert)]
        ranks = range(case.k) if case.routed else range(case.expert)
        for j in ranks:
            chosen = of_group[j] if not case.routed else 0.0
            for m in range(case.expert if case.routed else 0):
                chosen = chosen + xp.where(index[:, :, g, j, None] == m, of_group[m], 0.0)
            queries.append(chosen)
    shape = (case.batch, case.length, case.group, -1, case.head_dim)
    out["query"] = xp.stack(queries, 2).reshape(shape)
    out["key"], out["value"] = xp.stack(keys, 2), xp.stack(values, 2)
    if case.shared:
        out["shared_query"] = head(shared_query, query_scale)
    if case.means:
        out["shared_key"], out["shared_value"] = sum(keys) / case.group, sum(values) / case.group
    if case.routed:
        out["logits"] = xp.stack([x @ router[:, g] for g in groups], 2)
    return out


def in_float64(xp, case, index, x, projection) -> dict:
    names = (*WEIGHTS, "cos", "sin")
    wide = [None if (w := getattr(projection, n)) is None else xp.asarray(w, float) for n in names]
    return oracle(xp, case, index, xp.asarray(x, float), wide)


def outputs(projected) -> dict:
    found = {name: getattr(projected.routed, name) for name in FIELDS}
    found["logits"] = projected.logits
    return {name: array for name, array in found.items() if array is not None}


def assert_near(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        wanted = np.asarray(theirs[name], np.float64)
        error = np.abs(np.asarray(array, np.float64) - wanted).max() / np.abs(wanted).max()
        exact = name in ("logits", "router")  # float32 in a bfloat16 layer, too
        assert error < (3e-6 if exact else tolerance), (name, error)


def check(case: Case, forward, backward) -> None:
    """Compares the projection and the gradient of a random linear function of its outputs."""
    x, projection = make(case)
    tolerance = 3e-6 if case.dtype == "float32" else 0.01
    projected = forward(x, projection)
    index = projected.expert_index
    theirs = in_float64(np, case, None if index is None else np.asarray(index), x, projection)
    if case.routed:
        bias = 0.0 if projection.selection_bias is None else np.float64(projection.selection_bias)
        order = np.argsort(-(theirs["logits"] + bias), axis=-1, kind="stable")
        np.testing.assert_array_equal(index, order[..., : case.k])
    ours = outputs(projected)
    assert_near(ours, theirs, tolerance)
    rng = np.random.default_rng(1)
    cotangents = {n: jnp.asarray(rng.normal(size=y.shape), y.dtype) for n, y in ours.items()}
    d_x, d_projection = backward(x, projection, projected, cotangents)
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(np.asarray(c, np.float64)) for n, c in cotangents.items()}

        def total(x, weights):
            full = dataclasses.replace(projection, **weights)
            found = in_float64(jnp, case, index, x, full)
            return sum((found[n] * wide[n]).sum() for n in found)

        given = {n: w for n in WEIGHTS if (w := getattr(projection, n)) is not None}
        given = {n: jnp.asarray(np.asarray(w, np.float64)) for n, w in given.items()}
        of_x, of_weights = jax.grad(total, (0, 1))(jnp.asarray(np.asarray(x, np.float64)), given)
    gradients = {n: getattr(d_projection, n) for n in of_weights}
    if case.biased:
        assert not np.any(d_projection.selection_bias)
    assert_near({"x": d_x} | gradients, {"x": of_x} | of_weights, tolerance)


def with_cotangents(projected, cotangents):
    names = [name for name in FIELDS if name in cotangents]
    routed = dataclasses.replace(projected.routed, **{n: cotangents[n] for n in names})
    return routed, cotangents.get("logits")


FLOAT16 = pytest.param(Case(dtype="float16", expert=3, k=2), marks=pytest.mark.slow)


@pytest.mark.parametrize("case", [*every_other(CASES), FLOAT16], ids=str)
def test_the_plain_projection(case):
    def backward(x, projection, projected, cotangents):
        def of(x, projection):
            found = project(x, projection)
            return found.routed, found.logits

        return jax.vjp(of, x, projection)[1](with_cotangents(projected, cotangents))

    check(case, project, backward)


@pytest.mark.parametrize("norm", [False, True])
def test_plain_products_are_in_the_dtype_of_the_tokens_and_few(norm):
    """Forward one of each weight; backward one for the tokens and one for all weights."""

    def both(x, projection):
        projected = reference(x, projection)
        routed, logits = projected.routed, projected.logits
        return projected, gradients(x, projection, projected.expert_index, routed, logits)

    lowered = jax.jit(both).lower(*make(Case(dtype="bfloat16", norm=norm)))
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    operands = [line.split(":")[-1].split("->")[0] for line in products]
    assert all(of.count("xbf16>") == 2 for of in operands), operands
    compiled = lowered.compile().as_text()  # without what nothing reads, and nothing twice
    assert compiled.count(" dot(") == 5 + 2, compiled.count(" dot(")


@pytest.mark.wrong_types
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("case", every_other(c for c in CASES if not c.norm), ids=str)
def test_the_kernels(case):
    forward = functools.partial(kernels.forward, blocks=kernels.Blocks(128, case.chunks, 2**25))

    def backward(x, projection, projected, cotangents):
        given = with_cotangents(projected, cotangents)
        return kernels.backward(x, projection, projected.expert_index, *given)

    check(case, forward, backward)


@pytest.mark.wrong_types
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("case", [case for case in CASES if case.norm], ids=str)
def test_the_kernel_norms(case):
    x, projection = make(case)
    ours = kernels.forward(x, projection)
    assert_near(outputs(ours), outputs(reference(x, projection)), 3e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_the_gradients_are_those_that_jax_derives(dtype):
    """Of `reference`; also without tokens."""
    x, projection = make(Case(dtype=dtype, k=2, expert=3))
    for tokens in (x, x[:0]):

        def outputs(x, projection):
            projected = reference(x, projection)
            return projected.routed, projected.logits

        made, pullback = jax.vjp(outputs, tokens, projection)
        index = reference(tokens, projection).expert_index
        ours, theirs = gradients(tokens, projection, index, *made), pullback(made)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert a.dtype == b.dtype
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            error = np.abs(a - b).max(initial=0) / np.abs(b).max(initial=1e-9)
            assert error < (0.02 if dtype == "bfloat16" else 3e-6)


def test_derivatives_that_are_missing_are_named():
    x, projection = make(Case())
    values = lambda x: jnp.sum(project(x, projection).routed.query ** 2)  # noqa: E731
    for function in (values, jax.grad(values)):
        with pytest.raises(NotImplementedError, match=r"implementation=None has.*'reference' has"):
            jax.jit(lambda x, f=function: jax.jvp(f, (x,), (x,)))(x)
    logits, pullback = jax.vjp(lambda x: project(x, projection).logits, x)
    with pytest.raises(NotImplementedError, match="derivative of its gradient"):
        jax.vjp(pullback, logits)


@pytest.mark.wrong_types
@pytest.mark.usefixtures("interpreter")
def test_ties_go_to_the_lower_index():
    x, projection = make(Case(expert=4, k=2))
    projection = dataclasses.replace(projection, router=jnp.zeros_like(projection.router))
    for found in (kernels.forward(x, projection), reference(x, projection)):
        np.testing.assert_array_equal(found.expert_index[0, 0], [[0, 1]] * 4)


@pytest.mark.wrong_types  # shapes stand for arrays
@pytest.mark.parametrize(
    ("case", "embed", "message"),
    [
        (Case(dtype="float16"), 128, "x: dtype float16"),
        (Case(group=3), 128, "projection: 3 groups of head_dim 64"),
        (Case(head_dim=96), 128, "head_dim 96"),
        (Case(), 100, "x: embed 100"),
        (Case(group=64, k=3, expert=4), 128, "projection: top_k 3 of 64 groups"),
    ],
)
def test_what_the_kernels_cannot_take_is_named(case, embed, message):
    def arrays():
        x, projection = make(case)
        cut = {n: getattr(projection, n)[:embed] for n in ("query", "key", "value")}
        return x[..., :embed], dataclasses.replace(projection, **cut)

    assert message in str(kernels.unsupported(*jax.eval_shape(arrays)))


@pytest.mark.wrong_types
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize(
    ("embed", "group", "expert", "head_dim"), [(1024, 8, 2, 64), (4096, 8, 4, 128)]
)
def test_default_blocks_divide_the_weights_where_they_must(chip, embed, group, expert, head_dim):
    shape = jax.ShapeDtypeStruct
    x = shape((1, 2048, embed), jnp.bfloat16)
    key = shape((embed, group, head_dim), jnp.bfloat16)
    projection = Projection(
        shape((embed, group, expert, head_dim), jnp.bfloat16),
        *(key, key, shape((embed, group, expert), jnp.float32)),
        shape((embed, head_dim), jnp.bfloat16),
        *[shape((1, 2048, head_dim // 2), jnp.float32)] * 2,
    )
    blocks = kernels.default_blocks(projection, x, chip)
    assert (blocks.chunks > 1) == (embed == 4096 and chip in ("v5p", "tpu7x"))  # 64 MiB
    assert blocks.vmem_bytes < {"v5e": 128, "v5p": 64, "v6e": 128, "tpu7x": 64}[chip] * 2**20
