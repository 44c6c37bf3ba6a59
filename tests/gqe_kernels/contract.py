"""What every implementation of `routed_attention` must do: subclass it and name one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqe_kernels import (
    Implementation,
    Mask,
    Routed,
    dense_attention,
    get_attention,
    routed_attention,
)
from tests import oracle


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the contract."""

    batch: int = 2
    q_len: int = 24
    kv_len: int | None = None
    group: int = 2
    expert: int = 2
    k: int = 1
    head_dim: int = 8
    weighted: bool = True
    shared: str | None = "mean"  # None, mean or given
    causal: bool = True
    segments: str | None = None  # None, packed, padded or all_padding
    q_offset: int | tuple[int, ...] | tuple[tuple[int, ...], ...] = 0
    routing: str = "random"  # random or one
    scale: float | None = None

    @property
    def name(self) -> str:
        default = Case()
        fields = dataclasses.fields(self)
        changed = {f.name: getattr(self, f.name) for f in fields}
        parts = [f"{n}={v}" for n, v in changed.items() if v != getattr(default, n)]
        return ",".join(parts) or "default"


CASES = [
    Case(),
    Case(k=2),
    Case(expert=4, k=1),
    Case(expert=4, k=2),
    Case(expert=4, k=3, segments="packed"),
    Case(group=3, expert=1, k=1),
    Case(group=1, expert=16, k=1),
    Case(weighted=False),
    Case(shared=None),
    Case(shared=None, weighted=False),
    Case(shared="given", segments="packed"),
    Case(causal=False),
    Case(causal=False, kv_len=37, shared="given"),
    Case(segments="packed"),
    Case(segments="padded"),
    Case(segments="all_padding"),
    Case(causal=False, segments="packed"),
    Case(q_len=9, kv_len=24, q_offset=15),
    Case(q_len=1, kv_len=24, q_offset=11),
    Case(q_len=5, kv_len=24, q_offset=(3, 19), segments="padded"),
    Case(q_len=8, kv_len=24, q_offset=-4),
    Case(q_len=8, kv_len=24, q_offset=((2, 17), (4, 12)), segments="packed"),
    Case(routing="one"),
    Case(scale=0.5, batch=1),
    Case(q_len=1),
    Case(batch=1, q_len=600, group=1, segments="packed"),
    Case(batch=1, q_len=530, group=2, expert=2, head_dim=16),
    Case(batch=1, q_len=130, kv_len=700, q_offset=513, group=1),
]

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}  # of the largest entry

DENSE_CASES = tuple(
    case
    for case in CASES
    if case.k == 1 and case.shared == "mean" and case.weighted and case.routing == "random"
)[::2]

DIFFERENTIABLE = (
    "query", "key", "value", "slot_weight", "shared_query", "shared_key", "shared_value",
)  # fmt: skip


def make_inputs(case: Case, seed: int = 0) -> tuple[dict, dict]:
    """Float64 arrays by argument name, and the masking arguments."""
    rng = np.random.default_rng(seed)
    kv_len = case.q_len if case.kv_len is None else case.kv_len
    normal = lambda *shape: rng.standard_normal(shape)  # noqa: E731
    arrays = {
        "query": normal(case.batch, case.q_len, case.group, case.expert, case.head_dim),
        "key": normal(case.batch, kv_len, case.group, case.head_dim),
        "value": normal(case.batch, kv_len, case.group, case.head_dim),
    }
    routes = rng.random((case.batch, case.q_len, case.group, case.expert)).argsort(axis=-1)
    index = routes[..., : case.k].astype(np.int32)
    if case.routing == "one":
        index = np.full_like(index, case.expert - 1)
    arrays["expert_index"] = index
    if case.weighted:
        arrays["slot_weight"] = rng.random(index.shape)
    if case.shared is not None:
        arrays["shared_query"] = normal(case.batch, case.q_len, case.head_dim)
    if case.shared == "given":
        arrays["shared_key"] = normal(case.batch, kv_len, case.head_dim)
        arrays["shared_value"] = normal(case.batch, kv_len, case.head_dim)
    masking = {"causal": case.causal, "q_offset": case.q_offset, "scale": case.scale}
    if isinstance(case.q_offset, tuple):
        masking["q_offset"] = np.array(case.q_offset[: case.batch], np.int32)
    if case.segments is not None:
        q_segments = _segments(rng, case.segments, case.batch, case.q_len)
        same = kv_len == case.q_len
        kv_segments = q_segments if same else np.ones((case.batch, kv_len), np.int32)
        if np.ndim(masking["q_offset"]) == 2:  # a part of the keys' own sequence
            kv_segments = _segments(rng, case.segments, case.batch, kv_len)
            position = oracle.query_positions(case.batch, case.q_len, masking["q_offset"])
            q_segments = np.take_along_axis(kv_segments, position, axis=1)
        masking |= {"q_segment_ids": q_segments, "kv_segment_ids": kv_segments}
    return arrays, masking


