"""Sends signals to `train.py` and `prepare` at random moments, and checks what they leave.

The phases of `tests.gqe_jax.kills` but `train`.
"""

import dataclasses
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

from gqe_jax.config import RunConfig
from gqe_jax.training.telemetry import METRICS_FILE, read_metrics
from tests.gqe_jax.jobs import finish, start_job
from tests.gqe_jax.runs import (
    REPOSITORY,
    comparable_metrics,
    make_corpus,
    saved_state,
    small_config,
)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)
SECONDS_TO_END = 60
"""In which a process must end after a signal."""
PREPARE = "from gqe_jax.data.prepare import main; main(task_bytes=1)"  # a task for each file


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """What one signal did."""

    number: signal.Signals
    during: bool
    """Whether the phase was going on when the signal was sent."""
    status: int
    seconds: float
    """Until the process had ended."""

    def __str__(self) -> str:
        when = "during" if self.during else "outside"
        return f"{self.number.name} {when}, status {self.status} after {self.seconds:.1f} s"


def locks(run_dir: str | pathlib.Path) -> list[pathlib.Path]:
    """The lock files of a run directory."""
    return sorted(pathlib.Path(run_dir).glob("train-*.lock"))


def holds_lock(process: subprocess.Popen, config: RunConfig) -> bool:
    """Whether the lock of the run is this process's."""
    for path in locks(config.run_dir):
        try:
            if json.loads(path.read_text())["pid"] == process.pid:
                return True
        except (OSError, ValueError, KeyError):
            continue
    return False


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen, timeout: float = 600
) -> bool:
    """Waits until the condition holds; False if the process ended before."""
    deadline = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError(process.communicate()[0])
        time.sleep(0.002)
    return True


def unscored_step(config: RunConfig) -> int | None:
    """The step that is evaluated now: trained and not scored; None if there is none."""
    lines = read_metrics(config.run_dir)
    trained = max((line["step"] for line in lines if "loss" in line), default=0)
    scored = {line["step"] for line in lines if "eval_loss" in line}
    due = trained and (trained % config.eval_every == 0 or trained == config.steps)
    return trained if due and trained not in scored else None


