"""The public functions check their arguments and choose an implementation."""

import jax.numpy as jnp
import numpy as np
import pytest

from gqe_kernels import dense_attention, routed_attention
from tests.gqe_kernels.contract import Case, make_inputs


def inputs(**changes):
    arrays, masking = make_inputs(Case(shared="given", segments="packed"))
    arrays = {
        n: jnp.asarray(a, a.dtype if a.dtype == np.int32 else "float32") for n, a in arrays.items()
    }
    return {**arrays, **masking, **changes}


def test_the_default_on_cpu_is_xla():
    given = inputs()
    np.testing.assert_array_equal(
        routed_attention(**given), routed_attention(**given, implementation="xla")
    )
    dense = {n: given[n] for n in ("query", "key", "value")}
    np.testing.assert_array_equal(
        dense_attention(**dense), dense_attention(**dense, implementation="xla")
    )


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": jnp.zeros((2, 24, 4, 8))}, r"query has shape \(2, 24, 4, 8\).*\[batch, q_len"),
        ({"key": jnp.zeros((2, 24, 3, 8))}, r"key has shape.*needs \[2, kv_len, 2, 8\]"),
        ({"value": jnp.zeros((2, 25, 2, 8))}, r"value has shape \(2, 25, 2, 8\)"),
        ({"key": jnp.zeros((2, 24, 2, 8), "bfloat16")}, "query float32, key bfloat16"),
        ({"shared_query": jnp.zeros((2, 24, 8), "bfloat16")}, "shared_query bfloat16"),
        ({"query": jnp.zeros((2, 24, 2, 2, 8), "int32")}, "query has dtype int32"),
        ({"expert_index": jnp.zeros((2, 24, 3, 1), "int32")}, "expert_index has shape"),
        ({"expert_index": jnp.zeros((2, 24, 2, 1))}, "expert_index has dtype float32"),
        ({"expert_index": jnp.zeros((2, 24, 2, 3), "int32")}, "k = 3 experts of the 2"),
        ({"slot_weight": jnp.zeros((2, 24, 2, 2))}, "slot_weight has shape"),
        ({"shared_query": jnp.zeros((2, 24, 2, 8))}, "shared_query has shape"),
        ({"shared_query": None}, "without a shared_query"),
        ({"shared_value": None}, "must be given together"),
        ({"shared_key": jnp.zeros((2, 20, 8))}, "shared_key has shape"),
        ({"kv_segment_ids": None}, "q_segment_ids and kv_segment_ids must be given together"),
        ({"q_segment_ids": jnp.ones((2, 20), "int32")}, "q_segment_ids has shape"),
        ({"q_offset": jnp.zeros(3, "int32")}, r"q_offset has shape \(3,\)"),
        (
            {"implementation": "cuda"},
            "'cuda'; it must be one of None, 'reference', 'xla', 'decode', 'pallas_tpu'",
        ),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        routed_attention(**inputs(**changes))


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({}, "query: dtype float32"),
        ({"dtype": "bfloat16", "head_dim": 192}, "head_dim 192"),
        ({"dtype": "bfloat16", "q_offset": 3}, "q_offset"),
        ({"dtype": "bfloat16", "segments": True}, "q_segment_ids"),
    ],
)
def test_cudnn_names_the_argument_it_cannot_take(changes, argument):
    dtype, head_dim = changes.get("dtype", "float32"), changes.get("head_dim", 8)
    query = jnp.zeros((1, 4, 2, 2, head_dim), dtype)
    key = jnp.zeros((1, 4, 2, head_dim), dtype)
    masking = {"q_offset": changes.get("q_offset", 0)}
    if "segments" in changes:
        masking |= dict.fromkeys(("q_segment_ids", "kv_segment_ids"), jnp.ones((1, 4), "int32"))
    with pytest.raises(NotImplementedError, match=argument):
        dense_attention(query, key, key, implementation="cudnn", **masking)
