"""What a run remembers when it resumes: its best step, its schedule, its text, its bits."""

import dataclasses
import io
import json
import os
import random
import resource
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gqe_jax.config import ConfigError, MeshConfig
from gqe_jax.sharding import make_mesh
from gqe_jax.training.checkpoint import CheckpointError, Checkpoints, best_step
from gqe_jax.training.integrity import measure
from gqe_jax.training.loop import NonFiniteLossError, train
from gqe_jax.training.telemetry import read_metrics
from tests.gqe_jax.runs import make_corpus, saved_state, small_config, start_training


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run of 8 steps, evaluated and saved at 4 and 8."""
    config = short(corpus, tmp_path_factory.mktemp("run"))
    train(config, stream=io.StringIO())
    return config


def short(corpus, run_dir, **changes):
    options = {"steps": 8, "eval_every": 4, "checkpoint_every": 4, "eval_batches": 1} | changes
    return small_config(corpus, run_dir, **options)


def copy_of(config, run_dir, **changes):
    shutil.copytree(config.run_dir, run_dir)
    return dataclasses.replace(config, run_dir=str(run_dir), **changes)


def with_optimizer(config, **changes):
    optimizer = dataclasses.replace(config.optimizer, **changes)
    return dataclasses.replace(config, optimizer=optimizer)


def run(config) -> str:
    stream = io.StringIO()
    train(config, stream=stream)
    return stream.getvalue()


def scores(run_dir) -> dict[int, float]:
    lines = read_metrics(run_dir)
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def best(run_dir) -> int:
    with Checkpoints(run_dir, read_only=True) as checkpoints:
        return checkpoints.resolve("best")


def column(run_dir, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in read_metrics(run_dir) if name in line}


class SignalAt(io.StringIO):
    """Sends this process SIGTERM when a line of progress has these words."""

    def __init__(self, words: str):
        super().__init__()
        self.words = words

    def write(self, text: str) -> int:
        if self.words in text:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


@pytest.mark.slow
def test_a_step_that_a_later_start_scores_is_recorded(corpus, finished, tmp_path):
    step = 8
    config = short(corpus, tmp_path / "run")
    stream = SignalAt(f"step {step}/8  loss")  # printed just before the evaluation
    train(config, stream=stream)
    assert step not in scores(config.run_dir)
    assert "stopped at step" in stream.getvalue()
    assert "before its evaluation was done" in stream.getvalue()
    run(config)
    expected = scores(finished.run_dir)
    assert scores(config.run_dir) == expected
    assert best(config.run_dir) == min(expected, key=expected.get) == best(finished.run_dir)
    with Checkpoints(config.run_dir, read_only=True) as checkpoints:
        recorded = {step: score["eval_loss"] for step, score in checkpoints._scores().items()}
    assert recorded == expected


def test_the_best_is_among_the_losses_of_one_text():
    def score(loss, tokens=None):
        return {"eval_loss": loss} | ({} if tokens is None else {"eval_tokens": tokens})

    assert best_step({}) is None
    assert best_step({1: None}) is None
    assert best_step({1: score(2.0), 2: score(1.0), 3: score(3.0), 4: None}) == 2
    assert best_step({1: score(1.0), 2: score(1.0)}) == 2
    assert best_step({1: score(1.0, 9), 2: score(3.0, 5), 3: score(2.0, 5), 4: None}) == 3
    assert best_step({1: score(1.0), 2: score(3.0, 5)}) == 2


@pytest.mark.slow
def test_another_number_of_evaluation_batches_begins_the_best_anew(finished, tmp_path):
    before = scores(finished.run_dir)
    longer = copy_of(finished, tmp_path / "run", eval_batches=3, steps=12, keep_checkpoints=1)
    output = run(longer)
    assert "their losses are not compared" in output
    now = scores(longer.run_dir)
    assert now[4] == before[4]
    assert now[8] != before[8]  # scored again, on three batches
    same_text = {step: loss for step, loss in now.items() if step in (8, 12)}
    assert best(longer.run_dir) == min(same_text, key=same_text.get)
    assert "not compared" not in run(longer)


@pytest.mark.slow
def test_parameters_that_are_not_finite_are_not_saved(corpus, tmp_path):
    """The loss and the gradient of step 1 are finite; its update is not."""
    config = short(corpus, tmp_path / "run", checkpoint_every=1)
    config = with_optimizer(
        config, peak_learning_rate=1e6, weight_decay=1e38, warmup_fraction=0.0, decay_fraction=0.0
    )
    with pytest.raises(NonFiniteLossError, match=r"params/\S+ has NaN or infinity at step 1 "):
        train(config, stream=io.StringIO())
    with Checkpoints(config.run_dir, read_only=True) as checkpoints:
        assert checkpoints.latest() is None


def test_checksums_know_every_bit_and_no_mesh():
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(16, 8)).astype(np.float32),
        "b": rng.integers(0, 9, 8).astype(np.int32),
        "c": np.asarray(rng.normal(size=(8, 4)), jax.numpy.bfloat16),
        "d": np.int32(3),
    }
    whole, bad = measure(arrays)
    assert bad == []
    place = np.arange(128, dtype=np.uint64) * (2654435761 * 2) % 2**32 | 1
    bits = arrays["a"].view(np.uint32).ravel().astype(np.uint64)
    assert (
        whole["a:float32"]
        == int(sum(int(x) * int(y) for x, y in zip(bits, place, strict=True))) % 2**32
    )
    mesh = make_mesh(MeshConfig(data=8))
    split = {
        name: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data" if np.ndim(x) else None)))
        if np.ndim(x)
        else x
        for name, x in arrays.items()
    }
    assert measure(split)[0] == whole
    for _ in range(40):
        changed = arrays["a"].copy()
        changed.view(np.uint32).ravel()[rng.integers(128)] ^= np.uint32(1) << rng.integers(
            23, dtype=np.uint32
        )
        assert measure(arrays | {"a": changed})[0] != whole
    swapped = arrays["a"].copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert measure(arrays | {"a": swapped})[0] != whole
    assert measure({"a": np.array([1.0, np.nan], np.float32)})[1] == ["a"]


@pytest.mark.slow
def test_a_flipped_bit_is_found_when_a_checkpoint_is_read(finished, tmp_path):
    """Each flip is found, by a decoder or by the checksum, or is in bytes that hold no array."""
    expected = saved_state(finished, 8)
    config = copy_of(finished, tmp_path / "run")
    directory = tmp_path / "run" / "checkpoints" / "8" / "params"
    files = [p for p in directory.rglob("*") if p.is_file() and p.stat().st_size > 1000]
    whole, found = {path: path.read_bytes() for path in files}, 0
    rng = random.Random(0)
    for _ in range(6):
        for path, content in whole.items():
            damaged = bytearray(content)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
        problem, state = None, expected
        try:
            state = saved_state(config, 8)
        except CheckpointError as error:
            problem = str(error)
            found += 1
        assert problem is None or "checkpoints/8 cannot be read" in problem
        assert problem is None or "resume from step 4" in problem
        for ours, theirs in zip(state, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert found >= 4
    for path, content in whole.items():
        path.write_bytes(content)
    saved = tmp_path / "run" / "checkpoints" / "8" / "run" / "metadata"
    content = json.loads(saved.read_text())
    name = next(name for name in content["checksums"] if name.startswith("params/"))
    content["checksums"][name] ^= 1
    saved.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"the bits of params/.* are not those that were"):
        saved_state(config, 8)
    del content["checksums"]  # as in a checkpoint of an earlier version
    saved.write_text(json.dumps(content))
    assert len(saved_state(config, 8)) == len(expected)


@pytest.mark.slow
def test_damaged_metrics_are_no_obstacle(finished, tmp_path):
    config = copy_of(finished, tmp_path / "run", steps=10)
    for content in (b"", b"\xff\xfe", b"[1]", b'{"eval_loss": "low"}'):
        for step in (4, 8):
            path = tmp_path / "run" / "checkpoints" / str(step) / "metrics" / "metrics"
            path.write_bytes(content)
        with Checkpoints(config.run_dir, read_only=True) as checkpoints:
            assert checkpoints.latest() == 8
            assert checkpoints.best() is None
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n[]\n5\n{"step": null}\n{"loss": 1.0}\n{"step"')
    (tmp_path / "run" / "checkpoints" / "9.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    run(config)
    assert list(column(config.run_dir, "loss")) == list(range(1, 11))
    expected = scores(finished.run_dir) | scores(config.run_dir)
    assert best(config.run_dir) == min(expected, key=expected.get)
    assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
def test_what_changes_no_number_is_no_difference(finished, corpus, tmp_path, monkeypatch):
    """Against the run that nothing moved: the same losses."""
    undisturbed = copy_of(finished, tmp_path / "undisturbed", steps=11)
    run(undisturbed)
    shutil.copytree(corpus, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    attention = dataclasses.replace(finished.model.attention, head_dim=8)
    moved = copy_of(
        finished,
        tmp_path / "run",
        steps=11,
        model=dataclasses.replace(finished.model, remat="keep_nothing", attention=attention),
        data=dataclasses.replace(finished.data, corpus="moved/"),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        optimizer=dataclasses.replace(finished.optimizer, shard_state_over_data=True),
    )
    run(moved)
    ours, theirs = (column(config.run_dir, "loss") for config in (moved, undisturbed))
    assert list(ours) == list(theirs) == list(range(1, 12))
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), atol=1e-4)


@pytest.mark.slow
def test_another_accumulation_is_allowed_and_said(finished, tmp_path):
    """The losses of the text are those of the first run, but for the router's share."""
    undisturbed = copy_of(finished, tmp_path / "undisturbed", steps=10)
    run(undisturbed)
    mesh = MeshConfig(data=2, context=2, tensor=2)
    config = copy_of(finished, tmp_path / "run", steps=10, accumulation_steps=4, mesh=mesh)
    output = run(config)
    assert "accumulation_steps is 4, was 1" in output
    assert "sums are in another order" in output
    ours, theirs = (column(c.run_dir, "loss") for c in (config, undisturbed))
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-2)


