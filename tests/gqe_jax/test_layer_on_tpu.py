"""Attention layers compiled for TPUs: those of the configurations, and other geometries."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gqe_jax.compile_for import hlo
from gqe_jax.compile_for.cycles import cycles
from gqe_jax.compile_for.topology import get_topology
from gqe_jax.config import AttentionConfig, MeshConfig
from gqe_jax.model.attention import make_attention
from gqe_jax.model.transformer import REMAT_POLICY
from gqe_jax.runs import find_config
from gqe_jax.sharding import OnMesh, batch_sharding, make_mesh, shardings

BATCH, LENGTH = 16, 2048
ALL_KERNELS = {"gqe_project", "gqe_forward", "gqe_backward_prepare", "gqe_backward"}
ALL_KERNELS |= {"gqe_unproject"}
MOVES = {"copy", "transpose", "pad", "reverse", "concatenate"}


def compiled(
    config: AttentionConfig, mesh: jax.sharding.Mesh, batch: int, length: int, remat: str
) -> hlo.Program:
    """Forward and backward of a bfloat16 layer on a mesh, under a remat policy."""
    layer = nnx.eval_shape(lambda: make_attention(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(layer)

    def abstract(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = jax.tree.map(abstract, params, shardings(params, mesh))
    x = jnp.broadcast_to(jnp.bfloat16(0), (batch, length, config.embed_dim))
    x = abstract(x, batch_sharding(mesh))

    def call(params, x):
        y, aux, _ = nnx.merge(graphdef, params)(x)
        return y, aux.load_balancing_loss

    call = jax.checkpoint(call, policy=REMAT_POLICY[remat], prevent_cse=False)

    def both(params, x, d_y):
        (y, loss), vjp = jax.vjp(call, params, x)
        return y, vjp((d_y, jnp.ones_like(loss)))

    text = OnMesh(mesh, jax.jit(both)).lower(params, x, x).compile().as_text()
    assert text is not None
    return hlo.parse(text)


def compiled_layer(name: str, chip: str) -> hlo.Program:
    """The layer of a configuration, on one chip."""
    model = find_config(name).model
    mesh = make_mesh(MeshConfig(), list(get_topology(f"{chip}:2x2").devices[:1]))
    return compiled(model.attention, mesh, BATCH, LENGTH, model.remat)


def kernels(program: hlo.Program) -> set[str]:
    """The names of the program's Pallas kernels."""
    return {
        x.name.partition(".")[0]
        for computation, _ in program.runs()
        for x in computation.values()
        if x.text("custom_call_target") == '"tpu_custom_call"'
    }


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
    [
        ("gqe_250m", "v5e", 4.7e6),
        pytest.param("gqe_250m", "v6e", 1.97e6, marks=pytest.mark.slow),
        pytest.param("gqe_7b", "v6e", 14e6, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_copied_between_products_and_kernels(name, chip, most):
    """Seen outside the kernels: 4.38, 1.82 and 13.93 million cycles."""
    program = compiled_layer(name, chip)
    assert kernels(program) == ALL_KERNELS
    assert not moves_of_tokens(program)
    assert sum(part.cycles for part in cycles(program).parts.values()) < most


@pytest.mark.libtpu
@pytest.mark.parametrize(
    ("topology", "axes", "fields", "length"),
    [
        ("v5e:2x4", {"fsdp": 2, "context": 2, "tensor": 2}, {"selection_bias": True}, 256),
        ("tpu7x:2x2x1", {"tensor": 2, "data": 2}, {"variant": "gqa"}, 256),
        ("v5p:2x2x1", {"data": 4}, {"num_query_experts": 16, "top_k": 2}, 100),
    ],
)
def test_meshes_chips_and_shapes_have_the_kernels(topology, axes, fields, length):
    given = {"embed_dim": 256, "num_query_experts": 8, "num_kv_heads": 4, "head_dim": 64} | fields
    devices = list(get_topology(topology).devices)
    mesh = make_mesh(MeshConfig(**({"data": 1} | axes)), devices[: math.prod(axes.values())])
    program = compiled(AttentionConfig(**given), mesh, 4, length, "keep_nothing")
    assert kernels(program) == ALL_KERNELS


@pytest.mark.libtpu
def test_a_shard_of_one_narrow_group_has_plain_projections():
    """Two heads of 64 fill a row of 128 lanes, and a shard that has one pads it."""
    config = AttentionConfig(embed_dim=256, num_query_experts=8, num_kv_heads=4, head_dim=64)
    mesh = make_mesh(MeshConfig(data=1, tensor=4), list(get_topology("v6e:2x2").devices))
    program = compiled(config, mesh, 4, 256, "keep_nothing")
    assert kernels(program) == ALL_KERNELS - {"gqe_project", "gqe_unproject"}
