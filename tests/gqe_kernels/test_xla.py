"""The linear-memory implementation keeps the contract, at any block size, and its memory bound."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqe_kernels import dense_attention, routed_attention, xla
from tests.gqe_kernels.contract import (
    Case,
    DenseAttentionContract,
    RoutedAttentionContract,
    assert_close,
    make_inputs,
)


class TestXla(RoutedAttentionContract):
    implementation = "xla"
    by_default = slice(1, None, 2)  # the reference has the others


class TestDenseXla(DenseAttentionContract):
    implementation = "xla"


@pytest.mark.parametrize("blocks", [(1, 1), (4, 8), (7, 5)])
@pytest.mark.parametrize(
    "case",
    [
        Case(q_len=23),
        Case(q_len=23, segments="packed"),
        Case(q_len=11, kv_len=29, q_offset=(5, 18)),
        Case(q_len=11, kv_len=29, q_offset=-3),
        Case(q_len=23, causal=False),
    ],
    ids=lambda case: case.name,
)
def test_block_sizes_do_not_change_values_or_gradients(case, blocks):
    arrays, masking = make_inputs(case)
    masking["scale"] = 0.3
    values = tuple(jnp.float32(arrays[name]) for name in ("query", "key", "value"))
    slots = arrays["query"].reshape(*arrays["query"].shape[:2], -1, case.head_dim)
    cotangent = np.random.default_rng(2).standard_normal(slots.shape)

    def both(implementation):
        def call(*values):
            return dense_attention(*values, **masking, implementation=implementation)

        out, pullback = jax.vjp(call, *values)
        return out, *pullback(jnp.float32(cotangent))

    small = functools.partial(xla.attention, blocks=xla.XlaBlocks(*blocks))
    for name, actual, expected in zip(
        ("out", "query", "key", "value"), both(small), both("reference"), strict=True
    ):
        assert_close(actual, expected, 2e-5, name)


def peak_bytes(implementation: str, length: int) -> int:
    """Temporary memory of forward and backward at the main setting, one layer."""
    shapes = {
        "query": (1, length, 8, 2, 64),
        "key": (1, length, 8, 64),
        "value": (1, length, 8, 64),
        "slot_weight": (1, length, 8, 1),
        "shared_query": (1, length, 64),
    }
    arguments = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    index = jax.ShapeDtypeStruct((1, length, 8, 1), "int32")

    def loss(arguments, index):
        slots = routed_attention(expert_index=index, implementation=implementation, **arguments)
        return jnp.sum(slots)

    compiled = jax.jit(jax.grad(loss)).lower(arguments, index).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_at_8192_tokens_is_below_a_quarter_of_the_reference():
    assert peak_bytes("xla", 8192) < peak_bytes("reference", 8192) / 4


def test_memory_grows_linearly_with_the_length():
    short, long = peak_bytes("xla", 8192), peak_bytes("xla", 32768)
    assert long < 4.2 * short
