"""The implementation for few queries keeps the contract; decoding copies no cache."""

import jax
import jax.numpy as jnp
import numpy as np

from gqe_kernels import dense_attention, routed_attention
from tests import oracle
from tests.gqe_kernels.contract import Case, RoutedAttentionContract, assert_close, make_inputs


class TestDecode(RoutedAttentionContract):
    implementation = "decode"
    float32_cases = (
        Case(q_len=1, kv_len=24, q_offset=11),
        Case(q_len=3, kv_len=8, q_offset=(2, -2), expert=4, k=2, segments="padded"),
        Case(q_len=2, causal=False, shared="given", scale=0.5),
    )
    bfloat16_cases = (Case(q_len=1, kv_len=24, q_offset=11),)


def test_a_single_query_is_decoded():
    """By default, and like the oracle: dense heads, and experts with the shared head."""
    arrays, masking = make_inputs(Case(q_len=1, kv_len=24, q_offset=(3, 19)))
    values = [arrays[name] for name in ("query", "key", "value")]
    expected = oracle.dense_attention(np, *values, **masking)
    actual = dense_attention(*map(jnp.float32, values), **masking)
    assert_close(actual, expected, 1e-5, "dense slots")

    def lowered(implementation):
        given = {n: jnp.float32(a) for n, a in arrays.items() if n != "expert_index"}
        given["expert_index"] = jnp.asarray(arrays["expert_index"])
        call = lambda given: routed_attention(implementation=implementation, **given, **masking)  # noqa: E731
        return jax.jit(call).lower(given).as_text()

    assert lowered(None) == lowered("decode") != lowered("xla")
