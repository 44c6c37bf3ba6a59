"""The benchmark of prefill: what it counts, whom it compares, what it keeps."""

import dataclasses
import json
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from gqe_jax.compile_for import hlo
from gqe_jax.compile_for.costs import count
from kernels.benchmarks import prefill
from kernels.benchmarks.command_line import typed
from kernels.benchmarks.speed import document, figure, timing
from kernels.benchmarks.speed.cases import FULL, SMALL, SpeedCase, op_cases
from kernels.benchmarks.speed.op import attention_flops, op

OP = SpeedCase("op", training=False, length=32, batch=2, head_dim=8)
HEAD = {"command": "c", "device": "d", "platform": "p", "versions": {}, "settings": {"tokens": 64}}


def test_flops_of_attention_are_those_of_the_pairs_that_the_mask_lets_through():
    seen = int(np.tri(5).sum())
    # 3 sequences, 2 heads; each of QK and PV multiplies and adds 8 numbers for each pair.
    assert attention_flops(2, 8, 5, 3, training=False) == 3 * 2 * seen * 2 * 8 * 2
    assert attention_flops(2, 8, 5, 3, training=True) == 3 * 2 * seen * 7 * 8 * 2


def test_every_case_has_a_name_of_its_own():
    for scale in (FULL, SMALL):
        found = op_cases(scale)
        assert len({case.name for case in found}) == len(found)
    assert {case.length for case in op_cases(FULL) if case.level == "op"} == {
        1024 * 2**i for i in range(8)
    }


def test_repeated_work_is_done_again_each_time():
    a = jax.random.normal(jax.random.key(0), (16, 16))
    program = jax.jit(timing.repeated(lambda a, b: jnp.tanh(a @ b), 5)).lower(a, a).compile()
    assert count(hlo.parse(program.as_text())).product_flops == 5 * 2 * 16**3
    np.testing.assert_allclose(program(a, a)[0], np.tanh(a @ a), rtol=1e-5)


