"""The reader of TPU schedules, against a recorded dump whose bundles were counted by hand."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from gqe_kernels.chips import chip
from gqe_kernels.cycles.bundles import ScheduleError, parse_program, regions
from gqe_kernels.cycles.runs import causal_tiles
from kernels.benchmarks import tpu_schedule
from kernels.benchmarks.schedule import cases, report
from kernels.benchmarks.schedule.compare import Comparison
from kernels.benchmarks.schedule.compiler import _take_labels, load
from kernels.benchmarks.schedule.cost import cost

DATA = Path(__file__).parent / "data"
BUNDLES = (DATA / "tiny-packed-bundles-post-ra.txt").read_text()
UTILIZATION = (DATA / "tiny-pre-delay-utilization.txt").read_text()
# In the dump: 0x0 to 0xf and 0x3e to 0x46 run once; the loop from 0x10 branches at 0x39, with four
# delay slots; in it 0x18 jumps, after its delay slots, from 0x1d to 0x36.
ONCE, STEP, EVEN = 16 + 9, 13 + 8, 25
ISSUED_ONCE, ISSUED_STEP, ISSUED_EVEN = ONCE - 5, STEP - 5, EVEN - 17
TINY = "tests.benchmarks.tiny_case:tiny"


def tiny(bundles: str = BUNDLES, utilization: str = UTILIZATION, delay_slots: int = 4):
    program = parse_program("tiny.1", "custom-call", bundles, utilization)
    return program, regions(program, delay_slots)


def labelled():
    program, tree = tiny()
    trace = "{ %1 = vtrace 7 /* TraceMeStart(even) [ */  ;;  %v50_v4 = vld"
    _, traced = tiny(BUNDLES.replace("{ %v50_v4 = vld", trace))
    _take_labels(tree, traced)
    return program, tree


def test_regions_of_the_recorded_dump():
    program, root = tiny()
    assert len(program.bundles) == 71
    (loop,) = root.children
    (guard,) = loop.children
    assert [region.kind for region in root.walk()] == ["root", "loop", "guard"]
    assert [len(region.own()) for region in root.walk()] == [ONCE, STEP, EVEN]
    assert (loop.number, loop.trips) == (40, 8)
    assert (guard.number, guard.start, guard.stop) == (20, 0x1D, 0x36)
    issued = [sum(program.bundles[i].issued for i in region.own()) for region in root.walk()]
    assert issued == [ISSUED_ONCE, ISSUED_STEP, ISSUED_EVEN]


def test_units_of_the_recorded_dump():
    program, root = tiny()
    guard = list(root.walk())[-1]
    filled = {
        unit: sum(program.bundles[i].slots[u] for i in guard.own())
        for u, unit in enumerate(program.units)
    }
    # One load; two multiplications, an addition, exp2 and tanh, which take a VALU slot beside their
    # own; their results; one store.
    assert filled["VLOAD"] == 1
    assert filled["VALU"] == 5
    assert filled["EUP"] == 2
    assert filled["VPOP"] == 2
    assert filled["VSTORE"] == 1
    assert filled["MXU"] == filled["XLU"] == 0
    assert dict(zip(program.units, program.capacity, strict=True))["VALU"] == 4


def test_cycles_are_bundles_times_executions():
    case = cases.ScheduledCall(None, (), {"tiny": {"grid": 8, "even": 4}}, pairs=10, macs=262144)
    result = cost([labelled()], "m:tiny", "v6e", {}, case)
    assert result.cycles == ONCE + 8 * STEP + 4 * EVEN
    assert [region.executions for region in result.regions] == [1, 8, 4]
    assert result.regions[2].region == "even"
    assert result.cycles_per_pair == result.cycles / 10
    assert result.mac_share == pytest.approx(1 / result.cycles)  # v6e: 262,144 MACs a cycle
    shown = report.text(result)
    assert f"static cycles {result.cycles:,}" in shown
    assert re.search(r"even +8 +17 +4 +100 ", shown)
    assert result.issued == ISSUED_ONCE + 8 * ISSUED_STEP + 4 * ISSUED_EVEN


def test_a_case_without_counts_shows_regions_only():
    result = cost([labelled()], "m:tiny", "v6e", {}, cases.ScheduledCall(None, ()))
    bundles = [region.bundles for region in result.regions]
    assert bundles == [ISSUED_ONCE, ISSUED_STEP, ISSUED_EVEN]
    assert [r.bundles + r.waits for r in result.regions] == [ONCE, STEP, EVEN]
    assert "static cycles" not in report.text(result)


@pytest.mark.parametrize(
    ("bundles", "utilization", "message"),
    [
        (BUNDLES.replace("0x1b   :", "0x1c   :"), UTILIZATION, "not numbered"),
        (BUNDLES, UTILIZATION.strip().rsplit("\n", 1)[0], "71 bundles but utilisation for 70"),
        (BUNDLES, UTILIZATION.replace("== UTIL", "== SLOTS"), "unknown head"),
        (BUNDLES, UTILIZATION.replace("MXU, ", ""), "rows that are not 9 numbers"),
        (BUNDLES.replace("sbr.rel (%p81_p6)", "sbr.ind (%p81_p6)"), UTILIZATION, "form not known"),
        (
            BUNDLES.replace("bundleno = 54", "bundleno = 53"),
            UTILIZATION,
            "no known place",
        ),
    ],
)
def test_an_unknown_dump_is_an_error(bundles, utilization, message):
    with pytest.raises(ScheduleError, match=message):
        tiny(bundles, utilization)


def test_branches_that_do_not_nest_are_an_error():
    moved = BUNDLES.replace("bundleno = 54", "bundleno = 64")  # behind the loop's end
    moved = moved.replace("0x40   :  {", "0x40 PF:  {")
    with pytest.raises(ScheduleError, match="outside"):
        tiny(moved)


def test_too_few_delay_slots_are_an_error():
    with pytest.raises(ScheduleError, match="goes on after its delay slots"):
        tiny(BUNDLES.replace("0x3c   :  {}", "0x3c   : > {}"), delay_slots=2)


@pytest.mark.parametrize(
    ("executions", "message"),
    [
        ({"tiny": {"grid": 8, "odd": 4}}, "0 regions labelled 'odd'"),
        ({"tiny": {"grid": 5, "even": 4}}, "the grid has 5 steps"),
        ({"other": {"grid": 8}}, "a kernel 'tiny', which the case does not count"),
        ({"tiny": {"grid": 8}, "more": {"grid": 8}}, "no kernel named more"),
    ],
)
def test_counts_that_do_not_fit_are_an_error(executions, message):
    with pytest.raises(ScheduleError, match=message):
        cost([labelled()], "m:tiny", "v6e", {}, cases.ScheduledCall(None, (), executions, 1, 1))


@pytest.mark.parametrize(("block_q", "block_kv"), [(4, 4), (4, 8), (8, 4), (2, 16), (16, 16)])
def test_causal_tiles(block_q, block_kv):
    seen = np.tril(np.ones((16, 16), bool))
    blocks = seen.reshape(16 // block_q, block_q, 16 // block_kv, block_kv).swapaxes(1, 2)
    full, some = blocks.all((2, 3)), blocks.any((2, 3))
    assert causal_tiles(16, block_q, block_kv) == (full.sum(), (some & ~full).sum())


def test_executions_of_splash_attention():
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask_info as mask_info,
    )

    case = cases.splash(
        2048,
        128,
        heads=4,
        kv_heads=2,
        block_q=512,
        block_kv=1024,
        block_q_dkv=1024,
        block_kv_dkv=256,
        block_kv_dkv_compute=256,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((2048, 2048)) for _ in range(4)])
    for name, blocks in (
        ("splash_mha_fwd_residuals", (512, 1024)),
        ("splash_mha_dkv_no_residuals", (1024, 256)),
    ):
        block_mask = np.asarray(mask_info.process_mask(mask, blocks)[0].block_mask)
        block_mask = np.broadcast_to(block_mask, (4, *block_mask.shape[1:]))
        assert case.executions[name]["run"] == np.count_nonzero(block_mask)
        assert case.executions[name]["grid"] == block_mask.size
    assert case.executions["splash_mha_fwd_residuals"]["init"] == 4 * 4
    assert case.executions["splash_mha_dkv_no_residuals"]["init"] == 2 * 8
    assert case.pairs == 4 * 2048 * 2049 / 2
    assert case.macs == 7 * 128 * case.pairs


def test_launches_of_the_backward_pass_share_the_tiles():
    sizes = {"backward_q": 256, "backward_kv": 512, "d_query_bytes": 2**23}
    runs = cases.gqe(4096, 128, "v6e", training=True, **sizes).executions["gqe_backward"]
    # A block's dQ is 9 x 128 x 256 floats, 7 blocks are 8 MiB: 3 launches of 6 share the 16.
    assert (runs["calls"], runs["grid"]) == (3, 3 * 8 * 6)
    assert (runs["interior"], runs["masked"]) == causal_tiles(4096, 256, 512)
    assert (runs["start_keys"], runs["finish_queries"]) == (3 * 8, 3 * 6)


def test_launches_of_a_kernel_are_counted():
    case = cases.ScheduledCall(
        None, (), {"tiny": {"grid": 24, "calls": 3, "even": 4}}, pairs=10, macs=100
    )
    result = cost([labelled()], "m:tiny", "v6e", {}, case)
    assert result.cycles == 3 * ONCE + 24 * STEP + 4 * EVEN


def test_reports_of_a_comparison(tmp_path):
    case = cases.ScheduledCall(None, (), {"tiny": {"grid": 8, "even": 4}}, pairs=10, macs=100)
    splash = cost([labelled()], "m:splash", "v6e", {"block_q": 512, "block_kv": 1024}, case)
    case = cases.ScheduledCall(None, (), {"tiny": {"grid": 8, "even": 0}}, pairs=10, macs=100)
    gqe = cost([labelled()], "m:gqe", "v6e", {}, case)
    comparison = Comparison("v6e", 128, 4096, False, splash, gqe, splash, {"q 512": 1})
    rows = [report.row(comparison)]
    ratio = (ONCE + 8 * STEP + 4 * EVEN) / (ONCE + 8 * STEP)
    assert (
        f"| 4,096 | forward | 512 × 1024 | 293 | 293 | 193 | **{ratio:.2f}** |"
        in report.markdown(rows)
    )
    report.write_json(tmp_path / "deep" / "x.json", "python", rows)
    (result,) = json.loads((tmp_path / "deep" / "x.json").read_text())["results"]
    assert result["ratio"] == pytest.approx(ratio)
    assert result["cycles"]["splash"] == 293
    report.plot(tmp_path / "x.png", rows)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["tpu_schedule", "tpu_schedule_training"])
def test_the_readme_quotes_the_kept_results(name):
    rows = json.loads((tpu_schedule.RESULTS / f"{name}.json").read_text())["results"]
    readme = (tpu_schedule.RESULTS.parents[1] / "README.md").read_text()
    assert report.markdown(rows) in readme


def test_peak_is_the_published_one():
    # https://docs.cloud.google.com/tpu/docs: bf16 TFLOP/s of a chip, at the clock in GHz.
    for name, teraflops, gigahertz in (("v5e", 197, 1.5), ("v5p", 459, 1.75), ("v6e", 918, 1.75)):
        peak = 2 * chip(name).peak_macs * chip(name).cores * gigahertz / 1e3
        assert peak == pytest.approx(teraflops, rel=0.01)


def test_names_that_are_not_known():
    with pytest.raises(ValueError, match="chip is 'v9'; it must be one of 'v5e'"):
        chip("v9")
    with pytest.raises(ValueError, match="case is 'nowhere:f'; it must be 'module:function'"):
        load("nowhere:f")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "0"], "--length is 0; it must be positive"),
        (["--set", "q=many"], "--set has 'q=many'; it must be NAME=VALUE"),
        (["--plot", "x.png"], "add --compare splash"),
    ],
)
def test_the_command_line_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tpu_schedule.main(arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.libtpu
def test_compiles_and_reads_a_kernel(tmp_path, capsys):
    path = tmp_path / "tiny.json"
    tpu_schedule.main(["--case", TINY, "--chip", "v6e", "--json", str(path)])
    (result,) = json.loads(path.read_text())["results"]
    runs = {region["region"]: region["executions"] for region in result["regions"]}
    assert runs == {"call": 1, "grid": 8, "even": 4}
    assert result["cycles"] == sum(
        (r["bundles"] + r["waits"]) * r["executions"] for r in result["regions"]
    )
    assert all(0 <= busy <= 1 for r in result["regions"] for busy in r["busy"].values())
    assert f"static cycles {result['cycles']:,}" in capsys.readouterr().out
