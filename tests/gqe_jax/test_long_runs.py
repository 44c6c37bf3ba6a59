"""Averaged parameters, skipped spikes, checkpoints by the clock, and the last lines of a run."""

import dataclasses
import io
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqe_jax.config import ConfigError, MeshConfig, OptimizerConfig, RunConfig
from gqe_jax.data import Batch
from gqe_jax.evaluation.run import EvalConfig, evaluate_run
from gqe_jax.runs import Run
from gqe_jax.sharding import make_mesh
from gqe_jax.training import loop as trainer
from gqe_jax.training.average import update_average
from gqe_jax.training.checkpoint import Checkpoints
from gqe_jax.training.loop import NonFiniteLossError, train
from gqe_jax.training.spikes import MOST_IN_A_ROW, begin, watch
from gqe_jax.training.steps import make_steps
from gqe_jax.training.telemetry import read_metrics
from gqe_jax.training.timer import Timer
from tests.gqe_jax.runs import comparable_metrics, make_corpus, saved_state, small_config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def plain(corpus, run_dir, **changes) -> RunConfig:
    """A run of 4 steps with one layer; with any `steps` its program is the same."""
    changes = {"steps": 4, "eval_every": 4, "checkpoint_every": 2} | changes
    config = small_config(corpus, run_dir, **changes)
    optimizer = dataclasses.replace(config.optimizer, schedule_steps=12)
    model = dataclasses.replace(config.model, num_layers=1)
    return dataclasses.replace(config, model=model, optimizer=optimizer)


def everything(corpus, run_dir, **changes) -> RunConfig:
    """A run of 12 steps with Muon, an average and skipped spikes, on two replicas."""
    config = plain(corpus, run_dir, steps=12, eval_every=6, checkpoint_every=4)
    optimizer = dataclasses.replace(
        config.optimizer,
        name="muon",
        average_decay=0.9,
        skip_spikes=100.0,
        shard_state_over_data=True,
    )
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    return dataclasses.replace(config, optimizer=optimizer, mesh=mesh, **changes)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    config = everything(corpus, tmp_path_factory.mktemp("run"))
    stream = io.StringIO()
    state = train(config, stream=stream)
    return config, jax.device_get(state), stream.getvalue()


def last_evaluation(config: RunConfig) -> dict:
    """The record of a run's last evaluation."""
    return [line for line in read_metrics(config.run_dir) if "eval_loss" in line][-1]


def test_an_average_follows_its_formula():
    params = {"a": np.array([1.0, -2.0]), "b": np.array([[3.0]])}
    expected, average = params, jax.tree.map(jnp.float32, params)
    for step in range(30):
        params = jax.tree.map(lambda x, s=step: x + s, params)
        average = update_average(average, jax.tree.map(jnp.float32, params), step, 0.7)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected, params)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5), average, expected)


@pytest.mark.slow
def test_the_average_is_evaluated_and_exported(finished):
    config, state, _ = finished
    found = Run.find(config.run_dir)
    for averaged, due in ((True, state.average), (False, state.params)):
        run = dataclasses.replace(found, averaged=averaged)
        _, params = run.load(make_mesh(MeshConfig()))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), due)
    assert any(
        (a != p).any()
        for a, p in zip(*map(jax.tree.leaves, (state.average, state.params)), strict=True)
    )
    losses = [
        evaluate_run(
            EvalConfig(
                (config.run_dir,), averaged=averaged, batches=2, data=config.data, mesh=config.mesh
            )
        ).held_out.loss
        for averaged in (True, False)
    ]
    trained = last_evaluation(config)["eval_loss"]
    assert losses[0] == pytest.approx(trained, rel=1e-6)
    assert abs(losses[1] - trained) > 1e-4


