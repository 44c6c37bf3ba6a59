"""The command lines: flags, and errors that say what is right before anything is written."""

import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinny"], "CONFIG is 'tinny'; it must be one of tiny, gqe_250m"),
        (["tiny", "--model.attention.top-k", "3"], "top_k is 3; a group has 2 experts"),
        (["--model.attention.variant", "moe"], "invalid choice 'moe'"),
        (["--mesh.data", "3"], "it uses 3 of 8 devices: set one axis to -1"),
        (["--batch-size", "12"], "must be a multiple of mesh.data"),
        (["--data.corpus", "nowhere"], "corpus nowhere has no manifest.json"),
    ],
)
def test_train_names_what_is_wrong(tmp_path, arguments, message):
    result = run("train.py", *arguments, "--run-dir", str(tmp_path / "run"))
    assert result.returncode != 0
    shown = " ".join((result.stdout + result.stderr).replace("│", " ").split())
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run").exists()


def test_every_field_is_a_documented_flag():
    result = run("train.py", "gqa_250m", "--help")
    assert result.returncode == 0
    for flag in (
        "--run-dir", "--steps", "--seed", "--batch-size", "--sequence-length",
        "--checkpoint-every", "--eval-every", "--model.num-layers", "--model.attention.top-k",
        "--optimizer.peak-learning-rate", "--data.corpus", "--mesh.data", "--mesh.fsdp",
        "--mesh.tensor",
    ):  # fmt: skip
        assert flag in result.stdout, flag
    assert "Groups, each with one key/value head, G." in result.stdout
    assert "{gqe,hard_concat,weighted_concat,gqa}" in result.stdout


def test_a_machine_without_a_tpu_hears_nothing_of_libtpu(tmp_path):
    result = run("eval.py", str(tmp_path))
    assert "TPU" not in result.stderr


def test_eval_names_what_is_wrong(tmp_path):
    result = run("eval.py", str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {tmp_path} has no checkpoints")
    assert run("eval.py").returncode == 2
