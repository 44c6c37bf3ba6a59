"""Kills and signals at random moments, again and again, and what becomes of the work.

    python -m tests.gqe_jax.kills --phase all --kills 50

Each phase disturbs a command `kills` times, starts the same command again each time, and compares
its end, bit for bit, with that of a command that nothing disturbed:

- `train`: of a job of two processes, one dies by SIGKILL, every other time while a checkpoint is
  being written. The other must end by itself, and the next start go on from a whole checkpoint.
- `evaluate`, `report`: SIGTERM, SIGINT, SIGHUP and SIGKILL reach `train.py` while it evaluates, or
  while it draws the report at the end of a run.
- `prepare`: the same signals reach `gqe_jax.data.prepare` and its workers.

The lock of the run directory is taken over each time, without a wait.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu warns at length where there is no TPU

import argparse
import collections
import dataclasses
import logging
import pathlib
import random
import re
import subprocess
import tempfile
import time

import numpy as np

from gqe_jax.config import MeshConfig, RunConfig
from gqe_jax.training.telemetry import read_metrics
from tests.gqe_jax.jobs import finish, kill_one, reach, start_job
from tests.gqe_jax.runs import make_corpus, saved_state, small_config
from tests.gqe_jax.signalled import PHASES

SECONDS_TO_END = 60
"""In which the others must miss a dead process."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """What one kill did."""

    began_at: int
    """Step that the run went on from."""
    saved: bool
    """Whether a checkpoint was being written."""
    seconds: float
    """Until the other process had ended."""


def job_config(corpus: pathlib.Path, run_dir: pathlib.Path, steps: int) -> RunConfig:
    """A run that saves every other step."""
    mesh = MeshConfig(data=1, fsdp=-1)
    return small_config(corpus, run_dir, mesh=mesh, steps=steps, checkpoint_every=2)


def whole_checkpoints(config: RunConfig) -> set[int]:
    """The steps whose checkpoints have their final name."""
    directory = pathlib.Path(config.run_dir) / "checkpoints"
    return {int(path.name) for path in directory.glob("*") if path.name.isdecimal()}


def wait_for_a_save(job: list[subprocess.Popen], config: RunConfig, timeout: float = 60) -> bool:
    """Whether a checkpoint is being written: one is there under its temporary name."""
    directory = pathlib.Path(config.run_dir) / "checkpoints"
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and all(process.poll() is None for process in job):
        if any(directory.glob("*tmp*")):
            return True
        time.sleep(0.001)
    return False


def kill_once(
    config: RunConfig, rng: random.Random, cache: pathlib.Path, *, during_save: bool
) -> Kill | None:
    """Goes on with the run and kills a process of it; None if the run came to its end before."""
    before = whole_checkpoints(config)
    logged = max((line["step"] for line in read_metrics(config.run_dir)), default=0)
    job = start_job(config, 2, cache=cache)
    reach(job, config, logged + rng.randint(1, 3))  # beyond what was there: both have joined
    saving = wait_for_a_save(job, config) if during_save else False
    time.sleep(rng.uniform(0, 0.02 if during_save else 0.3))
    died = time.monotonic()
    index = rng.randrange(2)
    kill_one(job, index)
    results = finish(job, timeout=SECONDS_TO_END)
    seconds = time.monotonic() - died
    assert "sign of life" not in results[0][1], results  # the lock was taken over without a wait
    began_at = _check_start(results[0][1], before)
    if results[index][0] == 0:
        return None
    status, output = results[1 - index]
    assert status != 0 or max(whole_checkpoints(config)) == config.steps, output
    assert status == 0 or "error" in output.lower(), output
    return Kill(began_at, saving, seconds)


def _check_start(output: str, whole: set[int]) -> int:
    """The step that the first process says it went on from; it must be the last whole one."""
    resumed = re.search(r"resuming \S+ at step (\d+)", output)
    if resumed is None:
        assert not whole or "run " not in output, output
        return 0
    assert int(resumed[1]) == max(whole), (resumed[0], whole)
    return int(resumed[1])


def run_kills(
    directory: pathlib.Path, corpus: pathlib.Path, kills: int, *, steps: int, seed: int
) -> list[Kill]:
    """Kills a run `kills` times and compares its end with an undisturbed one."""
    rng = random.Random(seed)
    cache = directory / "cache"
    undisturbed = job_config(corpus, directory / "undisturbed", steps)
    for status, output in finish(start_job(undisturbed, 2, cache=cache)):
        assert status == 0, output
    config = job_config(corpus, directory / "killed", steps)
    done: list[Kill] = []
    while len(done) < kills:
        kill = kill_once(config, rng, cache, during_save=len(done) % 2 == 0)
        if kill is None:
            break
        done.append(kill)
        print(f"kill {len(done)}: {kill}", flush=True)
    for status, output in finish(start_job(config, 2, cache=cache)):
        assert status == 0, output
    ours, theirs = saved_state(config), saved_state(undisturbed)
    assert len(ours) == len(theirs) > 20
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    return done


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--phase", choices=("train", *PHASES, "all"), default="train")
    parser.add_argument("--kills", type=int, default=50, help="for each phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, help="a new directory that is kept")
    arguments = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells that it only reads
    with tempfile.TemporaryDirectory() as temporary:
        for phase in ("train", *PHASES) if arguments.phase == "all" else (arguments.phase,):
            directory = (arguments.output or pathlib.Path(temporary)) / phase
            directory.mkdir(parents=True)
            if phase == "train":
                _disturb_training(directory, arguments.kills, arguments.seed)
            else:
                _disturb(phase, directory, arguments.kills, arguments.seed)


def _disturb_training(directory: pathlib.Path, kills: int, seed: int) -> None:
    corpus = make_corpus(directory)
    done = run_kills(directory, corpus, kills, steps=6 * kills + 10, seed=seed)
    saves = sum(kill.saved for kill in done)
    longest = max(kill.seconds for kill in done)
    print(
        f"train: {len(done)} kills, {saves} during a save; the other process ended within "
        f"{longest:.1f} s; the last state is that of the undisturbed run",
        flush=True,
    )


def _disturb(phase: str, directory: pathlib.Path, kills: int, seed: int) -> None:
    done = []
    for disturbance in PHASES[phase](directory, kills, random.Random(seed)):
        done.append(disturbance)
        print(f"{phase} {len(done)}: {disturbance}", flush=True)
    names = collections.Counter(each.number.name for each in done if each.during)
    during = ", ".join(f"{count} {name}" for name, count in sorted(names.items()))
    longest = max(each.seconds for each in done)
    print(
        f"{phase}: {len(done)} signals, of which in the phase: {during}; the process ended within "
        f"{longest:.1f} s; what it makes is, bit for bit, what an undisturbed one makes",
        flush=True,
    )


if __name__ == "__main__":
    main()