def modified(path: pathlib.Path) -> int:
    """Time of the last change in nanoseconds; 0 if there is no such file."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def send(
    process: subprocess.Popen, number: signal.Signals, statuses: set[int], *, during: bool
) -> Disturbance:
    """Sends the signal, waits for the end of the process, and checks its status and output."""
    sent = time.monotonic()
    process.send_signal(number)
    [(status, output)] = finish([process], SECONDS_TO_END)
    assert status in {0, *statuses}, (number, status, output)
    # Python itself prints one for a SIGINT while it exits.
    assert "Traceback" not in output or (number == signal.SIGINT and not during), output
    assert "sign of life" not in output, output  # the start took the lock over without a wait
    return Disturbance(number, during, status, time.monotonic() - sent)


def disturb_evaluations(
    directory: pathlib.Path, count: int, rng: random.Random
) -> Iterator[Disturbance]:
    """Disturbs a run `count` times while it evaluates, lets it end, and compares its end."""
    corpus = make_corpus(directory, validation_fraction=0.7)
    cache = directory / "cache"
    changes = {"steps": 24, "eval_every": 2, "eval_batches": 10_000, "batch_size": 2}
    undisturbed = small_config(corpus, directory / "undisturbed", **changes)
    [process] = start_job(undisturbed, 1, cache=cache)
    wait_until(lambda: (unscored_step(undisturbed) or 0) >= 8, process)
    begun = time.monotonic()
    wait_until(lambda: unscored_step(undisturbed) is None, process)
    longest = time.monotonic() - begun
    run_to_end(process)

    config = dataclasses.replace(undisturbed, run_dir=str(directory / "killed"))
    metrics = pathlib.Path(config.run_dir) / METRICS_FILE
    for number in (SIGNALS[i % len(SIGNALS)] for i in range(count)):
        before = modified(metrics)
        [process] = start_job(config, 1, cache=cache)
        wait_until(lambda before=before: modified(metrics) > before, process)
        done = max((line["step"] for line in read_metrics(config.run_dir)), default=0)
        target = min(done + rng.randint(0, 2), config.steps)
        wait_until(lambda target=target: (unscored_step(config) or 0) >= target, process)
        time.sleep(rng.uniform(0, longest))
        statuses = {-number} if number == signal.SIGKILL else set()
        yield send(process, number, statuses, during=unscored_step(config) is not None)
        check_locks(config, number)
        if whole(config) == config.steps and unscored_step(config) is None:
            compare_runs(config, undisturbed)
            shutil.rmtree(config.run_dir)
    run_to_end(start_job(config, 1, cache=cache)[0])
    compare_runs(config, undisturbed)


def whole(config: RunConfig) -> int:
    """The last step whose checkpoint has its final name."""
    saved = pathlib.Path(config.run_dir, "checkpoints").glob("*")
    return max((int(path.name) for path in saved if path.name.isdecimal()), default=0)


def disturb_reports(
    directory: pathlib.Path, count: int, rng: random.Random
) -> Iterator[Disturbance]:
    """Disturbs the end of a run `count` times while it draws its report, and compares its end."""
    corpus = make_corpus(directory)
    cache = directory / "cache"
    undisturbed = small_config(corpus, directory / "undisturbed", steps=6)
    run_to_end(start_job(undisturbed, 1, cache=cache)[0])
    drawn = files(pathlib.Path(undisturbed.run_dir) / "report")
    assert len(drawn) == 4, sorted(drawn)

    config = dataclasses.replace(undisturbed, run_dir=str(directory / "killed"))
    report = pathlib.Path(config.run_dir) / "report"
    metrics = pathlib.Path(config.run_dir) / METRICS_FILE
    for number in (SIGNALS[i % len(SIGNALS)] for i in range(count)):
        before = modified(metrics)
        [process] = start_job(config, 1, cache=cache)
        # A run that was at its end opens its metrics and has nothing to do but the report.
        wait_until(lambda before=before: modified(metrics) > before, process)
        wait_until(lambda: is_scored(config), process)
        time.sleep(rng.uniform(0, 1))
        during = process.poll() is None and len(files(report)) < len(drawn)
        statuses = {-number} if number == signal.SIGKILL or not during else set()
        yield send(process, number, statuses, during=during)
        check_locks(config, number)
        found = {name: content for name, content in files(report).items() if name in drawn}
        assert found == {name: drawn[name] for name in found}
        assert number == signal.SIGKILL or len(found) == len(drawn)
        shutil.rmtree(report, ignore_errors=True)
    run_to_end(start_job(config, 1, cache=cache)[0])
    compare_runs(config, undisturbed)


def is_scored(config: RunConfig) -> bool:
    """Whether the last step is evaluated."""
    scored = [line["step"] for line in read_metrics(config.run_dir) if "eval_loss" in line]
    return config.steps in scored


def run_to_end(process: subprocess.Popen) -> None:
    """Waits for the end of a process that nothing disturbs."""
    [(status, output)] = finish([process])
    assert status == 0, output
    assert "sign of life" not in output, output


def check_locks(config: RunConfig, number: signal.Signals | None) -> None:
    """A job that is killed leaves its one lock; every other end removes it."""
    assert len(locks(config.run_dir)) <= (number == signal.SIGKILL), locks(config.run_dir)


def compare_runs(config: RunConfig, undisturbed: RunConfig) -> None:
    """Metrics, all saved arrays, and the report are those of the undisturbed run."""
    assert comparable_metrics(config.run_dir) == comparable_metrics(undisturbed.run_dir)
    ours, theirs = saved_state(config), saved_state(undisturbed)
    assert len(ours) == len(theirs) > 20
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    reports = [files(pathlib.Path(run.run_dir, "report")) for run in (config, undisturbed)]
    assert reports[0] == reports[1]
    assert reports[0]
    assert locks(config.run_dir) == []


def files(directory: pathlib.Path) -> dict[str, bytes]:
    """The content of all files below a directory; empty if there is none."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def make_texts(directory: pathlib.Path, count: int = 8, size: int = 1 << 20) -> pathlib.Path:
    """Files of JSON lines of about `size` bytes each; returns their directory."""
    rng = random.Random(1)
    texts = directory / "texts"
    texts.mkdir()
    words = ["experts", "group", "the", "heads", "that", "read", "one", "key", "élan", "量子"]
    for index in range(count):
        with (texts / f"{index}.jsonl").open("w") as file:
            while file.tell() < size:
                text = " ".join(rng.choices(words, k=rng.randint(5, 300)))
                file.write(json.dumps({"text": text}) + "\n")
    return texts


