"""The benchmark of prefill: what it counts, whom it compares, what it keeps."""

import dataclasses
import json
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import projections
from gqe_jax import AttentionConfig, GroupedQueryAttention, GroupedQueryExperts
from gqe_jax.compile_for import hlo
from gqe_jax.compile_for.costs import count
from kernels.benchmarks import prefill
from kernels.benchmarks.speed import contenders, document, experts, figure, timing, whole, work
from kernels.benchmarks.speed.cases import FULL, SMALL, Case, cases
from kernels.benchmarks.speed.peers import peers

OP = Case("op", training=False, length=32, batch=2, head_dim=8)
HEAD = {"command": "c", "device": "d", "platform": "p", "versions": {}, "settings": {"tokens": 64}}


def test_flops_of_attention_are_those_of_the_pairs_that_the_mask_lets_through():
    seen = int(np.tri(5).sum())
    # 3 sequences, 2 heads; each of QK and PV multiplies and adds 8 numbers for each pair.
    assert work.attention(2, 8, 5, 3, training=False) == 3 * 2 * seen * 2 * 8 * 2
    assert work.attention(2, 8, 5, 3, training=True) == 3 * 2 * seen * 7 * 8 * 2


def test_flops_of_a_layer_by_hand():
    config = AttentionConfig(embed_dim=10, num_query_experts=4, num_kv_heads=2, head_dim=2)
    # Columns: 4 experts, 2 keys, 2 values and a shared query of 2, a router of 4; rows of W_O: 4
    # slots of 2. 3 of 5 heads are active; 2 tokens make 3 pairs.
    columns = 2 * (4 + 2 + 2 + 1) + 4 + 2 * 4
    assert work.layer(config, 2, 1, training=False) == 2 * 2 * 10 * columns + 3 * 3 * 2 * 2 * 2
    assert work.layer(config, 2, 1, training=True) == 3 * 2 * 2 * 10 * columns + 3 * 3 * 7 * 2 * 2
    dense = dataclasses.replace(config, variant="gqa")
    columns = 2 * (4 + 2 + 2) + 2 * 4
    assert work.layer(dense, 2, 1, training=False) == 2 * 2 * 10 * columns + 4 * 3 * 2 * 2 * 2


def test_a_prefill_has_the_logits_of_one_token():
    flops = [work.model(SMALL.model, 4, 2, training=training) for training in (False, True)]
    logits = 2 * SMALL.model.embed_dim * SMALL.model.vocab_size
    assert flops[1] == 3 * (flops[0] + 2 * 3 * logits)


def test_every_case_has_a_name_of_its_own_and_a_geometry():
    for scale in (FULL, SMALL):
        found = cases(scale)
        assert len({case.name for case in found}) == len(found)
        for case in found:
            attention = case.model(scale, "gqe").attention
            if case.level != "projection":  # with k = 1 and with k = 2
                assert (attention.num_active_heads, attention.num_query_experts) == (9, 16)
    assert {case.length for case in cases(FULL) if case.level == "op"} == {
        1024 * 2**i for i in range(8)
    }


def test_what_the_speeds_to_reach_need_comes_first():
    found = [(c.level, c.training, c.head_dim, c.length, c.top_k) for c in cases(FULL)]
    table = [1024 * n for n in (2, 4, 8, 32, 128)]
    rows = (("op", False), ("layer", False), ("op", True))
    assert found[:15] == [(*row, 64, length, 1) for row in rows for length in table]
    assert found[15:17] == [("op", False, head_dim, 16_384, 1) for head_dim in (64, 128)]
    assert found[17:19] == [("step", True, 64, length, 1) for length in (2048, 16_384)]


def test_repeated_work_is_done_again_each_time():
    a = jax.random.normal(jax.random.key(0), (16, 16))
    program = jax.jit(timing.repeated(lambda a, b: jnp.tanh(a @ b), 5)).lower(a, a).compile()
    assert count(hlo.parse(program.as_text())).product_flops == 5 * 2 * 16**3
    np.testing.assert_allclose(program(a, a)[0], np.tanh(a @ a), rtol=1e-5)


