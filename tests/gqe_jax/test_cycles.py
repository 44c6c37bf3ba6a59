"""Static cycles of compiled programs, counted by hand and against compiles of other sizes."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from gqe_jax.compile_for import hlo
from gqe_jax.compile_for.collectives import Collective, collectives
from gqe_jax.compile_for.cycle_table import as_json, table
from gqe_jax.compile_for.cycles import Cycles, PartCycles, cycles, part_of, pass_of
from gqe_jax.compile_for.estimate import as_scheduled
from gqe_jax.compile_for.kernel_cycles import KernelCycles, same_kernels
from gqe_jax.compile_for.topology import get_topology
from gqe_jax.errors import UserError
from gqe_kernels.chips import CHIPS

# As libtpu writes it, shortened. A loop of 7: a product fused with a norm, a copy that the compiler
# made of its result, and a fusion that only pads; after it a reduction of the loss.
PROGRAM = """\
%fused.1 (p.1: bf16[8,64], p.2: bf16[64,128]) -> bf16[8,128] {
  %p.1 = bf16[8,64]{1,0} parameter(0)
  %p.2 = bf16[64,128]{1,0} parameter(1)
  %convolution.1 = bf16[8,128]{1,0} convolution(%p.1, %p.2), dim_labels=bf_io->bf, metadata={op_name="jit(f)/jvp()/while/body/mlp/dot_general"}
  ROOT %multiply.1 = bf16[8,128]{1,0} multiply(%convolution.1, %convolution.1), metadata={op_name="jit(f)/jvp()/while/body/norm/mul"}
}

%fused.2 (p.3: bf16[8,128]) -> bf16[8,256] {
  %p.3 = bf16[8,128]{1,0} parameter(0)
  %zero = bf16[] constant(0)
  ROOT %pad.1 = bf16[8,256]{1,0} pad(%p.3, %zero), padding=0_0x0_128, metadata={op_name="jit(f)/transpose(jvp())/while/body/checkpoint/rematted_computation/projections/rope/pad"}
}

%body (p.4: (s32[], bf16[8,64], bf16[64,128])) -> (s32[], bf16[8,64], bf16[64,128]) {
  %p.4 = (s32[], bf16[8,64]{1,0}, bf16[64,128]{1,0}) parameter(0)
  %gte.1 = s32[] get-tuple-element(%p.4), index=0
  %gte.2 = bf16[8,64]{1,0} get-tuple-element(%p.4), index=1
  %gte.3 = bf16[64,128]{1,0} get-tuple-element(%p.4), index=2
  %fusion.1 = bf16[8,128]{1,0} fusion(%gte.2, %gte.3), kind=kOutput, calls=%fused.1, metadata={op_name="jit(f)/jvp()/while/body/norm/mul"}, backend_config={"window_config":{"estimated_cycles":"1000","iteration_bounds":[]}}
  %copy.1 = bf16[8,128]{0,1} copy(%fusion.1), backend_config={"window_config":{"estimated_cycles":"30"}}
  %fusion.2 = bf16[8,256]{1,0} fusion(%copy.1), kind=kLoop, calls=%fused.2, backend_config={"window_config":{"estimated_cycles":"200"}}
  ROOT %tuple.1 = (s32[], bf16[8,64]{1,0}, bf16[64,128]{1,0}) tuple(%gte.1, %gte.2, %gte.3)
}