class Clock:
    """Time that passes only in what is timed."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def __call__(self):
        return self.now

    def contender(self, name, side, seconds, error=None, **options):
        def call():
            self.now += seconds
            self.log.append(name)
            return jnp.zeros(1), jnp.zeros(())

        def lower(times):
            assert times == 1
            if error:
                raise error
            return types.SimpleNamespace(compile=lambda _: Program(call))

        return Lowered(name, side, lower, (), flops=2e12, options=options)


class Lowered(timing.Contender):
    def lower(self, times):
        return self.function(times)


class Program:
    def __init__(self, call):
        self.call = call

    def __call__(self):
        return self.call()

    def memory_analysis(self):
        return types.SimpleNamespace(
            argument_size_in_bytes=5,
            output_size_in_bytes=3,
            temp_size_in_bytes=4,
            alias_size_in_bytes=2,
        )


def measured(clock):
    found = [
        clock.contender("ours", "gqe", 1.0),
        clock.contender("blocks", "dense", 4.0, block=1),
        clock.contender("blocks", "dense", 2.0, block=2),
        clock.contender("near", "dense", 3.0),
        clock.contender("hopeless", "dense", 9.0),
        clock.contender("broken", "dense", 0.0, error=ImportError("no such kernel\nat all")),
        clock.contender("matmul", "matmul", 0.5),
    ]
    return timing.time_contenders(
        found,
        rounds=3,
        seconds=0.1,
        flops_per_second=1e12,
        progress=lambda _: None,
        clock=clock,
    )


def test_contenders_take_turns_at_their_best_options():
    clock = Clock()
    outcomes = measured(clock)
    assert [len(outcome.seconds) for outcome in outcomes] == [3, 0, 3, 3, 0, 0, 3]
    assert clock.log[-12:] == [
        *("ours", "blocks", "near", "matmul"),
        *("blocks", "near", "matmul", "ours"),
        *("near", "matmul", "ours", "blocks"),
    ]
    assert outcomes[0].memory == 5 + 3 + 4 - 2


def test_a_record_has_ratio_rates_and_whatever_failed():
    outcomes = measured(Clock())
    record = json.loads(json.dumps(document.record(OP, outcomes, seconds=1.0)))
    assert record["best"] == {"gqe": "ours", "dense": "blocks"}
    assert record["ratio"] == {"q1": 2.0, "median": 2.0, "q3": 2.0}
    assert record["matmul_tflops"] == 4.0
    entries = {one["name"]: one for one in record["contenders"]}
    assert (entries["ours"]["tflops"], entries["ours"]["share_of_matmul"]) == (2.0, 0.5)
    assert entries["blocks"]["options"] == {"block": 2}
    assert entries["blocks"]["tried"] == [{"options": {"block": 1}, "error": None, "seconds": 4.0}]
    assert entries["hopeless"]["screened_seconds"] == 9.0
    assert entries["broken"]["error"] == "ImportError: no such kernel"
    assert "broken" in document.row(record)


def test_layers_are_compared_by_the_best_kernels_of_the_op_at_the_nearest_length():
    record = document.record(OP, measured(Clock()), seconds=1.0)
    kept = {("gqe", "ours"): {}, ("dense", "blocks"): {"block": 2}, ("dense", "near"): {}}
    others = [
        {**record, "contenders": [], **changes}
        for changes in ({"length": 256}, {"training": True}, {"top_k": 2}, {"level": "layer"})
    ]
    found = {"cases": [*others, record]}
    layer = dataclasses.replace(OP, level="layer")
    assert document.best_options(found, layer) == kept
    assert document.best_options(found, dataclasses.replace(layer, length=64)) == kept
    assert document.best_options(found, dataclasses.replace(layer, length=512)) == {}
    assert document.best_options({"cases": others}, dataclasses.replace(layer, head_dim=4)) == {}


def test_a_slow_contender_is_tried_twice():
    clock = Clock()
    measured(clock)
    assert clock.log.count("hopeless") == 2
    assert clock.log.count("matmul") == 1 + timing.SCREEN + 3


def test_a_lost_device_ends_the_case():
    clock = Clock()
    bad = clock.contender("bad", "dense", 1.0, error=ValueError("illegal address"), block=1)
    given = {"rounds": 2, "seconds": 1.0, "flops_per_second": 1e12, "progress": lambda _: None}
    (outcome,) = timing.time_contenders([bad], **given)
    assert outcome.error == "ValueError: illegal address"

    def lost():
        raise RuntimeError("sticky")

    message = r"no work after bad \(dense, block 1\): ValueError: illegal address"
    with pytest.raises(timing.DeviceLost, match=message):
        timing.time_contenders([bad], **given, probe=lost)


def test_a_hanging_contender_ends_the_process(capsys):
    left = threading.Event()
    slow = Clock().contender("slow", "gqe", 1.0)
    with timing.watched(slow, seconds=0.01, leave=lambda code: left.set()):
        assert left.wait(10)
    assert "slow (gqe) has not ended in 0.01 seconds; continue with --without slow" in (
        capsys.readouterr().err
    )


def test_kernels_that_do_not_run_here_are_recorded_with_their_errors():
    found = op(OP, SMALL, "gpu")
    names = {"tokamax", "attention_mgpu", "cudnn"}
    found = [one for one in found if one.name in names]
    outcomes = timing.time_contenders(
        found, rounds=2, seconds=1e-9, flops_per_second=1.0, progress=lambda _: None
    )
    assert {outcome.contender.name for outcome in outcomes} == names
    assert all(outcome.error and not outcome.seconds for outcome in outcomes)


SCALE = dataclasses.replace(SMALL, tokens=64, matmul=32, seconds=1e-4)
TWO = [OP, dataclasses.replace(OP, length=16)]


def run(path, *options, build=lambda case, _: op(case, SCALE, "cpu"), **given):
    arguments = ["--json", str(path), "--rounds", "2", *options]
    parsed = tyro.cli(prefill.PrefillOptions, args=arguments)
    prefill.run(parsed, "python prefill", SCALE, TWO, build, **given)


def test_a_cut_run_goes_on_where_it_was(tmp_path, capsys):
    path = tmp_path / "out" / "prefill.json"

    def interrupted(case, _):
        if case.length == 16:
            raise KeyboardInterrupt
        return op(case, SCALE, "cpu")

    with pytest.raises(KeyboardInterrupt):
        run(path, "--without", "jax.nn", build=interrupted)
    (first,) = json.loads(path.read_text())["cases"]
    run(path, "--without", "jax.nn")
    whole = json.loads(path.read_text())
    assert whole["command"] == "python prefill"
    assert whole["versions"]["jax"] == jax.__version__
    assert whole["cases"][0] == first
    assert [case["length"] for case in whole["cases"]] == [32, 16]
    assert "jax.nn" not in path.read_text()
    for case in whole["cases"]:
        assert case["ratio"]["q1"] <= case["ratio"]["median"] <= case["ratio"]["q3"]
        for one in case["contenders"]:
            assert one["error"] is None
            assert one["memory_bytes"] > 0
    deviations = [one["deviation"] for one in first["contenders"]]
    assert max(deviations) < 1e-4
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    run(path, "--without", "jax.nn")
    assert "2 cases, 0 to do" in capsys.readouterr().err
    assert json.loads(path.read_text()) == whole


def test_the_command_is_kept_as_it_was_typed():
    command = typed("kernels.benchmarks.prefill", ["--json", "a b.json"])
    assert command == "python -m kernels.benchmarks.prefill --json 'a b.json'"


def test_a_spent_budget_leaves_the_rest(tmp_path, capsys):
    times = iter([0.0] + [100.0 * i for i in range(1, 20)])
    run(tmp_path / "p.json", "--budget-minutes", "5", clock=lambda: next(times))
    assert len(json.loads((tmp_path / "p.json").read_text())["cases"]) == 1
    assert "1 cases are left: run again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "holds no results"),
        (json.dumps(HEAD), "holds no results"),
        (json.dumps({**HEAD, "cases": [], "device": "other"}), "device is 'other'.*'d' here"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, text, message):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(document.DocumentError, match=message):
        document.load(path, HEAD)


def test_the_figure_has_a_line_for_each_pass_and_head_size():
    def case(length, ratio, **changes):
        record = {"level": "op", "training": False, "batch": 64 // length, "length": length}
        record |= {"head_dim": 64, "top_k": 1, "ratio": ratio and {"median": ratio}}
        return record | changes

    found = figure.lines(
        HEAD
        | {
            "cases": [
                case(32, 1.5),
                case(16, 1.2),
                case(16, 1.0, batch=1),  # a short sequence alone
                case(16, 1.1, training=True),
                case(16, 1.3, level="layer"),
                case(64, None),
            ]
        },
        "op",
    )
    assert found == {
        "forward, D = 64, k = 1": [(16, {"median": 1.2}), (32, {"median": 1.5})],
        "forward + backward, D = 64, k = 1": [(16, {"median": 1.1})],
    }


def unwrapped(error):
    return " ".join(error.replace("│", " ").split())


def test_bad_options_are_named(capsys):
    for arguments, message in (
        (["--rounds", "1"], "rounds is 1; a spread needs at least 2"),
        (["--budget-minutes", "-2"], "budget_minutes is -2.0; it must be positive"),
        (["--levels", "blocks"], "levels has blocks, which are a GPU kernel's; there is no GPU"),
    ):
        with pytest.raises(SystemExit):
            prefill.main(arguments)
        assert message in unwrapped(capsys.readouterr().err)


def test_block_sizes_are_tried_of_the_gpu_kernel_alone():
    found = op(SpeedCase("blocks", False, 128, 1, 64), SMALL, "gpu")
    assert {(one.name, one.side) for one in found} == {("pallas_gpu", "gqe")}
    assert len({str(one.options) for one in found}) == len(found) > 1