class Clock:
    """Time that passes only in what is timed."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: self.now))

    def contender(self, name, side, seconds, error=None, **options):
        def call():
            self.now += seconds
            self.log.append(name)
            return jnp.zeros(1), jnp.zeros(())

        def lower(times):
            assert times == 1
            if error:
                raise error
            return types.SimpleNamespace(compile=lambda compiler_options: Program(call))

        return timing.Contender(name, side, lower, (), flops=2e12, options=options)


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
        found, rounds=3, seconds=0.1, flops_per_second=1e12, progress=lambda _: None
    )


def test_contenders_take_turns_at_their_best_options(monkeypatch):
    clock = Clock(monkeypatch)
    outcomes = measured(clock)
    assert [len(outcome.seconds) for outcome in outcomes] == [3, 0, 3, 3, 0, 0, 3]
    assert clock.log[-12:] == [
        *("ours", "blocks", "near", "matmul"),
        *("blocks", "near", "matmul", "ours"),
        *("near", "matmul", "ours", "blocks"),
    ]
    assert outcomes[0].memory == 5 + 3 + 4 - 2


def test_a_record_has_ratio_rates_and_whatever_failed(monkeypatch):
    outcomes = measured(Clock(monkeypatch))
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


def test_layers_are_compared_by_the_best_kernels_of_the_op_at_the_nearest_length(monkeypatch):
    record = document.record(OP, measured(Clock(monkeypatch)), seconds=1.0)
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
    known = {("gqe", "cudnn"): {}, ("dense", "tokamax"): {"implementation": "triton"}}
    assert [entry[:3] for entry in whole._variants("gpu", known)] == [
        ("cudnn", "gqe", {}),
        ("tokamax", "gqa", {"implementation": "triton"}),
    ]
    names = [entry[0] for entry in whole._variants("gpu", {})]
    assert names == ["pallas_gpu", *(peer.name for peer in peers("gpu"))]


def test_a_slow_contender_is_tried_twice(monkeypatch):
    clock = Clock(monkeypatch)
    measured(clock)
    assert clock.log.count("hopeless") == 2
    assert clock.log.count("matmul") == 1 + timing.SCREEN + 3


def test_a_lost_device_ends_the_case(monkeypatch):
    clock = Clock(monkeypatch)
    bad = clock.contender("bad", "dense", 1.0, error=ValueError("illegal address"), block=1)
    given = {"rounds": 2, "seconds": 1.0, "flops_per_second": 1e12, "progress": lambda _: None}
    (outcome,) = timing.time_contenders([bad], **given)
    assert outcome.error == "ValueError: illegal address"

    def lost(_):
        raise RuntimeError("sticky")

    monkeypatch.setattr(jax, "block_until_ready", lost)
    message = r"no work after bad \(dense, block 1\): ValueError: illegal address"
    with pytest.raises(timing.DeviceLost, match=message):
        timing.time_contenders([bad], **given)


def test_a_hanging_contender_ends_the_process(monkeypatch, capsys):
    left = threading.Event()
    monkeypatch.setattr(timing, "HANGING", 0.01)
    monkeypatch.setattr(timing.os, "_exit", lambda code: left.set())
    with timing._watched(Clock(monkeypatch).contender("slow", "gqe", 1.0)):
        assert left.wait(10)
    assert "slow (gqe) has not ended in 0.01 seconds; go on with --without slow" in (
        capsys.readouterr().err
    )


def test_kernels_that_do_not_run_here_are_recorded_with_their_errors():
    found = contenders.contenders(OP, SMALL, "gpu", {})
    names = {"tokamax", "attention_mgpu", "cudnn"}
    found = [one for one in found if one.name in names]
    outcomes = timing.time_contenders(
        found, rounds=2, seconds=1e-9, flops_per_second=1.0, progress=lambda _: None
    )
    assert {outcome.contender.name for outcome in outcomes} == names
    assert all(outcome.error and not outcome.seconds for outcome in outcomes)


def test_a_dense_layer_attends_by_the_peer():
    config = AttentionConfig(embed_dim=16, num_query_experts=4, num_kv_heads=2, variant="gqa")
    layer = GroupedQueryAttention(config, implementation="reference", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 8, 16))
    expected, _, _ = layer(x)
    peer = next(peer for peer in peers("cpu") if peer.name == "jax.nn")
    with whole.dense_by(peer, {}):
        np.testing.assert_allclose(layer(x)[0], expected, rtol=1e-4, atol=1e-5)
    wrong = dataclasses.replace(peer, attend=lambda q, k, v: 0 * q)
    with whole.dense_by(wrong, {}):
        np.testing.assert_array_equal(layer(x)[0], 0)
    np.testing.assert_array_equal(layer(x)[0], expected)


def test_selected_queries_are_those_of_the_selected_experts():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 5, 6)), rng.normal(size=(6, 3, 4, 2))
    index = np.argsort(rng.random((2, 5, 3, 4)), axis=-1)[..., :2]
    every = np.einsum("ble,egmd->blgmd", x, kernel)
    expected = np.take_along_axis(every, index[..., None], axis=3)
    arguments = (jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), jnp.asarray(index))
    for project in (experts.selected_queries, experts.all_queries):
        np.testing.assert_allclose(project(*arguments), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["by group", "all in one"])
def test_projections_in_one_product_are_the_same_layer(form):
    config = AttentionConfig(embed_dim=16, num_query_experts=4, num_kv_heads=2)
    make = lambda: GroupedQueryExperts(  # noqa: E731
        config, dtype=jnp.float32, implementation="reference", rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (2, 8, 16))
    expected, _, _ = make()(x)
    y, _, _ = projections.with_projections(make(), x, projections.FORMS[form])(x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def tiny(monkeypatch):
    """Two cases, of the op and of the layer."""
    scale = dataclasses.replace(SMALL, tokens=64, matmul=32, seconds=1e-4)
    found = [OP, Case("layer", False, 32, 2, 8)]
    monkeypatch.setattr(prefill, "SMALL", scale)
    monkeypatch.setattr(prefill, "cases", lambda _: found)


def test_a_cut_run_goes_on_where_it_was(tiny, tmp_path, monkeypatch, capsys):
    path = tmp_path / "out" / "prefill.json"
    arguments = ["--json", str(path), "--rounds", "2", "--without", "jax.nn"]

    def interrupted(case, *rest):
        if case.level == "layer":
            raise KeyboardInterrupt
        return contenders.contenders(case, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(prefill, "contenders", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prefill.main(arguments)
    (first,) = json.loads(path.read_text())["cases"]
    prefill.main(arguments)
    whole = json.loads(path.read_text())
    assert whole["command"] == f"python -m kernels.benchmarks.prefill {' '.join(arguments)}"
    assert whole["versions"]["jax"] == jax.__version__
    assert whole["cases"][0] == first
    assert [case["level"] for case in whole["cases"]] == ["op", "layer"]
    assert "jax.nn" not in path.read_text().replace(whole["command"], "")
    for case in whole["cases"]:
        assert case["ratio"]["q1"] <= case["ratio"]["median"] <= case["ratio"]["q3"]
        for one in case["contenders"]:
            assert one["error"] is None
            assert one["memory_bytes"] > 0
    deviations = [one["deviation"] for one in first["contenders"]]
    assert max(deviations) < 1e-4
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    prefill.main(arguments)
    assert "2 cases, 0 to do" in capsys.readouterr().err
    assert json.loads(path.read_text()) == whole


def test_a_spent_budget_leaves_the_rest(tiny, tmp_path, monkeypatch, capsys):
    clock = iter([0.0] + [100.0 * i for i in range(1, 20)])
    times = types.SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr(prefill, "time", times)
    prefill.main(["--json", str(tmp_path / "p.json"), "--rounds", "2", "--budget-minutes", "5"])
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


def test_bad_options_are_named(capsys):
    for arguments, message in (
        (["--rounds", "1"], "rounds is 1; a spread needs at least 2"),
        (["--budget-minutes", "-2"], "budget-minutes is -2.0; it must be positive"),
        (["--levels", "blocks"], "levels has blocks, which are a GPU kernel's; there is no GPU"),
    ):
        with pytest.raises(SystemExit):
            prefill.main(arguments)
        assert message in capsys.readouterr().err


def test_block_sizes_are_tried_of_the_gpu_kernel_alone():
    case = Case("blocks", False, 128, 1, 64)
    found = contenders.contenders(case, SMALL, "gpu", {})
    assert {(one.name, one.side) for one in found} == {("pallas_gpu", "gqe")}
    assert len({str(one.options) for one in found}) == len(found) > 1
