"""Runs by several processes on this machine, and what each of them trained on."""

import os
import pathlib
import signal
import socket
import subprocess
import threading
import time
import zlib

import numpy as np

from gqe_jax.config import RunConfig
from gqe_jax.data import open_corpus, window_indices
from gqe_jax.data.pipeline import num_windows, read_windows
from gqe_jax.training.lock import RunLock, RunLockedError
from gqe_jax.training.telemetry import read_metrics
from tests.gqe_jax.runs import start_training

Rows = dict[tuple[int, int], int]
"""(step, row of the batch): checksum of the tokens."""


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start_job(
    config: RunConfig,
    count: int,
    *,
    record: pathlib.Path | None = None,
    launcher: tuple[str, ...] = ("train.py",),
    flags: tuple[str, ...] = (),
    cache: pathlib.Path,
) -> list[subprocess.Popen]:
    """`train.py` on `count` processes of one device each.

    Args:
      config: the run.
      count: of processes.
      record: directory for the checksums of the rows that they train on, `read_rows`.
      launcher: what Python starts in place of `train.py`; not with `record`.
      flags: further ones of `train.py`.
      cache: directory of compiled programs.
    """
    if record is not None:
        launcher = ("-m", "tests.gqe_jax.recorded", str(record))
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling takes longer than these runs
    }
    if count > 1:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
            "JAX_NUM_PROCESSES": str(count),
        }
    return [
        start_training(
            config,
            launcher=launcher,
            flags=flags,
            environment=environment | {"JAX_PROCESS_ID": str(index)},
        )
        if count > 1
        else start_training(config, launcher=launcher, flags=flags, environment=environment)
        for index in range(count)
    ]


def finish(job: list[subprocess.Popen], timeout: float = 600) -> list[tuple[int, str]]:
    """Exit status and output of each process; those that hang are killed, with an error."""
    deadline = time.monotonic() + timeout
    try:
        outputs = [
            process.communicate(timeout=max(deadline - time.monotonic(), 1))[0] for process in job
        ]
    finally:
        for process in job:
            if process.poll() is None:
                process.kill()
    return [(process.returncode, output) for process, output in zip(job, outputs, strict=True)]


def reach(job: list[subprocess.Popen], config: RunConfig, step: int, timeout: float = 600) -> None:
    """Waits until the run has logged `step`, or a process has ended."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and all(process.poll() is None for process in job):
        if max((line["step"] for line in read_metrics(config.run_dir)), default=0) >= step:
            return
        time.sleep(0.005)


def kill_one(job: list[subprocess.Popen], index: int) -> None:
    """Kills the process without notice, as a machine dies."""
    job[index].send_signal(signal.SIGKILL)


def read_rows(record: pathlib.Path) -> Rows:
    """What the processes that recorded there trained on; a row has one content only."""
    rows: Rows = {}
    for path in sorted(record.glob("*.txt")):
        for line in path.read_text().splitlines():
            step, row, checksum = map(int, line.split())
            assert rows.setdefault((step, row), checksum) == checksum, (path, step, row)
    return rows


def due_rows(config: RunConfig, start: int, stop: int) -> Rows:
    """What steps `start` to `stop` of the run are to train on, by one process in one go."""
    split = open_corpus(config.data.corpus).train
    rows: Rows = {}
    for step in range(start, stop):
        windows = window_indices(
            step,
            slice(None),
            batch_size=config.batch_size,
            windows=num_windows(split, config.sequence_length),
            seed=config.seed,
        )
        batch = read_windows(split, windows, config.sequence_length, False)
        rows |= {(step, row): checksum(tokens) for row, tokens in enumerate(batch.inputs)}
    return rows


def checksum(tokens: np.ndarray) -> int:
    """The checksum of the tokens of a row of a batch."""
    return zlib.crc32(np.ascontiguousarray(tokens, np.int32).tobytes())


def start_together(run_dir: str | os.PathLike, count: int) -> tuple[list[RunLock], list[RunLock]]:
    """So many threads ask for a run's lock at once: those that hold it, and those refused."""
    held, refused, barrier = [], [], threading.Barrier(count)

    def start() -> None:
        lock = RunLock(run_dir, lease=0.5)
        barrier.wait()
        try:
            held.append(lock.__enter__())
        except RunLockedError:
            refused.append(lock)

    threads = [threading.Thread(target=start) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return held, refused
