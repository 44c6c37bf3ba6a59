"""One job at a time trains a run; the lock of a job that is gone is taken over."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import fsspec
import pytest

from gqe_jax.config import ConfigError, MeshConfig
from gqe_jax.storage import location
from gqe_jax.training.lock import RunLock, RunLockedError
from gqe_jax.training.telemetry import read_metrics
from tests.gqe_jax.jobs import finish, start_job, start_together
from tests.gqe_jax.runs import make_corpus, small_config, start_training

HOLD = """
import sys, time
from gqe_jax.training.lock import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""

IN_ITS_OWN_DIRECTORY = """
import os, pathlib, runpy
root = os.getcwd()
os.chdir(pathlib.Path(__file__).parent / os.environ["JAX_PROCESS_ID"])
runpy.run_path(root + "/train.py", run_name="__main__")
"""


@pytest.fixture(params=["disk", "store"])
def directory(request, tmp_path):
    """A run directory on a disk, and one in a store."""
    if request.param == "disk":
        yield location(tmp_path / "run")
        return
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield location("memory://bucket/run")
    store.store.clear()


def foreign(path, renewed: float = 0.0) -> None:
    """Writes the lock of a process of another machine."""
    owner = {"host": "elsewhere", "pid": 7, "machine": "another", "token": "t", "renewed": renewed}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(owner).encode())


def locks(directory) -> list[str]:
    if not directory.exists():  # a store has no empty directories
        return []
    return sorted(path.name for path in directory.iterdir() if path.name.endswith(".lock"))


def test_the_second_is_refused_and_the_lock_is_gone_at_the_end(directory):
    with RunLock(directory) as lock:
        with pytest.raises(RunLockedError, match=rf"in use by process {os.getpid()} on host \S+"):
            RunLock(directory).__enter__()
        lock.check()
        assert locks(directory) == ["train-1.lock"]
    assert locks(directory) == []


def test_a_lock_of_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunLockedError, match=f"process {holder.pid} "):
        RunLock(tmp_path).__enter__()
    holder.send_signal(signal.SIGKILL)  # and it is not waited for: its number is still taken
    deadline = time.monotonic() + 30
    while locks(tmp_path) == ["train-1.lock"] and time.monotonic() < deadline:
        try:
            with RunLock(tmp_path):
                assert locks(tmp_path) == ["train-2.lock"]
        except RunLockedError:
            time.sleep(0.05)
    assert locks(tmp_path) == []
    holder.communicate()


def test_a_reused_process_number_is_another_process(tmp_path):
    with RunLock(tmp_path):
        path = tmp_path / "train-1.lock"
        owner = json.loads(path.read_text())
    path.write_text(json.dumps(owner | {"process_start": "1"}))
    with RunLock(tmp_path):
        assert locks(tmp_path) == ["train-2.lock"]


def test_a_lock_of_another_machine_is_taken_over_when_its_lease_ends(directory):
    foreign(directory / "train-4.lock")
    begun = time.monotonic()
    with RunLock(directory, lease=1.0):
        assert time.monotonic() - begun >= 1.0
        assert locks(directory) == ["train-5.lock"]


def test_a_lock_of_another_machine_that_is_renewed_is_respected(directory):
    foreign(directory / "train-1.lock")
    done = threading.Event()

    def renew():
        count = 0
        while not done.wait(0.1):
            count += 1
            foreign(directory / "train-1.lock", renewed=count)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(RunLockedError, match="in use by process 7 on host elsewhere"):
            RunLock(directory, lease=2.0).__enter__()
    finally:
        done.set()
        thread.join()


def test_a_lock_is_renewed_by_its_holder(directory):
    with RunLock(directory, lease=0.6):
        path = directory / "train-1.lock"
        seen = lambda: (path.read_bytes(), path.stat().st_mtime)  # noqa: E731
        first = seen()
        time.sleep(0.5)
        assert seen() != first


def test_a_holder_that_lost_its_lock_is_told(directory):
    with RunLock(directory) as lock:
        foreign(directory / "train-2.lock")
        with pytest.raises(RunLockedError, match="was taken over by another job"):
            lock.check()
    (directory / "train-2.lock").unlink()


def test_one_of_many_that_start_together_takes_over(tmp_path):
    foreign(tmp_path / "train-1.lock")
    held, refused = start_together(tmp_path, 6)
    assert (len(held), len(refused)) == (1, 5)
    held[0].__exit__()
    assert locks(tmp_path) == []


@pytest.mark.parametrize("kind", ["a file", "below a file", "a kernel's directory"])
def test_a_directory_that_cannot_be_written_is_named(tmp_path, kind):
    (tmp_path / "file").write_text("")
    directory = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "run",
        "a kernel's directory": "/proc/run",
    }[kind]
    with pytest.raises(ConfigError, match=rf"run_dir {directory} cannot be written \(.*name a dir"):
        RunLock(directory).__enter__()


@pytest.mark.slow
def test_two_jobs_on_one_run(tmp_path):
    """The second ends with a line; the first goes on to its end, alone."""
    config = small_config(make_corpus(tmp_path), tmp_path / "run")
    first = start_training(config)
    deadline = time.monotonic() + 200
    while not read_metrics(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)
    try:
        second = start_training(config)
        output = second.communicate(timeout=200)[0]
    finally:
        first.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert "error: run_dir" in output
    assert f"in use by process {first.pid} on host" in output
    assert "Traceback" not in output
    output = first.communicate(timeout=300)[0]
    assert first.returncode == 0, output
    steps = [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert steps == list(range(1, 31))


@pytest.mark.slow
def test_a_directory_that_the_processes_do_not_share_is_named_at_the_start(tmp_path):
    corpus = make_corpus(tmp_path)
    for index in range(2):
        (tmp_path / str(index)).mkdir()
    mesh = MeshConfig(data=1, fsdp=-1)
    config = small_config(corpus, "run", mesh=mesh)  # relative: each process has its own
    launch = (str(tmp_path / "in.py"),)
    (tmp_path / "in.py").write_text(IN_ITS_OWN_DIRECTORY)
    begun = time.monotonic()
    results = finish(start_job(config, 2, launcher=launch, cache=tmp_path / "cache"), timeout=200)
    assert time.monotonic() - begun < 150
    for status, output in results:
        assert status == 1, output
        assert "is not shared: process 1 does not see the file train-1.lock" in output
        assert "Traceback" not in output
    assert not list((tmp_path / "0" / "run").iterdir())
