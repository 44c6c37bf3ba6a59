"""Gradients under remat, and derivatives beyond: those of the reference, errors of the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqe_kernels import routed_attention, xla
from gqe_kernels.remat import ATTENTION_OPERANDS, ATTENTION_OUTPUT
from tests.gqe_kernels.contract import Case, as_arguments, make_inputs


def attention_of(implementation, case=Case(), dtype=jnp.float32):  # noqa: B008 - frozen
    """The attention as a function of its query, and a query."""
    arrays, masking = make_inputs(case)
    given = as_arguments(arrays, dtype)
    query = given.pop("query")
    call = functools.partial(routed_attention, **given, **masking, implementation=implementation)
    return call, query


def total(call, query):
    return jnp.sum(call(query) ** 2)


@pytest.mark.parametrize("implementation", ["reference", "decode"])
def test_the_forward_mode_derivative_is_that_of_differences(implementation):
    call, query = attention_of(implementation)
    tangent = jnp.asarray(np.random.default_rng(2).standard_normal(query.shape), jnp.float32)
    value, slope = jax.jit(lambda q, t: jax.jvp(call, (q,), (t,)))(query, tangent)
    np.testing.assert_array_equal(value, jax.jit(call)(query))
    step = 2**-7
    differences = (call(query + step * tangent) - call(query - step * tangent)) / (2 * step)
    np.testing.assert_allclose(slope, differences, atol=2e-3)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize("how", ["at once", "jit outside", "jit inside"])
def test_a_kernel_without_forward_mode_names_the_reference(implementation, how):
    call, query = attention_of(implementation, Case(head_dim=64), jnp.bfloat16)
    if how == "jit inside":
        call = jax.jit(call)
    derivative = lambda q: jax.jvp(call, (q,), (q,))  # noqa: E731
    if how == "jit outside":
        derivative = jax.jit(derivative)
    message = f"implementation='{implementation}' has.*no forward-mode.*'reference' has it"
    with pytest.raises(NotImplementedError, match=message):
        derivative(query)


def test_the_gradient_of_a_gradient_is_the_references_or_names_it():
    call, query = attention_of("reference", Case(batch=1, q_len=6))
    penalty = lambda q: jnp.sum(jax.grad(functools.partial(total, call))(q) ** 2)  # noqa: E731
    penalty = jax.jit(penalty)
    second = jax.jit(jax.grad(penalty))(query)
    tangent = jnp.asarray(np.random.default_rng(2).standard_normal(query.shape), jnp.float32)
    step = 2**-6
    difference = (penalty(query + step * tangent) - penalty(query - step * tangent)) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(second, tangent), difference, rtol=2e-2)

    for implementation in ("xla", "pallas_tpu", "pallas_gpu"):
        call, query = attention_of(implementation, Case(head_dim=64), jnp.bfloat16)
        inner = jax.grad(functools.partial(total, call))
        with pytest.raises(NotImplementedError, match=f"'{implementation}' has.*of its gradient"):
            jax.eval_shape(jax.grad(lambda q, inner=inner: jnp.sum(inner(q))), query)


def test_a_gradient_of_many_blocks_has_its_forward_mode_derivative():
    case = Case(batch=1, group=1)
    in_blocks = functools.partial(xla.attention, blocks=xla.XlaBlocks(8, 8))
    _, query = attention_of("reference", case)

    def product(implementation):
        call, _ = attention_of(implementation, case)
        gradient = jax.grad(functools.partial(total, call))
        return jax.jit(lambda q: jax.jvp(gradient, (q,), (jnp.ones_like(q),))[1])(query)

    np.testing.assert_allclose(product(in_blocks), product("reference"), atol=1e-4)


@pytest.mark.parametrize(
    ("implementation", "kernel"),
    [("xla", "dot_general"), ("pallas_tpu", "pallas_call"), ("pallas_gpu", "gqe_forward")],
)
def test_under_remat_the_forward_pass_runs_once_if_its_output_is_kept(implementation, kernel):
    call, query = attention_of(implementation, Case(head_dim=64), jnp.bfloat16)

    def runs(policy):
        objective = jax.checkpoint(functools.partial(total, call), policy=policy)
        return str(jax.make_jaxpr(jax.grad(objective))(query)).count(kernel)

    policies = jax.checkpoint_policies
    kept = runs(policies.save_only_these_names(ATTENTION_OUTPUT))
    assert 0 < kept < runs(policies.nothing_saveable)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu", "pallas_gpu"])
def test_under_remat_what_makes_the_operands_runs_once_if_they_are_kept(implementation):
    call, query = attention_of(implementation, Case(head_dim=64), jnp.bfloat16)

    def runs(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        objective = jax.checkpoint(lambda x: total(call, jnp.sin(x)), policy=policy)
        return str(jax.make_jaxpr(jax.grad(objective))(query)).count(" sin ")

    assert runs() == 2
    assert runs(ATTENTION_OPERANDS, ATTENTION_OUTPUT) == 1
