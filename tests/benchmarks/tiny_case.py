"""The kernel whose schedule is kept in `data`, as a case of the benchmark."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.benchmarks.schedule.cases import ScheduledCall

STEPS, EVEN_STEPS = 8, 4


def tiny() -> ScheduledCall:
    """A loop of 8 steps, in which every other step does more."""

    def kernel(x_ref, out_ref):
        out_ref[...] = jnp.zeros_like(out_ref)

        def body(i, carry):
            out_ref[...] += x_ref[pl.ds(pl.multiple_of(i * 8, 8), 8)]

            @pl.when(i % 2 == 0)
            def even():
                out_ref[...] = jnp.exp(out_ref[...]) * 3 + jnp.tanh(out_ref[...])

            return carry

        jax.lax.fori_loop(0, STEPS, body, 0)

    call = pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM)],
        out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        name="tiny",
    )
    arguments = (jax.ShapeDtypeStruct((8 * STEPS, 128), jnp.float32),)
    return ScheduledCall(
        call, arguments, {"tiny": {"grid": STEPS, "even": EVEN_STEPS}}, pairs=1, macs=1
    )
