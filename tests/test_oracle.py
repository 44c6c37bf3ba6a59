"""The oracle's gradients are those of its own float64 values, by central differences."""

import numpy as np

from tests import oracle
from tests.gqe_kernels.contract import DIFFERENTIABLE, Case, make_inputs


def test_gradients_equal_central_differences():
    case = Case(batch=1, q_len=7, expert=4, k=2, segments="packed")
    arrays, masking = make_inputs(case)
    names = [name for name in DIFFERENTIABLE if name in arrays]
    rng = np.random.default_rng(3)
    cotangent = rng.standard_normal((1, 7, 6, 8))

    def objective(xp, *values):
        given = dict(zip(names, values, strict=True))
        slots = oracle.routed_attention(xp, expert_index=arrays["expert_index"], **given, **masking)
        return xp.sum(slots * cotangent)

    values = tuple(arrays[name] for name in names)
    grads = oracle.gradients(objective, values)
    for position, name in enumerate(names):
        direction = rng.standard_normal(values[position].shape)
        step = 1e-6

        def moved(sign, position=position, direction=direction, step=step):
            shifted = list(values)
            shifted[position] = values[position] + sign * step * direction
            return objective(np, *shifted)

        difference = (moved(1) - moved(-1)) / (2 * step)
        np.testing.assert_allclose(
            np.sum(grads[position] * direction), difference, rtol=1e-6, atol=1e-8, err_msg=name
        )