@pytest.mark.slow
def test_a_run_with_all_of_it_goes_on_as_if_it_had_not_stopped(finished, corpus, tmp_path):
    config = dataclasses.replace(finished[0], run_dir=str(tmp_path))
    train(dataclasses.replace(config, steps=7), stream=io.StringIO())
    train(config, stream=io.StringIO())
    for ours, theirs in zip(saved_state(config), saved_state(finished[0]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    losses = [
        [(x["step"], x["loss"]) for x in comparable_metrics(run.run_dir) if "loss" in x]
        for run in (config, finished[0])
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_an_average_can_begin_at_a_restart_and_end_there(corpus, tmp_path):
    without = plain(corpus, tmp_path)
    train(without, stream=io.StringIO())
    optimizer = dataclasses.replace(without.optimizer, average_decay=0.9, skip_spikes=100.0)
    averaged = dataclasses.replace(without, optimizer=optimizer)
    with pytest.raises(ConfigError, match=r"average_decay is 0.9, .* or --resume-step 4"):
        train(averaged, stream=io.StringIO())
    state = train(dataclasses.replace(averaged, resume_step=2), stream=io.StringIO())
    assert state.average is not None
    assert int(state.spikes.count) == 2
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert [checkpoints._has(step, "average") for step in (2, 4)] == [False, True]
    state = train(dataclasses.replace(without, steps=5, resume_step=4), stream=io.StringIO())
    assert state.average is None


def watched(values, threshold=5.0, warmup=4):
    """Which (loss, norm) of a series are skipped, and the last statistics."""
    state, skipped = begin(), []
    step = jax.jit(lambda s, a, b: watch(s, a, b, threshold=threshold, warmup_steps=warmup))
    for loss, norm in values:
        spike, state = step(state, jnp.float32(loss), jnp.float32(norm))
        skipped.append(bool(spike))
    return skipped, state


def test_spikes_are_found_in_the_loss_and_in_the_gradient():
    rng = np.random.default_rng(0)
    series = np.stack([3 + 0.1 * rng.standard_normal(60), 1 + 0.1 * rng.standard_normal(60)], 1)
    assert not any(watched(series)[0])
    series[50, 0], series[52, 1], series[54, 0], series[56, 1] = 9.0, 9.0, math.nan, math.inf
    assert not watched([(3.0, 1.0), (50.0, 1.0), (3.0, 90.0)])[0][1:].count(True)  # warming up
    skipped, state = watched(series, warmup=30)
    assert [step for step, spike in enumerate(skipped) if spike] == [50, 52, 54, 56]
    assert np.isfinite(state.mean).all()
    assert int(state.in_a_row) == 0


def test_a_loss_that_stays_on_another_level_is_accepted():
    rng = np.random.default_rng(0)
    series = np.full((80, 2), 2.0) + 0.02 * rng.standard_normal((80, 2))
    series[50:, 0] += 1.0
    skipped, _ = watched(series, threshold=8.0)
    assert skipped[50]
    assert not any(skipped[50 + MOST_IN_A_ROW :])


@pytest.mark.slow
def test_a_skipped_step_leaves_all_but_the_counters(finished, corpus, tmp_path):
    config, _, _ = finished
    mesh = make_mesh(config.mesh)
    steps = make_steps(config, mesh)
    state = steps.layout.init()
    tokens = np.zeros((8, 32), np.int32)
    weights = np.ones((8, 32), np.float32)

    def step(state, weights):
        batch = trainer.global_batch(
            trainer.batch_sharding(mesh), 8, Batch(tokens, tokens, np.float32(weights))
        )
        return steps.train_step(state, batch)

    state, _ = step(state, weights)
    before = jax.device_get(state)
    state, metrics = step(state, np.where(np.arange(32) == 3, np.nan, weights))
    after = jax.device_get(state)
    assert int(metrics["skipped_in_a_row"]) == int(after.spikes.in_a_row) == 1
    assert int(after.step) == int(before.step) + 1
    for name in ("params", "average"):
        same = jax.tree.map(
            np.testing.assert_array_equal, getattr(before, name), getattr(after, name)
        )
        del same
    jax.tree.map(np.testing.assert_array_equal, before.opt_state[:-1], after.opt_state[:-1])
    assert int(after.opt_state[-1].count) == int(before.opt_state[-1].count) + 1
    _, metrics = step(state, weights)
    assert int(metrics["skipped_in_a_row"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("broken", [(6, 7), tuple(range(2, 40))], ids=["two", "all"])
def test_a_run_names_the_batches_that_it_skips(corpus, tmp_path, monkeypatch, broken):
    """Batches whose weights are NaN: the run names them, and ends if there are too many."""
    batches = trainer.training_batches

    def damaged(*args, start, **kwargs):
        for step, batch in enumerate(batches(*args, start=start, **kwargs), start):
            weights = batch.weights * (math.nan if step in broken else 1.0)
            yield dataclasses.replace(batch, weights=weights)

    monkeypatch.setattr(trainer, "training_batches", damaged)
    config = everything(corpus, tmp_path, log_every=1)
    config = dataclasses.replace(config, steps=12 if len(broken) == 2 else 30)
    stream = io.StringIO()
    if len(broken) > 2:
        with pytest.raises(NonFiniteLossError, match=r"10 steps in a row were skipped.*windows"):
            train(config, stream=stream)
        return
    state = train(config, stream=stream)
    assert int(state.step) == 12
    assert "step 7 is skipped: loss nan, grad_norm nan; batch 6: windows" in stream.getvalue()
    lines = read_metrics(config.run_dir)
    found = [(x["skipped_batch"], x["skipped_in_a_row"]) for x in lines if "skipped_batch" in x]
    assert found == [(6, 1), (7, 2)]
    assert [x["step"] for x in lines if "loss" in x] == [*range(1, 7), *range(9, 13)]


def test_a_timer_counts_anew_after_a_reset():
    mesh = make_mesh(MeshConfig())
    assert not Timer(mesh, None)()
    timer = Timer(mesh, 0.5 / 60)
    assert not timer()
    time.sleep(0.5)
    assert timer()
    timer.reset()
    assert not timer()


@pytest.mark.slow
def test_checkpoints_are_saved_by_the_clock_too(corpus, tmp_path):
    config = plain(corpus, tmp_path, steps=3, checkpoint_every=100, eval_every=100)
    config = dataclasses.replace(config, checkpoint_minutes=1e-9, keep_checkpoints=9)
    train(config, stream=io.StringIO())
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert sorted(checkpoints._manager.all_steps()) == [1, 2, 3]


@pytest.mark.slow
def test_the_last_lines_say_what_was_reached_and_what_is_next(finished):
    config, _, output = finished
    last = last_evaluation(config)
    begin = output.index("\nreached step") + 1
    lines = output[begin:].splitlines()
    assert lines[0].startswith(
        f"reached step 12 of 12: 3,072 tokens; held-out loss {last['eval_loss']:.4f}, "
        f"{last['eval_bits_per_byte']:.4f} bits per byte"
    )
    assert lines[1].startswith(f"in {config.run_dir}: checkpoints/12")
    assert f"next: python eval.py {config.run_dir}" in lines[2]


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (OptimizerConfig, {"name": "sgd"}, "name is 'sgd'; it must be one of adamw, muon"),
        (OptimizerConfig, {"schedule": "step"}, "schedule is 'step'; it must be one of wsd, cos"),
        (OptimizerConfig, {"skip_spikes": 0.0}, "skip_spikes is 0.0; it must be positive"),
        (OptimizerConfig, {"average_decay": 1.0}, "average_decay is 1.0; it must be between 0 and"),
        (RunConfig, {"checkpoint_minutes": -1.0}, "checkpoint_minutes is -1.0"),
    ],
)
def test_bad_values_are_named(kind, fields, message):
    with pytest.raises(ConfigError, match=message):
        kind(**fields)


@pytest.mark.slow
def test_the_configuration_of_an_earlier_run_has_none_of_it(finished):
    with open(f"{finished[0].run_dir}/config.json") as file:
        saved = json.load(file)["optimizer"]
    assert saved["name"] == "muon"
    plain = OptimizerConfig()
    assert (plain.name, plain.schedule, plain.skip_spikes, plain.average_decay) == (
        "adamw", "wsd", None, None,
    )  # fmt: skip
