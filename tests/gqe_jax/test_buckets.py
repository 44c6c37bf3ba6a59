"""Runs, corpora and locks in buckets, by the stores' own protocols, on servers of this machine.

What these servers cannot show: credentials and permissions, limits on the rate of requests, the
retries after a server's errors, buckets with hierarchical namespaces, the gRPC transport, hosts
that see each other's objects late, and the time that anything takes. The S3 server stands for the
protocol, not for stores that call themselves compatible.
"""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from gqe_jax.config import ConfigError
from gqe_jax.data import open_corpus
from gqe_jax.storage import location
from gqe_jax.training.checkpoint import Checkpoints
from gqe_jax.training.lock import RunLock, RunLockedError
from tests.gqe_jax.buckets import Hold, serve
from tests.gqe_jax.jobs import finish, start_job, start_together
from tests.gqe_jax.runs import (
    REPOSITORY,
    comparable_metrics,
    make_corpus,
    saved_state,
    small_config,
)
from tests.gqe_jax.signalled import files, make_texts, start_preparing, wait_until

HOLD_LOCK = """
import sys, time
from gqe_jax.training.lock import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def hold(tmp_path_factory):
    return Hold(tmp_path_factory.mktemp("hold") / "hold")


@pytest.fixture(scope="module")
def urls(tmp_path_factory, hold):
    """A bucket of each store; this process and those that it starts are clients of both."""
    for name in ("gcsfs", "gcp_storage_emulator", "s3fs", "moto", "flask_cors"):
        pytest.importorskip(name, reason=f"needs {name}: pip install -e '.[buckets]'")
    with (
        pytest.MonkeyPatch.context() as patch,
        serve("gs", hold.path) as google,
        serve("s3", hold.path) as amazon,
    ):
        for name, value in (google | amazon).items():
            patch.setenv(name, value)
        yield {"gs": "gs://bucket", "s3": "s3://bucket"}


@pytest.fixture(params=["gs", "s3"])
def bucket(request, urls):
    return urls[request.param]


def names(url: str) -> list[str]:
    """The rest of the names of the objects below a URL."""
    root = location(url)
    root.fs.invalidate_cache()
    below = f"{root.path}/"
    found = root.fs.find(root.path)
    return [name.removeprefix(below) for name in found if name.startswith(below)]


def objects(url: str) -> dict[str, bytes]:
    """The objects below a URL, by the rest of their names."""
    root = location(url)
    return {name: root.fs.cat_file(f"{root.path}/{name}") for name in names(url)}


def test_a_preparation_that_is_killed_goes_on(bucket, hold, tmp_path):
    texts = make_texts(tmp_path, count=4, size=1 << 18)
    [(status, output)] = finish([start_preparing(texts, tmp_path / "local", processes=1)])
    assert status == 0, output

    url = f"{bucket}/corpus"
    if bucket.startswith("gs"):
        hold.arm("write", "train-00002")
    process = start_preparing(texts, url, processes=1)
    parts = lambda: [name for name in names(url) if name.endswith(".json")]  # noqa: E731
    assert wait_until(hold.is_held if bucket.startswith("gs") else parts, process)
    kill(process)
    if bucket.startswith("gs"):
        hold.release()
    assert parts()
    with pytest.raises(Exception, match="has no manifest"):
        open_corpus(url)

    [(status, output)] = finish([start_preparing(texts, url, processes=1)])
    assert status == 0, output
    local = files(tmp_path / "local")
    assert objects(url) == local
    ours, theirs = open_corpus(url), open_corpus(str(tmp_path / "local"))
    assert ours.fingerprint == theirs.fingerprint
    starts = [0, 199_990, 5, len(theirs.train) - 3]
    for a, b in zip(
        ours.train.read_many(starts, 64), theirs.train.read_many(starts, 64), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_the_lock_of_a_job_that_was_killed_is_taken_over(bucket):
    url = f"{bucket}/locked"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, url], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunLockedError, match=f"in use by process {holder.pid} on host"):
        RunLock(url).__enter__()
    kill(holder)
    begun = time.monotonic()
    with RunLock(url) as lock:
        assert time.monotonic() - begun < 30  # no lease
        assert names(url) == ["train-2.lock"]
        lock.check()
    assert names(url) == []


def test_one_of_many_that_start_together_gets_the_lock(bucket):
    url = f"{bucket}/contended"
    owner = {"host": "elsewhere", "pid": 7, "machine": "another", "token": "t", "renewed": 0}
    (location(url) / "train-1.lock").write_bytes(json.dumps(owner).encode())
    held, refused = start_together(url, 6)
    assert (len(held), len(refused)) == (1, 5)
    held[0].__exit__()
    assert names(url) == []


def test_checkpoints_in_s3_are_refused_before_anything_is_written(urls, tmp_path):
    run_dir = f"{urls['s3']}/run"
    with pytest.raises(ConfigError, match=r"run_dir is 's3://bucket/run'; .* or to gs://"):
        Checkpoints(run_dir)
    [process] = start_job(small_config(make_corpus(tmp_path), run_dir), 1, cache=tmp_path / "cache")
    [(status, output)] = finish([process])
    assert status == 1, output
    assert "error: run_dir is 's3://bucket/run'" in output
    assert "Traceback" not in output
    assert names(run_dir) == []


def test_a_run_that_is_killed_in_each_phase_ends_as_one_on_a_disk(urls, hold, tmp_path):
    corpus = make_corpus(tmp_path)
    remote = f"{urls['gs']}/texts"
    location(remote).fs.put(f"{corpus}/", f"{remote}/", recursive=True)
    changes = {"steps": 6, "eval_every": 3, "checkpoint_every": 2}
    local = small_config(corpus, tmp_path / "run", **changes)
    [(status, output)] = finish(start_job(local, 1, cache=tmp_path / "cache"))
    assert status == 0, output

    config = small_config(remote, f"{urls['gs']}/run", **changes)
    run = location(config.run_dir)
    phases = [
        ("write", "run/metrics.jsonl", 1),  # in the first save; one before, at the start
        ("write", "run/checkpoints/2/", 3),
        ("read", "texts/validation-", 0),
        ("write", "run/checkpoints/6/", 5),
        ("write", "run/report/loss.png", 0),
    ]
    for phase in phases:
        hold.arm(*phase)
        [process] = start_job(config, 1, cache=tmp_path / "cache")
        held = wait_until(hold.is_held, process)
        output = kill(process)
        assert held, (phase, output)
        hold.release()
        assert "sign of life" not in output, output
        assert "Traceback" not in output, output
        assert len([name for name in names(str(run)) if name.endswith(".lock")]) <= 1
    [(status, output)] = finish(start_job(config, 1, cache=tmp_path / "cache"))
    assert status == 0, output

    assert comparable_metrics(run) == comparable_metrics(local.run_dir)
    ours, theirs = saved_state(config), saved_state(local)
    assert len(ours) == len(theirs) > 20
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    report = files(tmp_path / "run" / "report")
    assert len(report) == 4
    assert objects(f"{run}/report") == report
    assert not [name for name in names(str(run)) if name.endswith(".lock")]
    saved = {int(name.split("/")[1]) for name in names(str(run)) if "checkpoints/" in name}
    assert saved == {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()}


def kill(process: subprocess.Popen) -> str:
    """Kills a process; returns its output."""
    process.kill()
    return process.communicate()[0]