@pytest.mark.slow
def test_a_restart_can_change_how_long_experts_are_tied_but_not_whether(corpus, tmp_path):
    tied = with_optimizer(short(corpus, tmp_path / "tied"), tied_fraction=0.5)
    run(tied)
    assert "optimizer.tied_fraction is 1.0, was 0.5" in run(
        with_optimizer(dataclasses.replace(tied, resume_step=4), tied_fraction=1.0)
    )
    off = with_optimizer(dataclasses.replace(tied, resume_step=8), tied_fraction=0.0)
    with pytest.raises(ConfigError, match=r"tied_fraction is 0.0, the checkpoint has 1.0"):
        run(off)


@pytest.mark.slow
def test_a_restart_from_a_step_with_another_learning_rate(finished, tmp_path):
    config = with_optimizer(copy_of(finished, tmp_path / "run"), peak_learning_rate=5e-3)
    with pytest.raises(ConfigError, match=r"peak_learning_rate is .*or --resume-step 8 to go on"):
        run(config)
    with pytest.raises(CheckpointError, match=r"step is 5; .* has 4, 8"):
        run(dataclasses.replace(config, resume_step=5))
    restart = dataclasses.replace(config, resume_step=4)
    output = run(restart)
    assert "changes at step 4: restarted; the run was at step 8" in output
    ours, theirs = (column(c.run_dir, "loss") for c in (config, finished))
    assert list(ours) == list(range(1, 9))
    first = range(1, 6)  # the loss of step 5 is of the parameters after step 4
    assert [ours[step] for step in first] == pytest.approx([theirs[step] for step in first])
    assert ours[7] != theirs[7]
    rates, before = (column(c.run_dir, "learning_rate") for c in (config, finished))
    assert rates[5] == pytest.approx(before[5] / 2)
    changed = [line for line in read_metrics(config.run_dir) if "restarted_from" in line]
    assert len(changed) == 1
    assert changed[0]["step"] == 4
    assert changed[0]["restarted_from"] == 8
    assert changed[0]["optimizer.peak_learning_rate"] == [1e-2, 5e-3]
    metrics = read_metrics(config.run_dir)
    assert "restarted" not in run(restart)  # the same command again, as after a preemption
    run(config)  # and without it
    assert read_metrics(config.run_dir) == metrics
    run(dataclasses.replace(config, steps=9))
    assert 'resume_step": null' in (tmp_path / "run" / "config.json").read_text()


