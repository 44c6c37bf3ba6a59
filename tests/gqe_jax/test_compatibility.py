"""Runs, checkpoints and exported weights of an earlier commit load and go on as they did there.

What is only read or written must be the same bits. What is computed must be the same within 1e-5:
the order of sums may change.
"""

import contextlib
import json
import pathlib
import re
import tarfile

import numpy as np
import pytest

from tests.gqe_jax.earlier_run import (
    EXPECTED,
    EXPORT,
    FILES,
    IMPORT,
    STEP,
    command,
    outcome,
    parameters,
)

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def expected():
    return json.loads(EXPECTED.read_text())


@pytest.fixture(scope="module")
def run_again(tmp_path_factory):
    """A directory with the earlier run, and its outcome with today's code."""
    directory = tmp_path_factory.mktemp("earlier")
    with tarfile.open(FILES) as archive:
        archive.extractall(directory, filter="data")
    with contextlib.chdir(directory):
        return directory, outcome()


def assert_close(ours, theirs):
    """Compares numbers in nested lists and dictionaries of the same structure."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert_close(value, theirs[name])
    else:
        # The schedule's float32 decays by differences, to a learning rate of 1e-4.
        np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=1e-8)


def assert_has(ours, theirs):
    """Each field of `theirs`, at any depth, is the same in `ours`, which may have more."""
    if not isinstance(theirs, dict):
        assert ours == theirs
        return
    for name, value in theirs.items():
        assert_has(ours[name], value)


@pytest.mark.slow
def test_the_state_of_a_checkpoint_is_read_bit_for_bit(run_again, expected):
    _, ours = run_again
    assert ours["state"] == expected["state"]


@pytest.mark.slow
def test_the_run_goes_on_with_the_same_metrics(run_again, expected):
    _, ours = run_again
    steps = [line["step"] for line in expected["metrics"] if "loss" in line]
    assert [line["step"] for line in ours["metrics"] if "loss" in line] == steps
    for line, earlier in zip(ours["metrics"], expected["metrics"], strict=True):
        assert_close(line, earlier)


def test_the_run_goes_on_to_the_same_parameters(run_again, expected):
    _, ours = run_again
    assert ours["projections"].keys() == expected["projections"].keys()
    for name, theirs in expected["projections"].items():
        assert ours["projections"][name] == pytest.approx(theirs, abs=TOLERANCE), name


def test_its_score_and_text_are_the_same(run_again, expected):
    _, ours = run_again
    assert ours["text"] == expected["text"]
    number = r"\d+\.\d+"
    assert re.sub(number, "", ours["score"]) == re.sub(number, "", expected["score"])
    scores = [np.array(re.findall(number, x["score"]), float) for x in (ours, expected)]
    np.testing.assert_allclose(*scores, atol=1e-4)  # four digits are printed


def test_its_exported_weights_are_read_bit_for_bit(run_again, monkeypatch):
    directory, _ = run_again
    monkeypatch.chdir(directory)
    command(*IMPORT, "imported")
    ours, theirs = parameters("imported", 0), parameters("run", STEP)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_it_is_exported_to_the_same_files(run_again, monkeypatch):
    directory, _ = run_again
    monkeypatch.chdir(directory)
    command(*EXPORT, "exported")
    ours, theirs = (
        {path.name: path.read_bytes() for path in pathlib.Path(name).iterdir()}
        for name in ("exported", "weights")
    )
    config, earlier = (json.loads(files.pop("config.json")) for files in (ours, theirs))
    assert ours == theirs
    assert_has(config, earlier)  # options, and what engines read, came later