def as_arguments(arrays: dict, dtype) -> dict:
    """The arrays of `make_inputs` in this dtype, indices as they are."""
    return {n: jnp.asarray(a, a.dtype if n == "expert_index" else dtype) for n, a in arrays.items()}


def _segments(rng, kind: str, batch: int, length: int) -> np.ndarray:
    ids = np.ones((batch, length), np.int32)
    if kind == "packed":  # documents of random lengths, with padding behind the last
        for row in ids:
            cuts = np.sort(rng.choice(np.arange(1, length), 3, replace=False))
            row[:] = 1 + np.searchsorted(cuts, np.arange(length), side="right")
            row[cuts[-1] + (length - cuts[-1]) // 2 :] = 0
    elif kind == "padded":
        for row, real in zip(ids, rng.integers(1, length, batch), strict=True):
            row[real:] = 0
    else:
        ids[0] = 0
    return ids


def assert_close(actual, expected, tolerance: float, name: str) -> None:
    """Within `tolerance` of the expected array's largest entry, or of 0.1 if that is larger."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, name
    assert np.isfinite(actual).all(), name
    bound = tolerance * max(np.abs(expected).max(initial=0.0), 0.1)
    worst = np.abs(actual - expected).max(initial=0.0)
    assert worst <= bound, f"{name}: off by {worst:.2e}, allowed {bound:.2e}"


class RoutedAttentionContract:
    """Forward and all gradients against the float64 oracle.

    An implementation that cannot take the cases' shapes (head_dim 8) names its own, which must
    cover the same arguments.
    """

    implementation: Implementation
    dtype = jnp.float32  # of the tests that compare with no oracle
    base = Case()
    float32_cases = CASES
    by_default = slice(None)  # of the float32 cases, those that are not slow
    bfloat16_cases: tuple[Case, ...] = (
        Case(),
        Case(expert=4, k=2, segments="packed"),
        Case(batch=1, q_len=600, group=1),
    )

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            dtype = metafunc.function.__name__.removeprefix("test_")
            cases = getattr(self, f"{dtype}_cases")
            default = cases[self.by_default] if dtype == "float32" else cases
            marked = [
                case if case in default else pytest.param(case, marks=pytest.mark.slow)
                for case in cases
            ]
            metafunc.parametrize("case", marked, ids=lambda case: case.name)

    def call(self, *args, **kwargs):
        return routed_attention(*args, implementation=self.implementation, **kwargs)

    def check(self, case: Case, dtype: str) -> None:
        arrays, masking = make_inputs(case)
        tolerance = TOLERANCE[dtype]
        rounded = {}
        for name, array in arrays.items():
            keep = name == "expert_index"
            rounded[name] = array if keep else np.asarray(jnp.asarray(array, dtype), np.float64)
        expected = oracle.routed_attention(np, **rounded, **masking)
        cotangent = np.random.default_rng(1).standard_normal(expected.shape)
        cotangent = np.asarray(jnp.asarray(cotangent, dtype), np.float64)

        names = [name for name in DIFFERENTIABLE if name in arrays]
        index = rounded["expert_index"]

        def objective(xp, *values):
            given = dict(zip(names, values, strict=True))
            slots = oracle.routed_attention(xp, expert_index=index, **given, **masking)
            return xp.sum(slots * cotangent)

        expected_grads = oracle.gradients(objective, tuple(rounded[name] for name in names))

        @jax.jit
        def value_and_gradients(given):
            def slots_of(given):
                return self.call(expert_index=jnp.asarray(index), **given, **masking)

            slots, pullback = jax.vjp(slots_of, given)
            return slots, pullback(jnp.asarray(cotangent, slots.dtype))[0]

        slots, grads = value_and_gradients({n: jnp.asarray(arrays[n], dtype) for n in names})
        assert slots.dtype == dtype
        assert_close(slots, expected, tolerance, "slots")
        for name, grad in zip(names, expected_grads, strict=True):
            assert grads[name].dtype == dtype, name
            assert_close(grads[name], grad, tolerance, f"gradient of {name}")

    def test_float32(self, case):
        self.check(case, "float32")

    def test_bfloat16(self, case):
        self.check(case, "bfloat16")

    def test_tied_probabilities_route_to_the_lower_index(self):
        arrays, masking = make_inputs(self.base)
        arrays = as_arguments(arrays, self.dtype)
        arrays["expert_index"] = jnp.zeros_like(arrays["expert_index"])
        other = arrays | {"query": arrays["query"].at[:, :, :, 1].set(jnp.nan)}
        first, second = (self.call(**given, **masking) for given in (arrays, other))
        np.testing.assert_array_equal(first, second)

    def test_no_field_of_the_mask_is_ignored(self):
        """Each changes the slots, or is refused."""
        arrays, _ = make_inputs(dataclasses.replace(self.base, q_len=24))
        routed = Routed(**as_arguments(arrays, self.dtype))
        ids = jnp.asarray(np.arange(24) // 8 + 1, jnp.int32)[None].repeat(len(routed.query), axis=0)
        segments = {"q_segment_ids": ids, "kv_segment_ids": ids}
        changes = {
            "offset": {"offset": jnp.full((len(ids), 1), 4, jnp.int32)},
            "q_segment_ids": segments,
            "kv_segment_ids": segments | {"q_segment_ids": jnp.ones_like(ids)},
            "causal": {"causal": False},
            "start": {"start": 4},
        }
        attention = get_attention(self.implementation)
        plain = attention(routed, Mask(), 1.0)
        assert changes.keys() == {field.name for field in dataclasses.fields(Mask)}
        for field, change in changes.items():
            try:
                changed = attention(routed, Mask(**change), 1.0)
            except NotImplementedError:
                continue
            same = np.allclose(plain.astype(jnp.float32), changed.astype(jnp.float32), atol=0.1)
            assert not same, field

    def test_padding_gets_zero_rows_and_gives_no_gradient(self):
        arrays, masking = make_inputs(dataclasses.replace(self.base, segments="padded"))
        given = {n: self.dtype(a) for n, a in arrays.items() if n != "expert_index"}
        padding = masking["q_segment_ids"] == 0
        assert padding.any()
        index = jnp.asarray(arrays["expert_index"])
        slots, pullback = jax.vjp(lambda g: self.call(expert_index=index, **g, **masking), given)
        assert not np.asarray(slots)[padding].any()
        for name, grad in pullback(jnp.ones_like(slots))[0].items():
            assert not np.asarray(grad)[padding].any(), name


class DenseAttentionContract:
    """The dense baseline against the float64 oracle."""

    implementation: Implementation | None
    cases: tuple[Case, ...] = DENSE_CASES
    dtype = jnp.float32

    def pytest_generate_tests(self, metafunc):
        metafunc.parametrize("case", self.cases, ids=lambda case: case.name)

    def test_values_and_gradients(self, case):
        arrays, masking = make_inputs(case)
        given = tuple(jnp.asarray(arrays[name], self.dtype) for name in ("query", "key", "value"))
        values = tuple(np.asarray(x, np.float64) for x in given)  # as they are rounded
        tolerance = TOLERANCE[jnp.dtype(self.dtype).name]
        expected = oracle.dense_attention(np, *values, **masking)
        cotangent = np.random.default_rng(1).standard_normal(expected.shape)

        def objective(xp, *values):
            return xp.sum(oracle.dense_attention(xp, *values, **masking) * cotangent)

        expected_grads = oracle.gradients(objective, values)

        @jax.jit
        def value_and_gradients(values):
            slots, pullback = jax.vjp(
                lambda v: dense_attention(*v, implementation=self.implementation, **masking), values
            )
            return slots, pullback(jnp.asarray(cotangent, slots.dtype))[0]

        slots, grads = value_and_gradients(given)
        assert_close(slots, expected, tolerance, "slots")
        for name, actual, grad in zip("qkv", grads, expected_grads, strict=True):
            assert_close(actual, grad, tolerance, f"gradient of {name}")
