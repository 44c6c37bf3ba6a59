"""Attention by cuDNN, on a GPU; what is around its calls, anywhere."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gqe_kernels import Mask, Routed, api, cudnn, dense_attention, routed_attention
from tests.gqe_kernels.contract import (
    CASES,
    TOLERANCE,
    Case,
    RoutedAttentionContract,
    as_arguments,
    assert_close,
    make_inputs,
)

TAKEN = tuple(
    dataclasses.replace(case, head_dim=64)
    for case in CASES
    if case.segments is None and case.q_offset == 0
)
FEW = (
    Case(head_dim=64, expert=4, k=2),
    Case(head_dim=64, shared=None, scale=0.5),
    Case(head_dim=64, causal=False, kv_len=37, shared="given"),
    Case(head_dim=64, q_len=23, kv_len=23),
    Case(head_dim=64, q_len=23, kv_len=9),
)


class CudnnContract(RoutedAttentionContract):
    implementation = "cudnn"
    dtype = jnp.bfloat16
    base = Case(head_dim=64)
    float32_cases = ()
    bfloat16_cases = tuple(dict.fromkeys((*TAKEN, *FEW)))

    def test_padding_gets_zero_rows_and_gives_no_gradient(self):
        pytest.skip("cuDNN is not called with segments")


@pytest.mark.gpu
class TestOnTheChip(CudnnContract):
    pass


class TestWithoutAGpu(CudnnContract):
    implementation = functools.partial(cudnn.attention, backend="xla")
    bfloat16_cases = FEW


@pytest.mark.parametrize(
    ("head_dim", "kv_len", "segments", "implementation"),
    [
        (64, 24, False, "pallas_gpu"),
        (128, 32_768, False, "pallas_gpu"),
        (64, 32_769, False, "cudnn"),
        (64, 32_769, True, "pallas_gpu"),
        (32, 24, False, "cudnn"),
        (32, 24, True, "xla"),
    ],
)
def test_the_implementation_on_a_gpu(caplog, head_dim, kv_len, segments, implementation):
    api._warn_once.cache_clear()
    query = jnp.ones((1, 24, 1, 2, head_dim), jnp.bfloat16)
    key = jnp.ones((1, kv_len, 1, head_dim), jnp.bfloat16)
    ids = (jnp.ones((1, 24), jnp.int32), jnp.ones((1, kv_len), jnp.int32)) if segments else ()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = api.attention_by_platform(
                Routed(query, key, key), Mask(None, *ids), 1.0, has_gpu=True
            )
    chosen = found.get("cuda", found["default"])
    assert chosen is api.get_attention(implementation)
    assert [record.message for record in caplog.records] == [
        "attention on a GPU uses 'xla', for 'pallas_gpu' does not take query: head_dim 32, where "
        "64 or 128 is needed; 'cudnn' does not take q_segment_ids: only as a quadratic mask"
    ] * (implementation == "xla")


@pytest.mark.parametrize(
    ("varies", "check_vma", "implementation"),
    [
        ("nothing", True, "pallas_gpu"),
        ("query", True, "cudnn"),
        ("query", False, "pallas_gpu"),
        ("segments", True, None),
        ("segments", False, "pallas_gpu"),
    ],
)
def test_on_a_gpu_operands_that_vary_over_a_mesh(varies, check_vma, implementation):
    query, key = jnp.ones((2, 24, 1, 2, 64), jnp.bfloat16), jnp.ones((2, 24, 1, 64), jnp.bfloat16)
    ids = (jnp.ones((2, 24), jnp.int32),) * 2 if varies == "segments" else ()
    chosen = []

    def local(query, ids):
        routed, mask = Routed(query, key[: len(query)], key[: len(query)]), Mask(None, *ids)
        found = api.attention_by_platform(routed, mask, 1.0, has_gpu=True).get("cuda")
        chosen.append(found)
        if found is not api.get_attention("pallas_gpu"):
            with pytest.raises(NotImplementedError, match="vary over mesh axes"):
                api.get_attention("pallas_gpu")(routed, mask, 1.0)
        return jnp.zeros(())

    split = {name: PartitionSpec("data") for name in (varies,)}
    specs = split.get("query", PartitionSpec()), split.get("segments", PartitionSpec())
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=check_vma
    )
    if varies == "segments":  # whole queries beside a shard of the segments do not fit
        query = query[:1]
    jax.eval_shape(mapped, query, ids)
    expected = None if implementation is None else api.get_attention(implementation)
    assert chosen == [expected]


@pytest.mark.parametrize(
    ("dtype", "changes", "reason"),
    [
        ("float32", {}, "query: dtype float32, where bfloat16 or float16"),
        ("bfloat16", {"head_dim": 136}, "query: head_dim 136, where a multiple of 8 up to 128"),
        ("bfloat16", {"segments": "packed"}, "q_segment_ids: only as a quadratic mask"),
        ("bfloat16", {"q_len": 9, "kv_len": 24, "q_offset": 15}, "q_offset: only 0"),
    ],
)
def test_what_cudnn_cannot_take_is_named(dtype, changes, reason):
    arrays, masking = make_inputs(Case(**({"head_dim": 64} | changes)))
    arrays = as_arguments(arrays, dtype)
    with pytest.raises(NotImplementedError, match=reason):
        routed_attention(**arrays, **masking, implementation="cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_cudnn_equals_the_reference(head_dim, causal):
    arrays, _ = make_inputs(Case(q_len=192, group=4, head_dim=head_dim))
    values = tuple(jnp.bfloat16(arrays[name]) for name in ("query", "key", "value"))
    cotangent = np.random.default_rng(1).standard_normal((2, 192, 8, head_dim))

    def both(implementation, dtype):
        def slots_of(values):
            return dense_attention(*values, causal=causal, implementation=implementation)

        slots, pullback = jax.vjp(jax.jit(slots_of), tuple(x.astype(dtype) for x in values))
        return slots, *pullback(jnp.asarray(cotangent, dtype))[0]

    names = ("slots", "query", "key", "value")
    actual, expected = both("cudnn", jnp.bfloat16), both("reference", jnp.float32)
    for name, a, b in zip(names, actual, expected, strict=True):
        assert_close(a.astype(jnp.float32), b, TOLERANCE["bfloat16"], name)


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "kernel"), [(64, "gqe_forward"), (32, "cudnn")])
def test_the_default_on_a_gpu_is_lowered(head_dim, kernel):
    shapes = [(1, 128, 2, 2, head_dim), (1, 128, 2, head_dim), (1, 128, 2, head_dim)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    assert kernel in jax.jit(dense_attention).lower(*arguments).as_text()
