"""Two and four real processes train one run as one process does, and end and go on together."""

import dataclasses
import re
import shutil
import signal

import jax
import numpy as np
import pytest

from gqe_jax import processes
from gqe_jax.config import ConfigError, MeshConfig
from gqe_jax.sharding import make_mesh
from gqe_jax.training.loop import train
from gqe_jax.training.telemetry import read_metrics
from tests.gqe_jax.jobs import due_rows, finish, free_port, kill_one, reach, read_rows, start_job
from tests.gqe_jax.kills import SECONDS_TO_END, whole_checkpoints
from tests.gqe_jax.runs import make_corpus, saved_state, small_config

STEPS = 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The run by one process, this one, over its eight devices."""
    config = small_config(corpus, tmp_path_factory.mktemp("alone"), steps=STEPS)
    train(config)
    return config


@pytest.fixture(scope="module")
def four(corpus, cache, tmp_path_factory):
    """The run by four processes, undisturbed, and what they recorded."""
    directory = tmp_path_factory.mktemp("four")
    config = four_config(corpus, directory / "run")
    for status, output in finish(start_job(config, 4, record=directory / "rows", cache=cache)):
        assert status == 0, output
    return config, read_rows(directory / "rows")


def four_config(corpus, run_dir):
    return small_config(corpus, run_dir, steps=STEPS, mesh=MeshConfig(data=2, fsdp=2))


@pytest.fixture(scope="module")
def stopped(corpus, cache, tmp_path_factory):
    """Four processes, one of which had a SIGTERM: the run, the step, what was trained on."""
    directory = tmp_path_factory.mktemp("stopped")
    config = four_config(corpus, directory / "run")
    job = start_job(config, 4, record=directory / "rows", cache=cache)
    reach(job, config, 5)
    job[2].send_signal(signal.SIGTERM)
    results = finish(job)
    assert [status for status, _ in results] == [0] * 4, results
    assert "SIGTERM: saving" in results[2][1]
    step = int(re.search(r"stopped at step (\d+)", results[0][1])[1])
    assert not any("stopped at" in output for _, output in results[1:])  # one process speaks
    return config, step, read_rows(directory / "rows")


def losses(config):
    return {line["step"]: line["loss"] for line in read_metrics(config.run_dir) if "loss" in line}


def assert_same_losses(config, other):
    ours, theirs = losses(config), losses(other)
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_four_processes_train_as_one(alone, four):
    config, rows = four
    assert_same_losses(config, alone)
    assert rows == due_rows(config, 0, STEPS)


@pytest.mark.slow
def test_a_notice_to_one_of_four_saves_the_same_step_on_all(stopped):
    config, step, rows = stopped
    assert 5 <= step < STEPS
    assert max(whole_checkpoints(config)) == step
    assert rows == due_rows(config, 0, step)


@pytest.mark.slow
def test_two_processes_and_another_mesh_go_on_with_the_batches_due(alone, stopped, cache, tmp_path):
    config, step, _ = stopped
    shutil.copytree(config.run_dir, tmp_path / "run")
    mesh = MeshConfig(data=1, fsdp=2)
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"), mesh=mesh)
    for status, output in finish(start_job(config, 2, record=tmp_path / "rows", cache=cache)):
        assert status == 0, output
    assert read_rows(tmp_path / "rows") == due_rows(config, step, STEPS)
    assert_same_losses(config, alone)


@pytest.mark.slow
def test_eight_devices_go_on_with_the_batches_due(alone, stopped, tmp_path):
    config, _, _ = stopped
    shutil.copytree(config.run_dir, tmp_path / "run")
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"), mesh=mesh)
    train(config)
    assert_same_losses(config, alone)


@pytest.mark.slow
def test_a_dead_process_ends_the_job_and_the_restart_ends_as_if_nothing_was(
    stopped, four, cache, tmp_path
):
    config, step, _ = stopped
    shutil.copytree(config.run_dir, tmp_path / "run")
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"))
    job = start_job(config, 4, cache=cache)
    reach(job, config, step + 3)
    kill_one(job, 1)
    results = finish(job, timeout=SECONDS_TO_END)
    assert results[1][0] == -signal.SIGKILL
    for index in (0, 2, 3):
        status, output = results[index]
        assert status != 0
        assert "died" in output, output

    for status, output in finish(start_job(config, 4, cache=cache)):
        assert status == 0, output
    undisturbed, _ = four
    for a, b in zip(saved_state(config), saved_state(undisturbed), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID is not"),
        ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES is '0'; it must be a positive"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID is '4'; it must be from 0 to 3"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "it must be HOST:PORT of process 0"),
        ({"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS is 'two'; launchers set it"),
    ],
)
def test_what_is_wrong_with_the_variables_is_named(monkeypatch, variables, message):
    if message.endswith("is not"):
        given = variables
    else:
        given = {
            "JAX_COORDINATOR_ADDRESS": "host:1234",
            "JAX_NUM_PROCESSES": "4",
            "JAX_PROCESS_ID": "0",
        } | variables
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        processes.join()


def test_variables_that_are_empty_are_not_set(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", " ")
    processes.join()
    assert jax.process_count() == 1


@pytest.mark.parametrize("host", ["localhost", "host.invalid"])
def test_a_coordinator_that_cannot_be_reached_is_named(monkeypatch, host):
    address = f"{host}:{free_port()}"
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    message = f"JAX_COORDINATOR_ADDRESS is '{address}'; nothing answered there within 1 s"
    with pytest.raises(ConfigError, match=message):
        processes.join(seconds=1)


def test_one_process_joins_nothing_and_gets_its_wish_at_once():
    processes.join()
    assert jax.process_count() == 1
    wishes = iter([False, True])
    vote = processes.Vote(make_mesh(MeshConfig()), lambda: next(wishes))
    assert (vote(), vote()) == (False, True)
    assert processes.from_first({"a": [1, 2.5]}) == {"a": [1, 2.5]}
    assert processes.describe() == ""
