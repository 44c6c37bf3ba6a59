"""The attention layers of the configurations, as a run has them, compiled for TPUs."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gqe_jax.compile_for import hlo
from gqe_jax.compile_for.cycles import cycles
from gqe_jax.compile_for.topology import get_topology
from gqe_jax.model.attention import make_attention
from gqe_jax.model.transformer import REMAT_POLICY
from gqe_jax.runs import find_config

BATCH, LENGTH = 16, 2048
MOVES = {"copy", "transpose", "pad", "reverse", "concatenate"}


def compiled_layer(name: str, chip: str) -> hlo.Program:
    """Forward and backward of the layer, under the default remat policy."""
    model = find_config(name).model
    device = get_topology(f"{chip}:2x2").devices[0]
    mesh = jax.sharding.Mesh([device], ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    layer = nnx.eval_shape(
        lambda: make_attention(model.attention, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    graphdef, params = nnx.split(layer)
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, model.embed_dim), jnp.bfloat16, sharding=whole)

    def call(params, x):
        y, aux, _ = nnx.merge(graphdef, params)(x)
        return y, aux.load_balancing_loss

    call = jax.checkpoint(call, policy=REMAT_POLICY[model.remat], prevent_cse=False)

    def both(params, x, d_y):
        (y, loss), vjp = jax.vjp(call, params, x)
        return y, vjp((d_y, jnp.ones_like(loss)))

    with jax.set_mesh(mesh):
        compiled = jax.jit(both).lower(jax.tree.map(abstract, params), x, x).compile()
    return hlo.parse(compiled.as_text())


def moves_of_tokens(program: hlo.Program) -> list[str]:
    """Instructions, also inside fusions, that move an array with a head for each token."""

    def is_of_tokens(array: hlo.Array) -> bool:
        has_tokens = {LENGTH, BATCH * LENGTH} & set(array.shape)
        return bool(has_tokens) and math.prod(array.shape) >= BATCH * LENGTH * 64

    return [
        f"{x.name} {[array.shape for array in x.arrays]}"
        for computation in program.computations.values()
        for x in computation.values()
        if x.opcode in MOVES and any(map(is_of_tokens, x.arrays))
    ]


@pytest.mark.libtpu
@pytest.mark.parametrize(
    ("name", "chip", "most"),
    [("gqe_250m", "v5e", 4.7e6), ("gqe_250m", "v6e", 2.7e6), ("gqe_7b", "v6e", 14e6)],
)
def test_nothing_is_copied_between_products_and_kernels(name, chip, most):
    """The most cycles outside the kernels are a twelfth above what was seen."""
    program = compiled_layer(name, chip)
    kernels = {
        x.name.partition(".")[0]
        for computation, _ in program.runs()
        for x in computation.values()
        if x.text("custom_call_target") == '"tpu_custom_call"'
    }
    backward = {"gqe_backward_prepare", "gqe_backward", "gqe_unproject"}
    assert kernels == {"gqe_project", "gqe_forward", *backward}
    assert not moves_of_tokens(program)
    assert sum(part.cycles for part in cycles(program).parts.values()) < most
