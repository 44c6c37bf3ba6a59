"""`project`: the projection on the best implementation of each platform, with its gradient."""

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from gqe_kernels.derivatives import without_derivative
from gqe_kernels.pallas_tpu import projection as pallas_tpu
from gqe_kernels.projection import Projected, Projection, gradients, reference
from gqe_kernels.remat import PROJECTION, kept
from gqe_kernels.varying import vary_alike


def project(x: Float[Array, "batch length embed"], projection: Projection) -> Projected:
    """Queries of the selected experts, keys, values, and what the shared head reads.

    On TPU one kernel makes them all; other platforms, and what the kernel does not take, use
    `gqe_kernels.projection.reference`.

    Args:
      x: the tokens.
      projection: weights, in the dtype of `x`, and angles.

    Returns:
      The queries of the selected experts, keys, values, what the shared head reads, the router's
      logits and the selected experts.

    Raises:
      NotImplementedError: a forward-mode derivative, or a second one, is asked for.
    """
    marked = without_derivative("forward-mode derivative", None, _project)
    return marked(*vary_alike((x, projection)))


@jax.custom_vjp
def _project(x, projection: Projection) -> Projected:
    return _forward(x, projection)[0]


def _forward(x, projection: Projection):
    run = functools.partial(_by_platform, pallas_tpu.forward, reference)
    run = without_derivative("derivative of its gradient", None, run)
    projected = run(x, projection)
    logits, index = kept((projected.logits, projected.expert_index), PROJECTION)
    projected = dataclasses.replace(projected, logits=logits, expert_index=index)
    return projected, (x, projection, projected.expert_index)


def _backward(residuals, cotangents: Projected):
    x, projection, expert_index = residuals
    d_routed, d_logits = cotangents.routed, cotangents.logits
    normed = projection.query_scale is not None
    kernel = gradients if normed else pallas_tpu.backward
    run = functools.partial(_by_platform, kernel, gradients)
    run = without_derivative("derivative of its gradient", None, run)
    return run(x, projection, expert_index, d_routed, d_logits)


def _by_platform(kernel: Any, plain: Any, *operands: Any) -> Any:
    x, projection, *_ = operands
    if pallas_tpu.unsupported(x, projection) is not None:
        return plain(*operands)
    return jax.lax.platform_dependent(*operands, tpu=kernel, default=plain)


_project.defvjp(_forward, _backward)
