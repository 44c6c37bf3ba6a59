"""The proof before the bill: the reader of compiled programs, the estimate, and a whole compile."""

import dataclasses
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from configs import CONFIGS
from gqe_jax.compile_for import CompileOptions, hlo
from gqe_jax.compile_for.__main__ import forwarded, read_command
from gqe_jax.compile_for.collectives import Collective, collectives, replica_groups
from gqe_jax.compile_for.costs import Costs, count
from gqe_jax.compile_for.estimate import estimate
from gqe_jax.compile_for.meshes import shapes
from gqe_jax.compile_for.program import compile_step, remedies
from gqe_jax.compile_for.report import as_text
from gqe_jax.compile_for.topology import get_topology
from gqe_jax.config import AttentionConfig, ConfigError, MeshConfig, ModelConfig, RunConfig
from gqe_jax.model.transformer import count_parameters
from gqe_kernels import Mask
from gqe_kernels.chips import CHIPS
from gqe_kernels.pallas_tpu.cost import visible_pairs

# As libtpu writes it, shortened: a loop of 3 (no note of it) of a gather that runs beside a product
# (so it stands in two fusions, on one channel), and after it a scattered sum and a sum of all.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused.1 (p.1: bf16[1,64,128], p.2: bf16[8,64]) -> (bf16[8,128], bf16[256,128]) {
  %p.1 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p.2 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(1)
  %bitcast.9 = bf16[64,128]{1,0} bitcast(%p.1)
  %all-gather.1 = bf16[256,128]{1,0:T(8,128)(2,1)} all-gather(%bitcast.9), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, frontend_attributes={chain_id="4"}
  %convolution.1 = bf16[8,128]{1,0} convolution(%p.2, %bitcast.9), dim_labels=bf_io->bf
  ROOT %tuple.1 = (bf16[8,128]{1,0}, bf16[256,128]{1,0}) tuple(%convolution.1, %all-gather.1)
}

%fused.2 (p.3: bf16[64,128]) -> bf16[256,128] {
  %p.3 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.2 = bf16[256,128]{1,0:T(8,128)(2,1)} all-gather(%p.3), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, frontend_attributes={chain_id="4"}
}

%slices (p.4: f32[3,1024], p.5: s32[]) -> f32[1,1024] {
  %p.4 = f32[3,1024]{1,0:T(8,128)} parameter(0)
  %p.5 = s32[] parameter(1)
  %constant.1 = s32[] constant(0)
  ROOT %dynamic-slice.1 = f32[1,1024]{1,0:T(8,128)} dynamic-slice(%p.4, %p.5, %constant.1), dynamic_slice_sizes={1,1024}
}

%all-reduce-scatter.1 (p.6: f32[256,128]) -> f32[64,128] {
  %p.6 = f32[256,128]{1,0:T(8,128)} parameter(0)
  ROOT %all-reduce.1 = f32[256,128]{1,0} all-reduce(%p.6), channel_id=8, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%sum
}

