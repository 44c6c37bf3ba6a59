"""A run that is killed or stopped ends as one that never was."""

import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gqe_jax.training.telemetry import read_metrics
from tests.gqe_jax.runs import (
    comparable_metrics,
    make_corpus,
    saved_state,
    small_config,
    start_training,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    config = small_config(corpus, tmp_path_factory.mktemp("undisturbed"))
    process = start_training(config)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGKILL, random.randint(2, 25)),
        (signal.SIGTERM, 0),  # while the first step compiles
    ],
    ids=["SIGKILL at random", "SIGTERM before the first step"],
)
def test_interrupted_run_is_bit_identical_after_a_restart(
    corpus, undisturbed, tmp_path, number, moment
):
    config = small_config(corpus, tmp_path)
    process = start_training(config)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        steps = [line["step"] for line in read_metrics(tmp_path)]
        if (tmp_path / "config.json").exists() and max(steps, default=0) >= moment:
            process.send_signal(number)
            break
        time.sleep(0.002)
    output = process.communicate(timeout=300)[0]
    if number == signal.SIGTERM:
        assert process.returncode == 0, output
        assert "SIGTERM: saving" in output
        assert "the same command resumes from there" in output or "step 30/30" in output
    else:
        assert process.returncode in (-signal.SIGKILL, 0), output

    again = start_training(config)
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output

    assert comparable_metrics(tmp_path) == comparable_metrics(undisturbed.run_dir), moment
    ours, theirs = saved_state(config), saved_state(undisturbed)
    assert len(ours) == len(theirs) > 20
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=f"interrupted at {moment}")


def test_the_second_signal_exits_at_once():
    program = """
import os, signal
from gqe_jax.training.interrupt import Interrupt
with Interrupt() as interrupt:
    assert not interrupt
    os.kill(os.getpid(), signal.SIGINT)
    assert interrupt
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("never here", flush=True)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == 128 + signal.SIGTERM
    assert run.stdout == "still here\n"
    assert "once more to exit now" in run.stderr
