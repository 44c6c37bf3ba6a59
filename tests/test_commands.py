"""The command lines: flags, and errors that say what is right before anything is written."""

import dataclasses
import importlib
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from configs import CONFIGS
from gqe_jax.commands import parse
from gqe_jax.config import DataConfig
from gqe_jax.data.chat import ChatConfig
from gqe_jax.data.mixture import plans
from gqe_jax.runs import write_config

REPOSITORY = pathlib.Path(__file__).parents[1]
WEIGHTS = (REPOSITORY / "docs" / "weights.md").read_text()
TRAIN = (REPOSITORY / "docs" / "train.md").read_text()
TRAINING_COMMANDS = re.findall(
    r"^python train\.py (\w+(?:/\w+)?)((?: \S+)* --\S+.*)$", TRAIN, re.MULTILINE
)
CHAT_COMMANDS = re.findall(r"^python -m gqe_jax\.data\.chat (.*)$", TRAIN, re.MULTILINE)
INTEROP_COMMANDS = re.findall(r"^python -m gqe_jax\.interop\..*$", WEIGHTS, re.MULTILINE)


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
        (["tinny"], "CONFIG is 'tinny'; it must be one of tiny, gqe_40m"),
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


def test_train_takes_the_configuration_of_a_run(tmp_path):
    config = dataclasses.replace(CONFIGS["tiny"], data=DataConfig(corpus="not/here"))
    write_config(config, tmp_path)
    assert "corpus not/here has no manifest.json" in run("train.py", str(tmp_path)).stderr
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not the configuration of a run" in run("train.py", str(tmp_path)).stderr


@pytest.mark.parametrize("command", INTEROP_COMMANDS, ids=lambda line: line.split()[2])
def test_the_documented_commands_for_weights_take_their_flags(command, tmp_path, monkeypatch):
    """What they do is in test_interop and test_upcycle; here what they are to read is not there."""
    _, _, module, *arguments = command.split("  #")[0].split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit, match=rf"^error: \S*{arguments[0]}\b"):
        importlib.import_module(module).main()


@pytest.mark.parametrize(("name", "flags"), TRAINING_COMMANDS)
def test_the_documented_commands_for_training_take_their_flags(name, flags):
    flags = shlex.split(flags.split("  #")[0])
    if "--compile-for" in flags or "--help" in flags:
        return
    config = parse(CONFIGS.get(name, CONFIGS["gqe_250m"]), flags, prog="train.py", description="")
    plans(config)


def test_the_documented_command_for_conversations_takes_its_flags():
    [flags] = CHAT_COMMANDS
    assert (
        parse(ChatConfig, shlex.split(flags), prog="chat", description="").sequence_length == 2048
    )


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
    assert "Number of groups, each with one key/value head, G." in result.stdout
    assert "{gqe,hard_concat,weighted_concat,gqa}" in result.stdout


def test_a_machine_without_a_tpu_hears_nothing_of_libtpu(tmp_path):
    result = run("eval.py", str(tmp_path))
    assert "TPU" not in result.stderr


def test_eval_names_what_is_wrong(tmp_path):
    result = run("eval.py", str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {tmp_path} has no checkpoints")
    assert run("eval.py").returncode == 2


def test_sigint_ends_a_command_with_a_line():
    program = """
import signal
from gqe_jax.commands import run_command
run_command(lambda: signal.raise_signal(signal.SIGINT))
"""
    result = run("-c", program)
    assert result.returncode == 130
    assert result.stderr == "SIGINT: stopped\n"