%body (p.7: (s32[], f32[3,1024], bf16[8,64])) -> (s32[], f32[3,1024], bf16[8,64]) {
  %p.7 = (s32[], f32[3,1024]{1,0:T(8,128)}, /*index=2*/bf16[8,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %gte.1 = s32[]{:T(128)S(6)} get-tuple-element(%p.7), index=0
  %gte.2 = f32[3,1024]{1,0:T(8,128)} get-tuple-element(%p.7), index=1
  %gte.3 = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.7), index=2
  %fusion.s = f32[1,1024]{1,0:T(8,128)} fusion(%gte.2, %gte.1), kind=kLoop, calls=%slices
  %copy.1 = bf16[1,64,128]{2,1,0:S(1)} copy(%gte.3)
  %fusion.1 = (bf16[8,128]{1,0:S(1)}, bf16[256,128]{1,0:S(1)}) fusion(%copy.1, %gte.3), kind=kOutput, calls=%fused.1
  %fusion.2 = bf16[256,128]{1,0:S(1)} fusion(%copy.1), kind=kOutput, calls=%fused.2
  ROOT %tuple.2 = (s32[], f32[3,1024]{1,0}, bf16[8,64]{1,0}) tuple(%gte.1, %gte.2, %gte.3)
}

%condition (p.8: (s32[], f32[3,1024], bf16[8,64])) -> pred[] {
  %p.8 = (s32[], f32[3,1024]{1,0}, bf16[8,64]{1,0}) parameter(0)
  %constant.2 = s32[] constant(3)
  %gte.4 = s32[] get-tuple-element(%p.8), index=0
  ROOT %lt = pred[] compare(%gte.4, %constant.2), direction=LT
}

ENTRY %main (p.9: f32[3,1024], p.10: bf16[8,64]) -> f32[64,128] {
  %p.9 = f32[3,1024]{1,0:T(8,128)} parameter(0)
  %p.10 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(1)
  %constant.3 = s32[] constant(0)
  %tuple.3 = (s32[], f32[3,1024]{1,0}, bf16[8,64]{1,0}) tuple(%constant.3, %p.9, %p.10)
  %while.1 = (s32[], f32[3,1024]{1,0}, bf16[8,64]{1,0}) while(%tuple.3), condition=%condition, body=%body
  %gqe_forward.3 = f32[256,128]{1,0:T(8,128)} custom-call(%p.9), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"1000","transcendentals":"5"}}}
  %fusion.3 = f32[64,128]{1,0:T(8,128)} fusion(%gqe_forward.3), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %all-reduce.2 = f32[64,128]{1,0:T(8,128)} all-reduce(%fusion.3), channel_id=9, replica_groups=mesh['data'=4,'fsdp'=2] {'fsdp'}, to_apply=%sum
}
"""  # noqa: E501


def test_collectives_are_counted_by_hand():
    found = collectives(hlo.parse(PROGRAM), {"data": 4, "fsdp": 2})
    assert [(c.kind, c.axes, c.bytes, c.times) for c in found] == [
        # Order of the program: the entry, then its loop. 64 KiB gathered over 4, three times.
        ("reduce-scatter", ("data",), 256 * 128 * 4 * 3 / 4, 1),
        ("all-reduce", ("fsdp",), 2 * 64 * 128 * 4 / 2, 1),
        ("all-gather", ("data",), 256 * 128 * 2 * 3 / 4, 3),
    ]


def test_costs_are_counted_by_hand():
    costs = count(hlo.parse(PROGRAM))
    assert costs.product_flops == 3 * 2 * 8 * 64 * 128
    assert costs.kernel_flops == {"gqe_forward": 1000}
    row, array, quarter = 4 * 1024, 4 * 256 * 128, 4 * 64 * 128
    loop = row + row  # a slice of three rows read and written; all else stays in vector memory
    kernel, scatter, total = 3 * row + array, array + quarter, 2 * quarter
    assert costs.hbm_bytes == 3 * loop + kernel + scatter + total


def test_a_product_written_as_a_convolution():
    """The product of [2, 2048, 1024] and [1024, 4, 64] as libtpu writes it, mostly padding."""
    program = hlo.parse("""\