def start_preparing(
    texts: pathlib.Path, output: pathlib.Path | str, processes: int = 2
) -> subprocess.Popen:
    """`gqe_jax.data.prepare` of several tasks, with several shards for each."""
    flags = {
        "input": str(texts / "*.jsonl"),
        "output": str(output),
        "processes": processes,
        "validation-fraction": 0.1,
        "shard-tokens": 200_000,
    }
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def begin_preparing(
    texts: pathlib.Path, output: pathlib.Path
) -> tuple[subprocess.Popen, Callable[[], int]]:
    """Starts to prepare and waits until the process writes; also the number of finished tasks."""

    def records() -> list[pathlib.Path]:
        return list(output.parent.glob(f".{output.name}.partial-*/parts/*"))

    def last_begin() -> int:
        return max((modified(path) for path in records() if "." not in path.name), default=0)

    before = last_begin()
    process = start_preparing(texts, output)
    assert wait_until(lambda: last_begin() > before, process), process.communicate()[0]
    return process, lambda: sum(path.suffix == ".json" for path in records())


def disturb_preparations(
    directory: pathlib.Path, count: int, rng: random.Random
) -> Iterator[Disturbance]:
    """Disturbs `count` preparations, and compares each corpus that comes of it."""
    texts = make_texts(directory)
    run_to_end(start_preparing(texts, directory / "undisturbed"))
    due = files(directory / "undisturbed")
    assert len(due) > 40, sorted(due)

    output = directory / "killed"
    for number in (SIGNALS[i % len(SIGNALS)] for i in range(count)):
        process, finished = begin_preparing(texts, output)
        target = rng.randint(0, 6)
        wait_until(lambda finished=finished, target=target: finished() >= target, process)
        time.sleep(rng.uniform(0, 0.3))
        workers, during = children(process), not output.exists()
        yield send(process, number, {-number, 128 + number}, during=during)
        deadline = time.monotonic() + SECONDS_TO_END
        while any(map(is_running, workers)):
            assert time.monotonic() < deadline, "workers are left"
            time.sleep(0.01)
        partial = list(directory.glob(f".{output.name}.partial-*"))
        assert len(partial) <= (number == signal.SIGKILL), partial
        if output.exists():
            assert files(output) == due
            shutil.rmtree(output)
    run_to_end(start_preparing(texts, output))
    assert files(output) == due
    assert not list(directory.glob(f".{output.name}.partial-*"))


def children(process: subprocess.Popen) -> list[int]:
    """The numbers of the processes that a process has started."""
    found: list[int] = []
    for path in pathlib.Path(f"/proc/{process.pid}/task").glob("*/children"):
        try:
            found += map(int, path.read_text().split())
        except OSError:
            continue
    return found


def is_running(pid: int) -> bool:
    """Whether a process has not ended, be it waited for or not."""
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


PHASES: dict[str, Callable[[pathlib.Path, int, random.Random], Iterator[Disturbance]]] = {
    "evaluate": disturb_evaluations,
    "prepare": disturb_preparations,
    "report": disturb_reports,
}
