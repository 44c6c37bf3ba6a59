"""Dense attention by cuDNN, on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqe_kernels import dense_attention
from tests.gqe_kernels.contract import TOLERANCE, Case, assert_close, make_inputs


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
def test_the_default_on_a_gpu_is_cudnn_where_it_can_be():
    shapes = [(1, 128, 2, 2, 64), (1, 128, 2, 64), (1, 128, 2, 64)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    assert "cudnn" in jax.jit(dense_attention).lower(*arguments).as_text()