ENTRY %main (p.0: bf16[2,2048,1024,1], p.1: bf16[1024,4,64,1]) -> bf16[2,2048,4,64] {
  %p.0 = bf16[2,2048,1024,1]{2,1,3,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[1024,4,64,1]{2,0,1,3:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.92 = bf16[2,2048,4,64]{1,3,2,0:T(8,128)(2,1)} convolution(%p.0, %p.1), \
window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f
}
""")
    assert count(program).product_flops == 2 * 2 * 2048 * 1024 * 4 * 64


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[4], x", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [(0, 2), (1, 3)]),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2), x", [(0, 1, 4, 5), (2, 3, 6, 7)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [(0, 2), (1, 3)]),
        ("replica_groups={}, x", [(0, 1, 2, 3)]),
    ],
)
def test_replica_groups_in_every_form(text, groups):
    assert replica_groups(text, 4) == groups


def test_flops_and_loops_agree_with_a_program_compiled_here():
    """On the CPU, where XLA writes products as dots: five in a loop, and one."""

    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0] @ w[0]

    x, w = jnp.ones((32, 64)), jnp.ones((5, 64, 64))
    program = hlo.parse(jax.jit(f).lower(x, w).compile().as_text())
    assert count(program).product_flops == 6 * 2 * 32 * 64 * 64


def test_collective_bytes_agree_with_a_program_compiled_here():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    sharded, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("fsdp", None))
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=sharded)
    text = jax.jit(lambda x: x, out_shardings=whole).lower(x).compile().as_text()
    [found] = collectives(hlo.parse(text), mesh.shape)
    assert (found.kind, found.axes, found.bytes) == ("all-gather", ("fsdp",), 8 * 128 * 4 * 3 / 4)


def test_between_slices_is_read_from_the_runtime_call():
    send = (
        "ENTRY %main (p: f32[1024]) -> f32[1024] {\n"
        "  %p = f32[1024]{0} parameter(0)\n"
        "  %token = token[] after-all()\n"
        "  %send = (f32[1024]{0:T(1024)}, u32[]{:S(2)}, token[]) send(%p, %token), channel_id=2, "
        'is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}\n'
        "  ROOT %q = f32[1024]{0} copy(%p)\n}\n"
    )
    [found] = collectives(hlo.parse(send), {"data": 4, "fsdp": 2}, num_slices=2)
    assert found == Collective("all-reduce", ("data",), (), 4096.0, 1, between_slices=True)


def test_the_estimate_is_that_of_a_hand_worked_case():
    """v5e: 394 TFLOP take 2 s, 1638 GB of HBM take 2 s, 300 GB over two links of 50 take 3 s."""
    costs = Costs(
        product_flops=390 * 10**12, kernel_flops={"k": 4 * 10**12}, hbm_bytes=1638 * 10**9
    )
    crossings = [
        (Collective("all-gather", ("fsdp",), (0, 1), 150e9, 2), 2),
        (Collective("all-reduce", ("data",), (), 3.125e9, 1, between_slices=True), 0),
    ]
    guess = estimate(
        costs, crossings, CHIPS["v5e"], devices=10, tokens=3000, model_flops=10 * 197e12
    )
    assert (guess.compute, guess.hbm, guess.ici, guess.dcn) == (2.0, 2.0, 3.0, 1.0)
    assert (guess.seconds, guess.serial, guess.bound_by) == (3.0, 8.0, "ICI")
    assert guess.tokens_per_second == 1000
    np.testing.assert_allclose(guess.model_flop_utilisation, 1 / 3)


def test_visible_pairs_are_those_of_the_mask():
    for q_len, kv_len, offset in ((5, 5, 0), (4, 9, 3), (6, 3, 0), (3, 8, 20)):
        mask = np.arange(kv_len) <= np.arange(q_len)[:, None] + offset
        assert visible_pairs(q_len, kv_len, Mask(start=offset)) == mask.sum()
    assert visible_pairs(5, 7, Mask(causal=False)) == 35
    anywhere = [visible_pairs(4, 16, Mask(start=offset)) for offset in range(13)]
    traced = Mask(offset=np.zeros((1, 1), np.int32))
    assert visible_pairs(4, 16, traced) == sum(anywhere) / len(anywhere)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        # layers × (attention + SwiGLU + two norms) + embedding + final norm, by hand.
        ("gqe_1b", 20 * (2048 * (2048 + 2048 + 10 * 128 + 128 + 16) + 3 * 2048 * 6144 + 4096)),
        ("gqa_1b", 20 * (2048 * (2048 + 2048 + 2048) + 3 * 2048 * 6144 + 4096)),
        ("gqe_7b", 32 * (4096 * (4096 + 2048 + 10 * 128 + 128 + 32) + 3 * 4096 * 14336 + 8192)),
        ("gqe_7b_top2", 32 * (4096 * (4096 + 2048 + 2304 + 128 + 32) + 3 * 4096 * 14336 + 8192)),
        ("gqa_7b", 32 * (4096 * (4096 + 2048 + 4096) + 3 * 4096 * 14336 + 8192)),
    ],
)
def test_configurations_have_the_size_of_their_name(name, billions):
    model = CONFIGS[name].model
    parameters = count_parameters(model)
    assert parameters == billions + (32768 + 1) * model.embed_dim
    assert abs(parameters / 1e9 / float(name[4]) - 1) < 0.08
    assert model.attention.resolved_head_dim == 128


@pytest.mark.parametrize("name", ["gqe_1b", "gqe_7b", "gqa_7b"])
def test_configurations_divide_over_every_slice(name):
    for devices in (128, 256):
        sizes = CONFIGS[name].mesh.resolve(devices)
        assert CONFIGS[name].batch_size // CONFIGS[name].accumulation_steps % devices == 0
        assert sizes["data"] * sizes["fsdp"] == devices


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("v9:2x2",), "must be a chip (v5e, v5p, v6e, tpu7x)"),
        pytest.param(
            ("v5e:3x5",),
            "compile_for is 'v5e:3x5'; it must be a chip",
            marks=pytest.mark.libtpu,
        ),
        (("v5e",), "such as v5e:16x16"),
        (("v5e:2x2", 0), "num_slices is 0; it must be positive"),
    ],
)
def test_an_unknown_topology_is_named_with_the_known(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        get_topology(*arguments)


@pytest.mark.libtpu
def test_links_follow_the_torus():
    v5e, v5p = get_topology("v5e:16x16"), get_topology("v5p:4x4x8")
    row = [device for device in v5e.devices if device.coords[1] == 0]
    assert v5e.links(row) == 2  # a whole dimension closes to a ring
    assert v5e.links(row[:4]) == 1
    assert v5e.links(list(v5e.devices)) == 4
    assert v5p.links(list(v5p.devices)) == 6


@pytest.mark.libtpu
def test_slices_are_parted_by_the_data_axis():
    from gqe_jax.sharding import make_mesh

    devices = list(get_topology("v5p:2x2x1", 2).devices)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2), devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)[..., 0, 0]
    np.testing.assert_array_equal(slices, [[0, 0], [0, 0], [1, 1], [1, 1]])
    with pytest.raises(ConfigError, match="multiple of the 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=8), devices)


@pytest.mark.libtpu
def test_an_axis_can_be_part_of_a_dimension_of_the_network():
    """8 x 8 on a torus of 4 x 4 x 4, whose dimensions make only 4, 16 and 64 together."""
    from gqe_jax.sharding import make_mesh

    devices = list(get_topology("v5p:4x4x4").devices)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8, context=8), devices)
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
    over_slices = list(get_topology("v5p:4x4x4", 2).devices)
    mesh = make_mesh(MeshConfig(data=2, fsdp=8, context=8), over_slices)
    assert {device.slice_index for device in mesh.devices[0].flat} == {0}


SMALL = RunConfig(
    model=ModelConfig(
        attention=AttentionConfig(
            embed_dim=128, num_query_experts=4, num_kv_heads=2, head_dim=128, variant="gqe"
        ),
        num_layers=3,
        mlp_dim=256,
        vocab_size=512,
    ),
    mesh=MeshConfig(data=2, fsdp=2),
    batch_size=8,
    sequence_length=128,
    accumulation_steps=2,
)


@pytest.fixture(scope="module")
def compiled():
    return compile_step(SMALL, get_topology("v5e:2x2"))


@pytest.mark.libtpu
def test_a_step_compiled_for_a_slice_that_is_not_here(compiled):
    memory, costs = compiled.memory, compiled.costs
    assert memory.parameters == 4 * (count_parameters(SMALL.model) - 7 * 128) // 2 + 4 * 7 * 128
    assert 2 * memory.parameters <= memory.optimizer <= 2 * memory.parameters + 200
    assert memory.parameters + memory.optimizer + memory.temporaries <= memory.peak
    # 2 sequences a device, 3 active heads. Under remat the forward kernel does not run again.
    pairs = 2 * 3 * 128 * 129 // 2 * 3
    products = {name: flops / (2 * 128 * pairs) for name, flops in costs.kernel_flops.items()}
    assert products["gqe_backward"] == 5
    assert products["gqe_forward"] == 2
    assert any(c.kind == "all-gather" and c.axes == ("fsdp",) for c in compiled.collectives)
    # The backward pass has two products for each of the forward pass. Shared query and router need
    # 132 columns, and have 256.
    tokens, d = 2 * 128, 128
    of_all = costs.product_flops + costs.kernel_flops["gqe_project"]

    def needed(columns: int) -> int:
        layer = d * (128 * (4 + 2 * 2 + 4) + columns) + 3 * d * 256
        return 2 * tokens * 3 * (3 * layer + d * 512)

    assert needed(132) <= of_all < 1.01 * needed(256)
    shown = as_text(compiled)
    assert "not a measurement" in shown
    assert "of 16 GiB" in shown
    # XLA cannot expect to multiply faster than the matrix units, and they do what is counted here.
    total = compiled.cycles.total
    assert total.flops == costs.product_flops
    assert total.products > costs.product_flops / 2 / CHIPS["v5e"].peak_macs
    assert compiled.scheduled.seconds > compiled.estimate.compute
    assert {name for name, _ in compiled.cycles.parts} >= {
        "projections",
        "mlp",
        "loss",
        "optimizer",
    }
    assert "As scheduled" in shown


@pytest.mark.libtpu
def test_a_step_that_does_not_fit_says_what_to_change():
    """33 million rows of the embedding whole on each chip: 16 GiB, and two moments of it."""
    model = dataclasses.replace(SMALL.model, num_layers=1, vocab_size=2**25, remat="keep_dots")
    huge = dataclasses.replace(SMALL, model=model, mesh=MeshConfig(data=4), accumulation_steps=1)
    with pytest.raises(RuntimeError, match="does not fit v5e:2x2") as raised:
        compile_step(huge, get_topology("v5e:2x2"))
    message = str(raised.value)
    assert "16.00 GiB  " in message
    assert "params.embedding.embedding float32[33554432, 128]" in message
    assert "float32[2, 128, 33554432]" in message
    assert "a larger --mesh.fsdp (now 1, with 4 copies)" in message
    assert "--model.remat keep_nothing" in message


def test_remedies_name_what_can_still_change():
    done = dataclasses.replace(
        SMALL,
        accumulation_steps=8,
        batch_size=8,
        model=dataclasses.replace(SMALL.model, remat="keep_nothing"),
    )
    found = remedies(done, {"data": 1, "fsdp": 1, "context": 64, "tensor": 2}, "train")
    assert found == ["a shorter --sequence-length (now 128)", "more chips"]
    found = remedies(done, {"data": 1, "fsdp": 1, "context": 32, "tensor": 2}, "train")
    assert found[0] == "a larger --mesh.context (now 32)"


def test_remedies_of_an_evaluation_leave_out_what_is_of_training():
    scored = dataclasses.replace(SMALL, accumulation_steps=1)
    scored = dataclasses.replace(scored, model=dataclasses.replace(SMALL.model, remat="keep_dots"))
    found = "; ".join(remedies(scored, {"data": 2, "fsdp": 1, "context": 1, "tensor": 1}, "eval"))
    assert found.startswith("--batch-size 2 (one sequence per chip at a time, now 4)")
    assert "accumulation" not in found
    assert "remat" not in found


@pytest.mark.libtpu
def test_an_evaluation_needs_no_rows_for_every_part():
    """`SMALL` accumulates over two parts, of which a chip would have half a sequence."""
    few = dataclasses.replace(SMALL, mesh=MeshConfig(data=4), batch_size=4)
    topology = get_topology("v5e:2x2")
    with pytest.raises(ConfigError, match="batch_size / accumulation_steps is 2"):
        compile_step(few, topology, "train")
    assert compile_step(few, topology, "eval").config.accumulation_steps == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sweep_meshes": -1}, "sweep_meshes is -1; it must be at least 0"),
        ({"num_slices": 0}, "num_slices is 0; it must be at least 1"),
        ({"json": pathlib.Path("no/where.json")}, "json is 'no/where.json'; it must be a file in"),
    ],
)
def test_options_that_cannot_work_are_named_before_the_compile(options, message):
    with pytest.raises(ConfigError, match=message):
        CompileOptions(**options)


@pytest.mark.libtpu
def test_sweep_tries_only_meshes_that_can_work():
    tried = [mesh.sizes for mesh in shapes(SMALL, get_topology("v5e:2x2"))]
    assert tried[0] == {"data": 4, "fsdp": 1, "context": 1, "tensor": 1}
    assert {"data": 1, "fsdp": 2, "context": 1, "tensor": 2} in tried
    assert {"data": 1, "fsdp": 1, "context": 4, "tensor": 1} in tried
    assert all(mesh["tensor"] <= 2 for mesh in tried)  # two groups


@pytest.mark.parametrize("flags", [["--num-slices", "2"], ["--json", "a.json"]])
def test_training_refuses_options_of_a_compile_without_a_slice(flags):
    result = subprocess.run(
        [sys.executable, "train.py", "tiny", *flags], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert flags[0] in result.stderr


def test_scripts_forward_to_the_command():
    assert forwarded("tiny", ["--steps", "1"]) == []
    expected = ["tiny", "v5e:2x2", "--mesh.fsdp", "4", "--json", "a.json"]
    for flag in (["--compile-for", "v5e:2x2"], ["--compile-for=v5e:2x2"]):
        assert forwarded("tiny", ["--mesh.fsdp", "4", *flag, "--json", "a.json"]) == expected
    command = read_command(expected, "eval")
    assert (command.slice, command.options.compile_step) == ("v5e:2x2", "eval")
    assert command.run == dataclasses.replace(CONFIGS["tiny"], mesh=MeshConfig(fsdp=4))


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.py", "tiny", "--compile-for", "v5z:2x2"],
        ["eval.py", "tiny", "--compile-for", "v5z:2x2"],
        ["-m", "gqe_jax.compile_for", "tiny", "v5z:2x2"],
    ],
)
def test_the_commands_name_an_unknown_topology(arguments):
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: compile_for is 'v5z:2x2'")
