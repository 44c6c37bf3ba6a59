"""The TPU kernel keeps the contract under the TPU interpreter, and compiles for the chips."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqe_kernels import pallas_tpu, routed_attention
from gqe_kernels.pallas_tpu import blocks
from gqe_kernels.pallas_tpu.layout import Layout
from gqe_kernels.pallas_tpu.schedule import Tiles
from tests.gqe_kernels.contract import (
    Case,
    DenseAttentionContract,
    RoutedAttentionContract,
    as_arguments,
    make_inputs,
)
from tests.gqe_kernels.interpreter import interpreter as interpreter


@pytest.mark.usefixtures("interpreter")
class TestPallasTpu(RoutedAttentionContract):
    """Blocks as by default: each of these sequences is one block."""

    implementation = "pallas_tpu"
    base = Case(head_dim=64)
    float32_cases = tuple(
        dataclasses.replace(case, head_dim=64)
        for case in (
            Case(),
            Case(expert=4, k=3, segments="packed"),
            Case(group=1, expert=16, k=1, batch=1),
            Case(expert=3, k=2, weighted=False, batch=1),
            Case(shared=None, weighted=False, batch=1),
            Case(shared="given", segments="padded"),
            Case(causal=False, kv_len=37, shared="given", batch=1),
            Case(causal=False, segments="all_padding"),
            Case(q_len=1, kv_len=24, q_offset=11),
            Case(q_len=5, kv_len=24, q_offset=(3, 19), segments="padded"),
            Case(q_len=8, kv_len=24, q_offset=-4, batch=1),
            Case(routing="one", scale=0.5, batch=1),
        )
    )
    bfloat16_cases = (Case(head_dim=64, expert=4, k=2, segments="packed"),)

    @pytest.mark.slow
    def test_no_field_of_the_mask_is_ignored(self):
        super().test_no_field_of_the_mask_is_ignored()


# Several blocks each way, and a backward pass of several launches.
SMALL = pallas_tpu.BlockSizes(
    q=128, kv=256, strip=64, backward_q=256, backward_kv=128, d_query_bytes=1
)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
class TestManyBlocks(RoutedAttentionContract):
    implementation = functools.partial(pallas_tpu.attention, blocks=SMALL)
    test_no_field_of_the_mask_is_ignored = None  # TestPallasTpu has it
    base = Case(head_dim=128, q_len=150, group=1)
    float32_cases = (
        Case(batch=1, q_len=600, group=1, head_dim=128, segments="packed"),
        Case(batch=1, q_len=384, head_dim=64),
        Case(batch=1, q_len=130, kv_len=700, q_offset=513, head_dim=64, expert=3),
        Case(
            batch=1, q_len=512, kv_len=1024, q_offset=((256, 512),), head_dim=64, segments="packed"
        ),
    )
    bfloat16_cases = float32_cases[1:2]


# Square blocks, whose diagonal tiles come first, and what the wide chips' defaults turn on.
DIAGONAL = pallas_tpu.BlockSizes(
    **dict.fromkeys(("q", "kv", "backward_q", "backward_kv"), 256),
    strip=128,
    row_sum_on_mxu=True,
    bfloat16_exp=True,
)


@pytest.mark.usefixtures("interpreter")
class TestDiagonalFirst(RoutedAttentionContract):
    implementation = functools.partial(pallas_tpu.attention, blocks=DIAGONAL)
    test_no_field_of_the_mask_is_ignored = None
    base = Case(head_dim=128, q_len=300, group=1)
    float32_cases = (
        Case(batch=1, q_len=200, kv_len=600, q_offset=256, head_dim=64, expert=3),
        Case(batch=1, q_len=600, group=1, head_dim=128),
    )
    by_default = slice(1)
    bfloat16_cases = float32_cases[1:]


@pytest.mark.usefixtures("interpreter")
class TestDensePallasTpu(DenseAttentionContract):
    implementation = functools.partial(pallas_tpu.attention, blocks=DIAGONAL)
    cases = (
        Case(batch=1, head_dim=64, expert=3, segments="packed"),
        Case(batch=1, q_len=300, group=1, head_dim=128),
    )


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("offset", [0, 2])
def test_a_prefills_grid_visits_every_block_below_the_diagonal_once(length, offset):
    tiles = Tiles(
        128, 128, 128 * length, 128 * (length + offset), True, False, 128 * offset, is_prefill=True
    )
    pairs, steps = tiles.pairs
    visited = [tiles.paired(pair, step) for pair in range(pairs) for step in range(steps)]
    blocks = [(int(i), int(i) + offset - int(step)) for i, step in visited]
    below = [(i, j) for i in range(length) for j in range(i + offset + 1)]
    assert sorted(block for block in blocks if block[1] >= 0) == below
    assert length % 2 or len(blocks) == len(below)


TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

# Each chip, dtype and head_dim, with what shapes the code: segments, traced offsets, ranks, ragged
# lengths and a padded head.
COMPILED = [
    ("v5e", Case(batch=1, q_len=1024, head_dim=64), "bfloat16"),
    ("v5e", Case(batch=2, q_len=1000, head_dim=64, expert=3, k=2, segments="packed"), "bfloat16"),
    ("v5p", Case(batch=1, q_len=300, kv_len=450, head_dim=128, q_offset=(150,)), "float32"),
    ("v5p", Case(batch=1, q_len=768, kv_len=1536, head_dim=128, q_offset=((0, 1152),)), "bfloat16"),
    ("v6e", Case(batch=1, q_len=1024, head_dim=128), "bfloat16"),
    ("v6e", Case(batch=1, q_len=2, kv_len=24, q_offset=11, head_dim=64, group=3), "bfloat16"),
    ("tpu7x", Case(batch=1, q_len=1024, head_dim=128, weighted=False), "bfloat16"),
    ("tpu7x", Case(batch=1, q_len=600, head_dim=192, group=1, expert=16, shared=None), "bfloat16"),
]


def compiled_for(chip: str, function, *arguments):
    """`function` compiled for one chip that is not here, as it is on a mesh of that chip."""
    topology = topologies.get_topology_desc(topology_name=TOPOLOGIES[chip], platform="tpu")
    mesh = Mesh(np.array(topology.devices[:1]), "data")
    sharding = NamedSharding(mesh, PartitionSpec())
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*abstract).compile()


@pytest.mark.libtpu
@pytest.mark.parametrize(
    ("chip", "case", "dtype"),
    [
        pytest.param(*one, marks=[pytest.mark.slow] if number % 4 else [])
        for number, one in enumerate(COMPILED)
    ],
    ids=[f"{chip}-{dtype}-{case.name}" for chip, case, dtype in COMPILED],
)
def test_default_compiles_to_the_kernel_on(chip, case, dtype):
    """Forward and backward, by Mosaic and XLA:TPU, with no flag that names the kernel."""
    check_default_compiles(chip, case, dtype)


@pytest.mark.libtpu
def test_with_64_bit_types_the_default_compiles_to_the_kernel():
    case = Case(batch=2, q_len=256, head_dim=64, segments="packed", q_offset=(0, 0))
    with jax.enable_x64(True):
        check_default_compiles("v5e", case, "bfloat16", np.int64)


def check_default_compiles(chip, case, dtype, index_dtype=np.int32):
    arrays, masking = make_inputs(case)
    index = arrays.pop("expert_index").astype(index_dtype)
    given = {n: np.asarray(a, jnp.dtype(dtype)) for n, a in arrays.items()}
    traced = {n: a.astype(index_dtype) for n, a in masking.items() if isinstance(a, np.ndarray)}
    static = {n: a for n, a in masking.items() if n not in traced}

    def loss(given, index, traced):
        slots = routed_attention(expert_index=index, **given, **traced, **static)
        return jnp.sum(slots.astype(jnp.float32) ** 2)

    compiled = compiled_for(chip, jax.value_and_grad(loss), given, index, traced)
    names = re.findall(r"%(gqe_[a-z_]+)[\d.]* = .*custom-call", compiled.as_text())
    assert sorted(names) == ["gqe_backward", "gqe_backward_prepare", "gqe_forward"]


def test_what_the_kernel_cannot_take_is_named():
    arrays, masking = make_inputs(Case())
    arrays = as_arguments(arrays, "float32")
    with pytest.raises(NotImplementedError, match="query: head_dim 8"):
        routed_attention(**arrays, **masking, implementation="pallas_tpu")
    arrays = as_arguments(arrays, "float16")
    with pytest.raises(NotImplementedError, match="query: dtype float16"):
        routed_attention(**arrays, **masking, implementation="pallas_tpu")


def test_block_sizes_are_checked():
    with pytest.raises(ValueError, match=r"BlockSizes.kv is 100; it must be a multiple of 128"):
        pallas_tpu.BlockSizes(kv=100)
    with pytest.raises(ValueError, match=r"BlockSizes.strip is 384"):
        pallas_tpu.BlockSizes(strip=384)


def test_block_sizes_are_those_of_the_nearest_length():
    table = {"v6e": {"64": {"4096": {"q": 256, "kv": 256}, "32768": {"q": 512, "kv": 512}}}}
    found = [blocks.tuned("v6e", 64, length, table).q for length in (100, 11_000, 12_000, 200_000)]
    assert found == [256, 256, 512, 512]


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("shape", [(8, 2, 1, 64), (8, 2, 1, 128), (8, 4, 4, 128), (1, 16, 1, 256)])
@pytest.mark.parametrize("length", [1, 2048, 131_072])
def test_default_blocks_fit_in_vmem(chip, shape, length):
    layout = Layout(*shape, weighted=True, shared=True)
    sizes = blocks.default_block_sizes(layout, length, length, 2, chip=chip)
    assert blocks.vmem_estimate(layout, sizes, length, 2) <= sizes.vmem_bytes
    assert sizes.vmem_bytes < {"v5e": 128, "v5p": 64, "v6e": 128, "tpu7x": 64}[chip] * 2**20
