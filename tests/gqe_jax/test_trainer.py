"""The loop: what it writes, what it refuses, and how it ends."""

import dataclasses
import io
import json
import math
import os
import shutil

import jax
import numpy as np
import pytest

from gqe_jax.config import ConfigError, MeshConfig, RunConfig
from gqe_jax.config_json import from_dict
from gqe_jax.data import DataError
from gqe_jax.evaluation.run import defaults_for, evaluate_run
from gqe_jax.training.checkpoint import CheckpointError, Checkpoints
from gqe_jax.training.loop import NonFiniteLossError, train
from gqe_jax.training.telemetry import read_metrics
from tests.gqe_jax.runs import make_corpus, saved_state, small_config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A whole run on eight devices, and what it printed."""
    config = small_config(corpus, tmp_path_factory.mktemp("run"))
    stream = io.StringIO()
    state = train(config, stream=stream)
    assert int(state.step) == 30
    return config, stream.getvalue()


def test_it_learns_and_says_so(finished):
    config, output = finished
    training = [line for line in read_metrics(config.run_dir) if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 31))
    assert training[-1]["loss"] < training[0]["loss"] - 1.5
    assert "gqe, " in output
    assert "parameters, 3 active heads a token; 8 x cpu" in output
    assert "step 30/30  held-out loss" in output


def test_metrics_have_the_fields_that_tools_read(finished):
    config, _ = finished
    lines = read_metrics(config.run_dir)
    training = next(line for line in lines if line["step"] == 3)
    for name in ("loss", "aux_loss", "learning_rate", "grad_norm", "clipped_grad_norm"):
        assert math.isfinite(training[name]), name
    assert training["tokens_per_second"] > 0
    assert np.shape(training["expert_load"]) == (2, 2, 2)
    np.testing.assert_allclose(np.sum(training["expert_load"], axis=-1), 1.0, rtol=1e-5)
    assert np.shape(training["router_entropy"]) == (2, 2)
    assert "mfu" not in training  # no peak is known for a CPU
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [10, 20, 30]
    assert {"eval_perplexity", "eval_bits_per_byte", "eval_tokens"} <= set(evaluations[0])


def test_the_run_directory_is_complete(finished):
    config, _ = finished
    names = {path.name for path in os.scandir(config.run_dir)}
    assert names == {"checkpoints", "config.json", "metrics.jsonl", "tensorboard", "report"}
    reports = {path.name for path in os.scandir(os.path.join(config.run_dir, "report"))}
    assert reports == {"loss.png", "optimizer.png", "expert_load.png", "router_entropy.png"}
    with open(os.path.join(config.run_dir, "config.json")) as file:
        assert from_dict(RunConfig, json.load(file)) == config


def test_a_finished_run_is_left_as_it_is(finished):
    config, _ = finished
    before = read_metrics(config.run_dir)
    stream = io.StringIO()
    train(config, stream=stream)
    assert read_metrics(config.run_dir) == before
    assert "resuming" in stream.getvalue()


@pytest.mark.slow
def test_a_longer_run_goes_on_from_the_end(corpus, tmp_path):
    config = small_config(corpus, tmp_path, steps=8)
    train(config, stream=io.StringIO())
    state = train(dataclasses.replace(config, steps=11), stream=io.StringIO())
    assert int(state.step) == 11
    steps = [line["step"] for line in read_metrics(tmp_path) if "loss" in line]
    assert steps == list(range(1, 12))


@pytest.mark.slow
def test_another_mesh_goes_on_with_the_same_state(corpus, tmp_path):
    config = small_config(corpus, tmp_path, steps=7)
    first = jax.device_get(train(config, stream=io.StringIO()))
    other = dataclasses.replace(config, steps=7, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    second = train(other, stream=io.StringIO())
    jax.tree.map(np.testing.assert_array_equal, first, jax.device_get(second))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1, "batch_size": 16}, "batch_size is 16, the checkpoint has 8; seed is 1, the"),
        ({"steps": 20}, "steps is 20; run_dir .* is at step 30 already"),
        ({"mesh": MeshConfig(data=3)}, "it uses 3 of 8 devices"),
        ({"batch_size": 12}, "batch_size / accumulation_steps is 12; it must be a multiple"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(finished, changes, message):
    config = dataclasses.replace(finished[0], **changes)
    with pytest.raises(ConfigError, match=message):
        train(config, stream=io.StringIO())


@pytest.mark.slow
def test_another_corpus_under_the_same_name_is_refused(tmp_path):
    corpus = make_corpus(tmp_path)
    config = small_config(corpus, tmp_path / "run", steps=2)
    train(config, stream=io.StringIO())
    manifest = corpus / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(ConfigError, match=r"data.corpus .* now has the fingerprint"):
        train(config, stream=io.StringIO())


def test_nothing_is_written_when_the_corpus_does_not_fit(corpus, tmp_path):
    config = small_config(corpus, tmp_path / "run")
    model = dataclasses.replace(config.model, vocab_size=128)
    with pytest.raises(DataError, match="vocab_size is 128"):
        train(dataclasses.replace(config, model=model), stream=io.StringIO())
    assert not (tmp_path / "run").exists()


def test_the_best_evaluated_step_is_saved_and_kept(finished):
    config, _ = finished
    lines = read_metrics(config.run_dir)
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert len(losses) == 3
    with Checkpoints(config.run_dir, read_only=True) as checkpoints:
        assert checkpoints.latest() == 30
        assert checkpoints.resolve("best") == min(losses, key=losses.get)


@pytest.mark.slow
def test_the_best_checkpoint_outlives_the_latest(corpus, tmp_path):
    config = small_config(corpus, tmp_path, steps=1)
    state = train(config, stream=io.StringIO())
    with Checkpoints(tmp_path / "other", keep=2) as checkpoints:
        for step, loss in enumerate([3.0, 1.0, 2.0, None, 2.5, None], 1):
            at = dataclasses.replace(state, step=np.int32(step))
            checkpoints.save(at, config, "fingerprint", loss)
    with Checkpoints(tmp_path / "other", read_only=True) as checkpoints:
        assert checkpoints.best() == 2
        for step in (2, 5, 6):
            assert checkpoints.resolve(step) == step
        with pytest.raises(CheckpointError, match=r"step is 3; .* has 2, 5, 6"):
            checkpoints.resolve(3)


@pytest.mark.slow
def test_a_truncated_checkpoint_is_named_with_a_way_on(corpus, tmp_path):
    config = small_config(corpus, tmp_path, steps=14)
    train(config, stream=io.StringIO())
    latest = tmp_path / "checkpoints" / "14"
    arrays = [path for path in (latest / "params").rglob("*") if path.is_file()]
    for path in arrays:
        if "/d/" in path.as_posix():
            os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(
        CheckpointError, match=r"checkpoints/14 cannot be read .*resume from step 10"
    ):
        train(dataclasses.replace(config, steps=20), stream=io.StringIO())


def test_a_kernel_that_cannot_train_the_model_is_named(corpus, tmp_path):
    config = small_config(corpus, tmp_path, attention_kernel="cudnn")
    with pytest.raises(NotImplementedError, match="'cudnn' does not take query: dtype float32"):
        train(config, stream=io.StringIO())


def test_a_non_finite_loss_stops_the_run(corpus, tmp_path):
    config = small_config(corpus, tmp_path, checkpoint_every=1)
    optimizer = dataclasses.replace(config.optimizer, peak_learning_rate=1e38)
    config = dataclasses.replace(config, optimizer=optimizer)
    with pytest.raises(NonFiniteLossError) as caught:
        train(config, stream=io.StringIO())
    message = str(caught.value)
    step = int(message.split("at step ")[1].split()[0])
    assert f"batch {step - 1}: windows " in message
    assert f"last good checkpoint is {step - 1} in" in message
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest() == step - 1
    assert all(np.isfinite(array).all() for array in saved_state(config))


def test_evaluation_of_a_run_equals_the_last_one_in_training(finished):
    config, _ = finished
    last = [line for line in read_metrics(config.run_dir) if "eval_loss" in line][-1]
    same = dataclasses.replace(defaults_for(config.run_dir), batches=config.eval_batches)
    result = evaluate_run(same)
    assert result.step == 30
    assert result.held_out.loss == pytest.approx(last["eval_loss"], rel=1e-5)
    assert result.held_out.tokens == last["eval_tokens"]
    mixed = dataclasses.replace(
        same, mesh=MeshConfig(data=2, fsdp=2, tensor=2), batch_size=4, batches=4
    )
    assert evaluate_run(mixed).held_out.loss == pytest.approx(last["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        (MeshConfig(data=-1, fsdp=4), MeshConfig(data=-1, fsdp=4)),
        (MeshConfig(data=2, fsdp=16), MeshConfig()),
    ],
    ids=["it fits", "of a larger machine"],
)
def test_an_evaluation_is_on_the_runs_mesh_where_that_fits(finished, tmp_path, mesh, expected):
    config, _ = finished
    shutil.copytree(config.run_dir, tmp_path / "run")
    saved = tmp_path / "run" / "checkpoints" / "30" / "run" / "metadata"
    content = json.loads(saved.read_text())
    content["config"]["mesh"] = mesh.sizes
    saved.write_text(json.dumps(content))
    assert defaults_for(str(tmp_path / "run")).mesh == expected


def test_evaluation_of_no_run_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoints; name the run directory"):
        defaults_for(str(tmp_path))