%condition (p.5: (s32[], bf16[8,64], bf16[64,128])) -> pred[] {
  %p.5 = (s32[], bf16[8,64]{1,0}, bf16[64,128]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (p.6: bf16[8,64], p.7: bf16[64,128]) -> f32[] {
  %p.6 = bf16[8,64]{1,0} parameter(0)
  %p.7 = bf16[64,128]{1,0} parameter(1)
  %constant.1 = s32[] constant(0)
  %tuple.2 = (s32[], bf16[8,64]{1,0}, bf16[64,128]{1,0}) tuple(%constant.1, %p.6, %p.7)
  %while.1 = (s32[], bf16[8,64]{1,0}, bf16[64,128]{1,0}) while(%tuple.2), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %iota.1 = f32[8]{0} iota(), iota_dimension=0, backend_config={"window_config":{"estimated_cycles":"4"}}
  ROOT %reduce.1 = f32[] reduce(%iota.1, %iota.1), metadata={op_name="jit(f)/transpose(jvp(loss))/reduce_sum;jit(f)/optimizer/add"}, backend_config={"window_config":{"estimated_cycles":"50"}}
}
"""  # noqa: E501
FLOPS = 2 * 8 * 64 * 128


def test_cycles_are_counted_by_hand():
    found = cycles(hlo.parse(PROGRAM))
    # The fusion goes by its product, not by its root; the copy by what it reads.
    assert {key: (own.products, own.copies, own.rest) for key, own in found.parts.items()} == {
        ("mlp", "forward"): (7 * 1000, 7 * 30, 0),
        ("rope", "recomputed"): (0, 7 * 200, 0),
        ("loss", "backward"): (0, 0, 50),
        ("other", "forward"): (0, 0, 4),
    }
    assert found.parts["mlp", "forward"].flops == 7 * FLOPS
    assert found.total.cycles == 7 * 1230 + 54


@pytest.mark.parametrize(
    ("name", "part", "pass_"),
    [
        ("jit(f)/jvp()/while/body/projections/rope/mul", "rope", "forward"),
        ("jit(f)/transpose(jvp(mlp))/dot_general", "mlp", "backward"),
        ("jit(f)/transpose(jvp())/checkpoint/rematted_computation/norm/mul", "norm", "recomputed"),
        ("jit(f)/layout/attention_mask/add", "other", "forward"),  # words, not parts of them
        ("", "other", "forward"),
    ],
)
def test_part_and_pass_of_a_name(name, part, pass_):
    assert (part_of(name), pass_of(name)) == (part, pass_)


def test_table_and_json_have_kernels_and_what_is_not_counted():
    found, chip = cycles(hlo.parse(PROGRAM)), CHIPS["v5e"]
    kernels = [
        KernelCycles("gqe_forward", "attention", "forward", 16, 500.0),
        KernelCycles("other_kernel", "mlp", "forward", 2, None, "other_kernel: no table"),
    ]
    values = as_json(found, kernels, chip)
    assert (values["xla"], values["kernels"]) == (7 * 1230 + 54, 8000)
    assert values["not_counted"] == {"other_kernel": "other_kernel: no table"}
    (mlp,) = (each for each in values["parts"] if each["part"] == "mlp")
    assert mlp["ideal_mxu"] == 7 * FLOPS / 2 / (4 * 128 * 128)  # v5e: 4 units of 128 x 128
    lines = table(found, kernels, chip).splitlines()
    assert any(line.split()[0] == "mlp" and "unknown" in line for line in lines)
    assert lines[-1].strip() == "other_kernel: no table"


def test_a_loop_whose_runs_are_not_known_is_named():
    text = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"7"}}', "")
    with pytest.raises(UserError, match=r"loop while\.1 has no known_trip_count"):
        cycles(hlo.parse(text))


# A gather that two fusions overlap, one of them between; a start and a done with a copy between; a
# sum that nothing overlaps; a sum on the SparseCore, which has its operand from the update on.
COLLECTIVES = """\
%begins (a: f32[8,128]) -> f32[16,128] {
  %a = f32[8,128]{1,0} parameter(0)
  ROOT %all-gather.1 = f32[16,128]{1,0} all-gather(%a), replica_groups={{0,1}}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%ends (b: f32[8,128]) -> f32[16,128] {
  %b = f32[8,128]{1,0} parameter(0)
  ROOT %all-gather.2 = f32[16,128]{1,0} all-gather(%b), replica_groups={{0,1}}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%offloaded (d: f32[8,128]) -> f32[4,128] {
  %d = f32[8,128]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = f32[4,128]{1,0} reduce-scatter(%d), replica_groups={{0,1}}, dimensions={0}, to_apply=%sum
}, execution_thread="sparsecore"

ENTRY %main (c: f32[8,128]) -> f32[8,128] {
  %c = f32[8,128]{1,0} parameter(0)
  %offloaded.call-start = ((), (), (s32[1]{0})) call-start(), async_execution_thread="sparsecore", to_apply=%offloaded
  %fusion.1 = f32[16,128]{1,0} fusion(%c), kind=kCustom, calls=%begins, backend_config={"estimated_cycles":"5"}
  %copy.1 = f32[8,128]{1,0} copy(%c), backend_config={"estimated_cycles":"100"}
  %fusion.2 = f32[16,128]{1,0} fusion(%c), kind=kCustom, calls=%ends, backend_config={"estimated_cycles":"7"}
  %collective-permute-start = (f32[8,128]{1,0}, f32[8,128]{1,0}) collective-permute-start(%c), source_target_pairs={{0,1},{1,0}}
  %copy.2 = f32[8,128]{1,0} copy(%c), backend_config={"estimated_cycles":"40"}
  %collective-permute-done = f32[8,128]{1,0} collective-permute-done(%collective-permute-start)
  %offloaded.call-update = ((f32[8,128]{1,0}), f32[4,128]{1,0}) call-update(%offloaded.call-start, %c)
  %copy.3 = f32[8,128]{1,0} copy(%c), backend_config={"estimated_cycles":"900"}
  %offloaded.call-done = f32[4,128]{1,0} call-done(%offloaded.call-update)
  ROOT %all-reduce.1 = f32[8,128]{1,0} all-reduce(%c), replica_groups={{0,1}}, to_apply=%sum
}
"""  # noqa: E501


def test_what_runs_beside_a_collective_hides_it():
    found = collectives(hlo.parse(COLLECTIVES), {"data": 2})
    assert [(one.kind, one.hidden_cycles) for one in found] == [
        ("all-gather", 5 + 100 + 7),
        ("collective-permute", 40),
        ("reduce-scatter", 900),
        ("all-reduce", 0),
    ]
    assert found[2].bytes == 8 * 128 * 4 / 2


def test_a_step_as_scheduled_is_that_of_a_hand_worked_case():
    """v5e: 1 s of XLA, 2 s of kernels, and 3 s of links of which 1 s is hidden, twice."""
    chip = CHIPS["v5e"]
    second = round(chip.clock)
    static = Cycles({("mlp", "forward"): PartCycles(products=second)})
    kernels = [
        KernelCycles("gqe_forward", "attention", "forward", 16, second / 8),
        KernelCycles("gqe_backward", "attention", "backward", 16, None, "not known"),
    ]
    gather = Collective("all-gather", ("data",), (0, 1), 300e9, 2, hidden_cycles=second)
    sums = Collective("all-reduce", ("data",), (), 3.125e9, 1, between_slices=True)
    found = as_scheduled(
        static,
        kernels,
        [(gather, 2), (sums, 0)],
        chip,
        devices=10,
        tokens=8000,
        model_flops=10 * 197e12,
    )
    seconds = (found.xla, found.kernels, found.exposed, found.overlapped)
    assert seconds == pytest.approx((1, 2, 2 * (3 - 1) + 1, 2))
    assert found.seconds == pytest.approx(8)
    assert found.tokens_per_second == pytest.approx(1000)
    assert found.model_flop_utilisation == pytest.approx(1 / 8)
    assert found.not_counted == ("gqe_backward",)


@pytest.mark.parametrize(("name", "gigahertz"), [("v5e", 1.5), ("v5p", 1.75), ("v6e", 1.75)])
def test_clock_is_the_published_one(name, gigahertz):
    assert CHIPS[name].clock / 1e9 == pytest.approx(gigahertz, rel=0.01)


@pytest.mark.libtpu
def test_a_compiled_loop_costs_its_iterations():
    """A product and a tanh, 7 and 14 times; what is around the loop costs the same."""

    def compiled(times: int) -> PartCycles:
        @jax.named_scope("mlp")
        def layer(x, w):
            return jnp.tanh(x @ w), None

        device = get_topology("v5e:2x2").devices[0]
        sharding = jax.sharding.SingleDeviceSharding(device)
        x, w = (
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
            for shape in ((512, 512), (times, 512, 512))
        )
        done = jax.jit(lambda x, w: jax.lax.scan(layer, x, w)[0]).lower(x, w).compile()
        return cycles(hlo.parse(done.as_text())).parts["mlp", "forward"]

    seven, fourteen = compiled(7), compiled(14)
    assert seven.flops == 7 * 2 * 512**3
    assert fourteen.products == 2 * seven.products
    ideal = 7 * 512**3 / CHIPS["v5e"].peak_macs
    assert ideal < seven.products < 6 * ideal


# A process of its own: libtpu takes its flags once, and another test may have loaded it.
LAYER = """
import json, sys
from experiments.cycles import count_layer
from gqe_jax.compile_for.topology import get_topology
from gqe_jax.runs import find_config
config = find_config("gqe_250m").model.attention
counted = count_layer(config, get_topology("v5e:2x2"), 16, 2048, backward=False)
json.dump([[k.name, k.part, k.pass_, k.cycles, k.reason] for k in counted.kernels], sys.stdout)
"""


@pytest.mark.slow
@pytest.mark.libtpu
def test_the_kernels_of_a_layer_are_counted():
    command = [sys.executable, "-c", LAYER]
    environment = {n: v for n, v in os.environ.items() if n != "LIBTPU_INIT_ARGS"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    kernels = {name: rest for name, *rest in json.loads(done.stdout)}
    assert kernels.keys() == {"gqe_project", "gqe_forward"}
    part, pass_, counted, reason = kernels["gqe_project"]
    assert (part, pass_, reason) == ("projections", "forward", "")
    # 32 heads in the weights, and a row of 128 lanes for the shared query and the router.
    needed = 16 * 2048 * 1024 * (32 * 64 + 128) / CHIPS["v5e"].peak_macs
    assert needed < counted < 1.1 * needed
    part, pass_, counted, reason = kernels["gqe_forward"]
    assert (part, pass_, reason) == ("attention", "forward", "")
    # 16 sequences, eight routed heads and the shared one; half of 128 lanes of the units are idle.
    pairs = 16 * 9 * 2048 * 2049 / 2
    needed = 2 * 2 * 64 * pairs / CHIPS["v5e"].peak_macs
    assert needed < counted < 2 * needed


def test_a_kernel_that_is_traced_again_is_found_by_what_it_returns():
    def call(name, body, length):
        return hlo.Instruction(
            name,
            "custom-call",
            (hlo.Array("bf16", (8, length), True),),
            ("a", "b"),
            f'custom_call_target="tpu_custom_call", backend_config={{"body":"{body}"}}',
            False,
        )

    calls = [
        call("mha.1", "x", 64),
        call("mha.2", "x", 64),
        call("mha.3.remat", "y", 64),
        call("mha.4", "z", 128),
        call("other.1", "w", 64),
    ]
    found = same_kernels(calls)
    assert found["mha.1"][:2] == ["mha.1", "mha.2"]
    assert set(found["mha.3.remat"]) == {"mha.1", "mha.2", "mha.3.remat"}
    assert found["mha.3.remat"][0] == "mha.3.remat"
    assert set(found["mha.4"]) == {"mha.4"}
    assert set(found["other.1"]) == {"other.1"}
