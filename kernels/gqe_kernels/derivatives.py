"""Derivatives that an implementation lacks: their error names the one that has them.

JAX's own errors, of a function whose gradient is written by hand, name no way out, and they come
when a program is lowered, where no caller can add one. So tangents pass through an identity that
exists only where the derivative does: lowering it, or transposing it, raises.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Kind = Literal["forward-mode derivative", "gradient of its gradient", "derivative of its gradient"]

_identity_p = Primitive("gqe_derivative")


def _missing(kind: Kind, name: str | None) -> NotImplementedError:
    return NotImplementedError(
        f"implementation={name!r} has a gradient (jax.grad, jax.vjp) and no {kind}; "
        "implementation='reference' has it"
    )


def _lower(x: Any, *, kind: Kind, name: str | None) -> Any:
    if kind == "forward-mode derivative":
        raise _missing(kind, name)
    return x


def _transpose(cotangent: Any, x: Any, *, kind: Kind, name: str | None) -> list[Any]:
    del x
    if kind != "forward-mode derivative":
        raise _missing(kind, name)
    return [cotangent]


_identity_p.def_impl(_lower)
_identity_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_identity_p, _transpose)
batching.defvectorized(_identity_p)
mlir.register_lowering(_identity_p, mlir.lower_fun(_lower, multiple_results=False))


def without_derivative[**Arguments, Result](
    kind: Kind, name: str | None, function: Callable[Arguments, Result]
) -> Callable[Arguments, Result]:
    """`function`, which lacks this derivative: asking for it raises NotImplementedError.

    Args:
      kind: the missing derivative. Of a function that computes a gradient, either the gradient is
        missing, or any derivative.
      name: the implementation, for the error; None: that of each platform.
      function: takes trees of arrays by position.
    """

    def mark(primal: Any, tangent: Any) -> Any:
        if isinstance(tangent, SymbolicZero):
            return zero_from_primal(primal)
        return _identity_p.bind(tangent, kind=kind, name=name)

    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        if kind == "derivative of its gradient":
            raise _missing(kind, name)
        return jax.jvp(function, primals, jax.tree.map(mark, primals, tangents))

    marked = jax.custom_jvp(function)
    marked.defjvp(derivative, symbolic_zeros=True)
    return marked