@pytest.mark.slow
def test_an_extended_run_says_what_the_learning_rate_does(finished, tmp_path):
    longer = copy_of(finished, tmp_path / "longer", steps=20)
    output = run(longer)
    assert "steps is 20, was 8; the learning rate goes from 1.00e-05 to 1.00e-02" in output
    changed = [line for line in read_metrics(longer.run_dir) if "learning_rate_change" in line]
    assert [line["step"] for line in changed] == [8]
    assert changed[0]["steps"] == [8, 20]
    rates = column(longer.run_dir, "learning_rate")
    assert changed[0]["learning_rate_change"] == pytest.approx([rates[8], rates[9]])


@pytest.mark.slow
def test_a_stable_phase_branches_into_decays(corpus, tmp_path):
    stable = short(corpus, tmp_path / "stable", steps=8)
    stable = with_optimizer(stable, schedule_steps=100)
    run(stable)
    for length in (10, 12):
        branch = copy_of(stable, tmp_path / str(length), steps=length, resume_step=8)
        branch = with_optimizer(
            branch, schedule_steps=None, decay_fraction=(length - 8) / length, warmup_fraction=0.1
        )
        run(branch)
        rates = column(branch.run_dir, "learning_rate")
        decay = length - 8
        expected = [
            1e-2 + (1e-5 - 1e-2) * max(step - (length - 1 - decay), 0) / decay
            for step in range(8, length)
        ]
        assert [rates[step + 1] for step in range(8, length)] == pytest.approx(expected, rel=1e-4)
        assert rates[8] == column(stable.run_dir, "learning_rate")[8]


@pytest.mark.slow
def test_a_full_disk_is_named(corpus, tmp_path):
    """A limit of file sizes stands in for it: writing fails in the same calls."""
    config = small_config(corpus, tmp_path / "run", steps=8, checkpoint_every=4)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    process = start_training(config, preexec_fn=limit)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1, output
    assert "File too large" in output
    assert "raise the limit of file sizes" in output
    assert "Traceback" not in output
    assert len(output.splitlines()) < 30, output


@pytest.mark.slow
def test_a_hangup_saves_and_a_closed_pipe_does_not_matter(corpus, tmp_path):
    config = small_config(corpus, tmp_path / "run")
    # Under nohup, and where the tests run under it, the signal is ignored.
    restore = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # noqa: E731
    process = start_training(config, preexec_fn=restore)
    process.stdout.close()
    while process.poll() is None and max(column(config.run_dir, "loss"), default=0) < 5:
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=300) == 0
    with Checkpoints(config.run_dir, read_only=True) as checkpoints:
        assert checkpoints.latest() == max(column(config.run_dir, "loss"))
    process = start_training(config)
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert list(column(config.run_dir, "loss")) == list(range(1, 31))
