"""The edges of the contract, treated in one place for every implementation."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqe_kernels import ImplementationName, routed_attention
from tests.gqe_kernels.contract import Case, as_arguments, make_inputs

PLAIN = pytest.mark.parametrize("implementation", ["reference", "xla", "decode"])
KEYS = ("key", "value", "shared_key", "shared_value")


@PLAIN
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("case", [Case(segments="padded"), Case(q_offset=-5, shared="given")])
def test_what_no_query_sees_reaches_nothing(implementation, case, bad):
    """Neither values nor gradients change if NaN or infinity stands there."""
    arrays, masking = make_inputs(case)
    index = jnp.asarray(arrays.pop("expert_index"))
    if case.segments:
        unseen = dict.fromkeys(arrays, masking["q_segment_ids"] == 0)
    else:
        later = np.arange(case.q_len) > case.q_len - 6
        unseen = {name: later & (name in KEYS) for name in arrays}
    cotangent = np.random.default_rng(1).standard_normal((case.batch, case.q_len, 1, 1))

    @jax.jit
    def slots_and_gradients(given):
        def total(given):
            slots = routed_attention(
                expert_index=index, **given, **masking, implementation=implementation
            )
            return jnp.sum(slots * cotangent), slots

        return jax.grad(total, has_aux=True)(given)

    def with_unseen(value):
        given = {name: array.astype(np.float32) for name, array in arrays.items()}
        for name, array in given.items():
            array[np.broadcast_to(unseen[name], array.shape[:2])] = value
        return slots_and_gradients(given)

    clean, dirty = with_unseen(0.0), with_unseen(bad)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert all(np.asarray(x).any() for x in jax.tree.leaves(dirty))


@pytest.mark.parametrize("implementation", [None, *get_args(ImplementationName)])
@pytest.mark.parametrize("of", ["batch", "length"])
def test_no_rows_and_no_queries_give_an_empty_array(implementation, of):
    arrays, masking = make_inputs(Case(head_dim=64))
    given = as_arguments(arrays, jnp.bfloat16)
    for name, x in given.items():
        if of == "batch":
            given[name] = x[:0]
        elif name not in KEYS:
            given[name] = x[:, :0]
    slots = jax.jit(lambda g: routed_attention(**g, **masking, implementation=implementation))(
        given
    )
    assert slots.shape == ((0, 24, 4, 64) if of == "batch" else (2, 0, 4, 64))
    assert slots.dtype == jnp.bfloat16


@pytest.mark.parametrize("implementation", [None, *get_args(ImplementationName)])
def test_queries_without_keys_have_slots_and_gradients_of_zero(implementation):
    arrays, masking = make_inputs(Case(head_dim=64, causal=False))
    given = as_arguments(arrays, jnp.bfloat16)
    given |= {name: x[:, :0] for name, x in given.items() if name in KEYS}
    call = lambda query: routed_attention(  # noqa: E731
        **given | {"query": query}, **masking, implementation=implementation
    )
    slots, pullback = jax.vjp(call, given["query"])
    assert slots.shape == (2, 24, 4, 64)
    assert not slots.any()
    assert not pullback(jnp.ones_like(slots))[0].any()


@PLAIN
def test_the_scale_may_be_traced(implementation):
    arrays, masking = make_inputs(Case())
    given = as_arguments(arrays, jnp.float32)
    masking.pop("scale")

    def total(scale):
        slots = routed_attention(**given, **masking, scale=scale, implementation=implementation)
        return jnp.sum(slots**2)

    value, slope = jax.jit(jax.value_and_grad(total))(jnp.float32(0.5))
    np.testing.assert_allclose(value, total(0.5), rtol=1e-5)
    difference = (total(0.5 + 1 / 64) - total(0.5 - 1 / 64)) * 32
    np.testing.assert_allclose(slope, difference, rtol=1e-2)
