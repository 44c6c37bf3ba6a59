"""Where a run's time goes: goodput, the first step, profiles, the watchdog, the cache, W&B."""

import dataclasses
import importlib.util
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from gqe_jax import compilation_cache
from gqe_jax.compile_for.cycles import PARTS, part_of
from gqe_jax.config import ConfigError, ProfileConfig, RunConfig
from gqe_jax.report import page
from gqe_jax.report.curves import Curves
from gqe_jax.training.goodput import SPENT, Goodput, spent
from gqe_jax.training.loop import train
from gqe_jax.training.profile import Profile
from gqe_jax.training.telemetry import read_metrics
from gqe_jax.training.watchdog import Watchdog
from tests.gqe_jax.runs import REPOSITORY, make_corpus, small_config, start_training


def options(run_dir, corpus) -> RunConfig:
    return small_config(
        corpus, run_dir, steps=6, checkpoint_every=3, profile=ProfileConfig(start=3, steps=2)
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def profiled(corpus, tmp_path_factory):
    """A run whose steps 3 and 4 are recorded, what it printed, and how long it took."""
    config = options(tmp_path_factory.mktemp("run"), corpus)
    stream, begun = io.StringIO(), time.time()
    train(config, stream=stream, began=begun - 100)
    return config, stream.getvalue(), time.time() - begun


def profile_of(run_dir) -> pathlib.Path:
    [path] = pathlib.Path(run_dir).glob("profile/plugins/profile/step_3/*.xplane.pb")
    return path


@pytest.mark.slow
def test_a_profile_has_the_steps_of_its_window_and_the_parts_of_the_model(profiled):
    path = profile_of(profiled[0].run_dir)
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    steps = [dict(event.stats).get("step_num") for event in events if event.name == "train"]
    assert sorted(steps) == [3, 4]
    names = re.findall(rb"jit\(train_step\)/[ -~]+", path.read_bytes())
    # The queries are rotated within their projection.
    assert {part_of(name.decode()) for name in names} >= {*PARTS} - {"rope"}


@pytest.mark.slow
def test_xprof_opens_a_profile(profiled):
    convert = pytest.importorskip("xprof.convert.raw_to_tool_data", reason="pip install xprof")
    path = str(profile_of(profiled[0].run_dir))
    data, _ = convert.xspace_to_tool_data([path], "trace_viewer", {})
    names = {event.get("name") for event in json.loads(data)["traceEvents"]}
    assert {"train 3", "train 4"} <= names


def test_a_window_that_ends_early_is_written_and_a_later_start_records_none(tmp_path):
    config = ProfileConfig(start=2, steps=5)
    with Profile(config, str(tmp_path), lambda: None) as profile:
        for step in (1, 2, 3):
            with profile.step(step):
                pass
            assert not profile.ends_with(step)
    assert list(tmp_path.rglob("step_2/*.xplane.pb"))
    with Profile(config, str(tmp_path / "later"), lambda: None) as profile, profile.step(7):
        pass
    assert not (tmp_path / "later").exists()


@pytest.mark.slow
def test_the_time_of_a_run_is_divided_and_said(profiled):
    config, output, seconds = profiled
    records = [line for line in read_metrics(config.run_dir) if "goodput" in line]
    assert [line["step"] for line in records] == [0, 3, 6]
    first, _, last = records
    assert 100 < first["seconds_to_first_step"] < 100 + seconds
    assert f"first step {first['seconds_to_first_step']:.1f} s after the start" in output
    times = spent(last)
    assert 100 < sum(times.values()) < 100 + seconds
    assert times["starting"] > 100
    assert 0 < times["steps"] < seconds
    assert times["saving"] > 0
    assert last["goodput"] == pytest.approx(times["steps"] / sum(times.values()), rel=1e-2)
    assert "\ngoodput " in output


@pytest.mark.slow
def test_the_report_has_the_time(profiled):
    shown, _ = page.build([page.Run(Curves.read(profiled[0].run_dir, "run"), None)])
    assert "<h3>Time</h3>" in shown
    assert "<td>compiling</td>" in shown
    assert "0 restarts, 0 steps lost" in shown


def test_time_is_spent_on_one_thing_at_a_time_and_compiling_apart():
    begun = time.time()
    with Goodput(begun) as goodput:
        goodput.begin_steps()
        with goodput.spend("data", hidden=lambda: True):
            time.sleep(0.2)
        with goodput.spend("data"):
            time.sleep(0.1)
        with goodput.spend("evaluating"):
            inner = jax.jit(lambda x: jnp.cos(x) @ x.T)
            jax.jit(lambda x: inner(x) + 3.75)(jnp.ones((7, 11)))  # one trace contains the other
        times = spent(goodput.record())
    total = time.time() - begun
    assert sum(times.values()) == pytest.approx(total, abs=0.05)
    assert times["steps"] >= 0.2
    assert 0.1 <= times["data"] < 0.2
    assert 0 < times["compiling"] < total - 0.3


def test_restarts_and_lost_steps_come_from_the_metrics():
    record = {f"seconds_{kind}": 10.0 for kind in SPENT} | {"goodput": 0.1, "time": 1000}
    lines = [
        {"step": 0, **record, "restarts": 1, "lost_steps": 2, "ended": False},
        {"step": 9, "loss": 1.0},
    ]
    goodput = Goodput(began=time.time())
    goodput.began = 1030.0
    goodput.resume(lines, 4)
    found = goodput.record()
    assert (found["restarts"], found["lost_steps"]) == (2, 2 + 5)
    assert found["seconds_restarting"] == 10 + 30
    assert found["seconds_saving"] == 10
    assert found["seconds_compiling"] == 10
    assert goodput.compiling_since_start() == 0  # those were earlier starts'
    goodput = Goodput(began=time.time())
    goodput.resume([lines[0] | {"ended": True}], 0)
    assert goodput.record()["seconds_restarting"] == 10  # nobody waited for it


def test_a_hang_prints_the_stack_of_each_thread_and_ends_if_told_to():
    program = """
import sys, threading, time
from gqe_jax.training.watchdog import Watchdog
def waits_for_ever(): time.sleep(60)
threading.Thread(target=waits_for_ever, daemon=True).start()
with Watchdog(0.5, end=sys.argv[1] == "end") as watchdog:
    for _ in range(10):
        time.sleep(0.1)
        watchdog.alive()
    print("alive", file=sys.stderr, flush=True)
    time.sleep(1.2)
"""
    for ends in ("end", "go on"):
        result = subprocess.run(
            [sys.executable, "-c", program, ends],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == (ends == "end"), result.stderr
        before, after = result.stderr.split("alive\n")
        assert before == ""
        assert "waits_for_ever" in after
        assert after.count("Timeout") == (1 if ends == "end" else 2)


def test_nothing_is_watched_where_there_is_no_time():
    with Watchdog(None) as watchdog:
        watchdog.alive()
    with pytest.raises(ConfigError, match="watchdog_exit is True; it needs watchdog_seconds"):
        RunConfig(watchdog_seconds=None, watchdog_exit=True)


@pytest.fixture
def cache_setting():
    """JAX's own setting is as it was afterwards."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("cache_setting")
def test_programs_are_kept_where_the_flag_says(monkeypatch, tmp_path):
    compilation_cache.keep_programs(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    compilation_cache.keep_programs("default")  # the user's own setting of JAX stands
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    for off in ("", None):
        compilation_cache.keep_programs(off)
        assert jax.config.jax_compilation_cache_dir is None
    compilation_cache.keep_programs("default")  # eight devices on a CPU
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation_cache.keep_programs("default")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "gqe_jax" / "programs")
    with pytest.raises(ConfigError, match="needs a missing package"):
        compilation_cache.keep_programs("nowhere://bucket")


@pytest.mark.slow
def test_a_second_start_takes_the_programs_of_the_first(corpus, tmp_path):
    variables = {
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    outputs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        for name in ("first", "second"):
            config = small_config(corpus, tmp_path / name, steps=2, eval_every=2)
            outputs.append(start_training(config, environment=variables).communicate()[0])
            programs = {path.name: path.stat().st_mtime for path in tmp_path.rglob("*-cache")}
            assert any(path.startswith("jit_train_step") for path in programs), outputs[-1]
            kept = programs if name == "first" else kept
    assert programs == kept  # none was compiled again
    for output in outputs:
        assert "does not match" not in output
        assert "feature" not in output
    losses = [[x.get("loss") for x in read_metrics(tmp_path / n)] for n in ("first", "second")]
    assert losses[0] == losses[1]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the extra wandb")
def test_weights_and_biases_has_the_metrics_of_every_start(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = options(tmp_path / "run", corpus)
    config = dataclasses.replace(config, steps=3, profile=ProfileConfig(), wandb="gqe")
    train(config, stream=io.StringIO())
    train(dataclasses.replace(config, steps=6), stream=io.StringIO())
    identity = (tmp_path / "run" / "wandb_id").read_text()
    logs = sorted((tmp_path / "run" / "wandb").rglob(f"run-{identity}.wandb"))
    assert len(logs) == 2
    for name in (b"eval_loss", b"grad_norm", b"max_expert_load/layer_1", b"goodput"):
        assert all(name in log.read_bytes() for log in logs), name


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_weights_and_biases_is_asked_for_before_anything_is_written(corpus, tmp_path):
    config = dataclasses.replace(options(tmp_path / "run", corpus), wandb="gqe")
    with pytest.raises(ConfigError, match=r"pip install 'gqe-jax\[wandb\]'"):
        train(config)
    assert not os.path.exists(config.run_dir)
