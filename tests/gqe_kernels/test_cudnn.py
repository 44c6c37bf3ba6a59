"""Attention by cuDNN, on a GPU; what is around its calls, anywhere."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

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
                Routed(query, key, key), Mask(None, *ids), 1.0, gpus=1
            )
    chosen = found.get("cuda", found["default"])
    assert chosen is api.get_attention(implementation)
    assert [record.message for record in caplog.records] == [
        "attention on a GPU uses 'xla', for 'pallas_gpu' does not take query: head_dim 32, where "
        "64 or 128 is needed; 'cudnn' does not take q_segment_ids: only as a quadratic mask"
    ] * (implementation == "xla")


def on_gpus(gpus: int, segments=None):
    """What `None` runs on so many GPUs, or None for "xla"."""
    query = jnp.ones((1, 24, 1, 2, 64), jnp.bfloat16)
    routed = Routed(query, query[..., 0, :], query[..., 0, :])
    mask = Mask(None, segments, segments)
    return api.attention_by_platform(routed, mask, 1.0, gpus=gpus).get("cuda")


def test_xla_partitions_cudnn_and_not_the_kernel():
    kernel, whole = api.get_attention("pallas_gpu"), jnp.ones((1, 24), jnp.int32)
    assert on_gpus(1) is kernel
    assert on_gpus(2) is cudnn.attention
    assert on_gpus(2, segments=whole) is None
    mesh = jax.make_mesh((2, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        assert on_gpus(2) is cudnn.attention
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))):
        assert on_gpus(2) is kernel


@pytest.mark.parametrize(
    ("axes", "check_vma", "varies", "implementation"),
    [
        ({"data", "model"}, False, "query", "pallas_gpu"),
        ({"data", "model"}, True, "query", "cudnn"),
        ({"data", "model"}, True, "segments", None),
        ({"data", "model"}, True, "nothing", "pallas_gpu"),
        ({"data"}, False, "query", "cudnn"),  # XLA may partition over the other axis
    ],
)
def test_the_implementation_on_gpus_inside_a_shard_map(axes, check_vma, varies, implementation):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    found = []

    def local(shard):
        query, segments = jnp.ones((1, 24, 1, 2, 64), jnp.bfloat16), None
        if varies == "query":
            query *= shard[0].astype(query.dtype)
        elif varies == "segments":
            segments = jnp.ones((1, 24), jnp.int32) * shard[0]
        key = jnp.ones((1, 24, 1, 64), jnp.bfloat16)
        routed, mask = Routed(query, key, key), Mask(None, segments, segments)
        found.append(api.attention_by_platform(routed, mask, 1.0, gpus=4).get("cuda"))
        return shard

    spec = PartitionSpec("data")
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=axes, check_vma=check_vma
    )
    jax.eval_shape(jax.jit(mapped), jnp.ones(2, jnp.int32))
    assert found == [implementation and api.get_attention(implementation)]


def test_operands_that_vary_are_named():
    def local(query):
        return dense_attention(query, *[query[..., 0, :]] * 2, implementation="pallas_gpu")

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    with pytest.raises(NotImplementedError, match="operands that vary over mesh axes"):
        jax.eval_shape(
            jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec),
            jnp.ones((2, 24, 1, 2, 64), jnp.bfloat16),
        )


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
