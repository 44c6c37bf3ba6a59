"""docs/pods.md: its commands run, on small things for the large ones; its manifest is a JobSet."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from configs import CONFIGS
from experiments.compiled import CompiledConfig, run_table
from gqe_jax.commands import parse
from gqe_jax.compile_for.__main__ import forwarded, read_command
from gqe_jax.config import ConfigError
from gqe_jax.runs import CONFIG_FILE

REPOSITORY = pathlib.Path(__file__).parents[1]
PODS = (REPOSITORY / "docs" / "pods.md").read_text()
BLOCKS = re.findall(r"```(?:bash)?\n(.*?)```", PODS, re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("python ")]
MANIFEST = yaml.safe_load((REPOSITORY / "docs" / "jobset.yaml").read_text())
# Each names a configuration and its flags, whether here, in a container or on a host.
TRAINING = re.findall(r"train\.py ([a-z]\w*)((?: --[\w.-]+[ =][^\s\"]+)*)", PODS)


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:40])
def test_blocks_are_shell(block):
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)


@pytest.mark.parametrize(("name", "flags"), TRAINING)
def test_every_training_command_has_a_configuration_and_flags_that_exist(name, flags):
    assert name in CONFIGS
    if compiling := forwarded(name, shlex.split(flags)):
        read_command(compiling)
    else:
        parse(CONFIGS[name], shlex.split(flags), prog="train.py", description="")


def small(command: str, **changes: str) -> list[str]:
    """The command's arguments on `tiny`, and for the smallest slice."""
    command = re.sub(r"\.py \w+", ".py tiny", command)
    command = re.sub(r"v\d\w:\d+x\d+(x\d+)?", "v5e:2x2", command)
    for text, other in changes.items():
        command = command.replace(text.replace("BUCKET", "$BUCKET"), other)
    return shlex.split(command.split("  #")[0])[1:]


@pytest.mark.slow
@pytest.mark.libtpu
@pytest.mark.parametrize(
    "command",
    # The others have no flags but these.
    [line for line in COMMANDS if re.search(r"eval\.py .*--compile-for|--json|--sweep", line)],
    ids=lambda line: line[7:],
)
def test_compiling_before_the_bill(command, tmp_path):
    arguments = small(command.replace("--sweep-meshes 6", "--sweep-meshes 1"))
    figures = tmp_path / "figures.json"
    arguments = [*arguments, "--mesh.data", "-1", "--mesh.fsdp", "1"]
    if "--json" in arguments:
        arguments[arguments.index("--json") + 1] = str(figures)
    result = run(*arguments, XLA_FLAGS="")
    assert result.returncode == 0, result.stderr
    assert "peak HBM" in result.stdout
    if "--json" in arguments:
        found = json.loads(figures.read_text())
        assert found["num_slices"] == 2
        assert found["memory"]["peak"] > 0


@pytest.mark.slow
def test_preparing_and_training_from_a_bucket(tmp_path):
    """A directory stands in for the bucket, as `file://`."""
    [prepare] = [line for line in COMMANDS if "gqe_jax.data.prepare" in line]
    [train] = [line for line in COMMANDS if "--data.corpus $BUCKET" in line]
    texts = [f"document {i} of a few words" for i in range(300)]
    for part in range(2):
        table = pyarrow.table({"text": texts[part::2], "id": list(range(150))})
        pyarrow.parquet.write_table(table, tmp_path / f"{part}.parquet")
    hub = re.search(r"hf://[^']*", prepare)[0]
    bucket = f"file://{tmp_path}/bucket"
    arguments = small(
        prepare.replace(hub, f"{tmp_path}/*.parquet").replace("tokenizer.json", "byte"),
        BUCKET=bucket,
    )
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    assert "train: " in result.stdout
    arguments = small(train, BUCKET=bucket)
    few = ["--steps", "1", "--batch-size", "8", "--sequence-length", "16", "--eval-batches", "1"]
    few += ["--model.num-layers", "1", "--mesh.fsdp", "8", "--mesh.data", "1"]
    result = run(*arguments, *few)
    assert result.returncode == 0, result.stderr
    [directory] = (tmp_path / "bucket" / "runs").iterdir()
    assert (directory / CONFIG_FILE).is_file()
    assert (directory / "checkpoints" / "1").is_dir()


def test_a_run_is_started_and_the_connection_let_go(tmp_path):
    """A host's shell that keeps its output open holds ssh until the training ends."""
    [started] = re.findall(r'--command="([^"]*nohup[^"]*)"', PODS)
    command, count = re.subn(r"\.venv/bin/python .*?(?= [<>])", "sleep 8", started)
    assert count == 1
    (tmp_path / "gqe-jax").mkdir()
    result = subprocess.run(
        ["bash", "-c", f"{command} echo $!"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
        timeout=4,
    )
    os.kill(int(result.stdout), signal.SIGTERM)


@pytest.mark.parametrize("table", ["slices", "context"])
def test_the_tables_are_what_was_compiled(table):
    def not_kept(*arguments):
        raise AssertionError(f"docs/compiled.json lacks a row: {arguments}")

    kept = REPOSITORY / "docs" / "compiled.json"
    assert f"\n{run_table(CompiledConfig(table, kept), not_kept)}\n" in PODS


def test_a_table_continues_with_the_rows_that_it_lacks(tmp_path):
    asked = []

    def refused(*arguments):
        asked.append(arguments)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return "does not fit"

    config = CompiledConfig("context", tmp_path / "kept.json")
    with pytest.raises(KeyboardInterrupt):
        run_table(config, refused)
    assert run_table(config, refused).count("does not fit") == 6
    assert len(asked) == 7  # the third twice, the first two once
    config.kept.write_text(config.kept.read_text().replace('"jax": "', '"jax": "9.'))
    run_table(config, refused)
    with pytest.raises(ConfigError, match="lacks a row, and is of"):
        run_table(CompiledConfig("slices", config.kept), refused)


def test_the_manifest_is_of_one_pod_a_host_that_goes_on_after_a_death():
    assert (MANIFEST["apiVersion"], MANIFEST["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert MANIFEST["spec"]["failurePolicy"]["maxRestarts"] > 0
    [replicated] = MANIFEST["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    chips = 1
    for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(size)
    a_host = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == a_host
    assert job["completions"] == job["parallelism"] == chips // a_host
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert pod["terminationGracePeriodSeconds"] >= 120
    _, _, script, name, *flags = container["command"]
    assert script == "train.py"
    parse(CONFIGS[name], flags, prog=script, description="")
    CONFIGS[name].mesh.resolve(chips)
