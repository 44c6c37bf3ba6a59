"""A small run of commit cee1b3f, kept in earlier_run/, and what that commit made of it.

    python -m tests.gqe_jax.earlier_run DIRECTORY

writes such a directory with the code of the checkout that it is started in. It has

    files.tar.xz   corpus/, which the run trains on; run/, its directory after step 200 of 204;
                   weights/, that checkpoint as `export_weights` wrote it
    expected.json  what `outcome` returned

The run is used through commands and read by Orbax, so that this file works with any commit's code.
"""

import contextlib
import hashlib
import io
import json
import pathlib
import runpy
import shutil
import sys
import tarfile
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.gqe_jax.runs import (
    REPOSITORY,
    comparable_metrics,
    make_corpus,
    saved_state,
    small_config,
)

DIRECTORY = pathlib.Path(__file__).with_suffix("")
FILES, EXPECTED = DIRECTORY / "files.tar.xz", DIRECTORY / "expected.json"
STEP, STEPS = 200, 204
TRAIN = [
    *("train.py", "tiny", "--data.corpus", "corpus", "--data.document-masking", "True"),
    *("--run-dir", "run", "--steps", STEPS, "--batch-size", 8, "--sequence-length", 32),
    *("--log-every", 50, "--eval-every", STEP, "--eval-batches", 2, "--checkpoint-every", STEP),
    *("--model.num-layers", 2, "--model.mlp-dim", 16, "--model.attention.embed-dim", 8),
    *("--model.attention.num-query-experts", 4, "--model.attention.num-kv-heads", 2),
    *("--optimizer.peak-learning-rate", 0.03, "--optimizer.zclip-warmup-steps", 5),
]
EXPORT = ["gqe_jax.interop.export_weights", "run", "--step", STEP, "--output"]
IMPORT = ["gqe_jax.interop.import_weights", "weights", "--corpus", "corpus", "--output"]
EVAL = ["eval.py", "run", "--step", STEP]
GENERATE = ["generate.py", "run", "--step", STEP, "--max-tokens", 24, "--prompt", "the query "]


def command(name: str, *arguments: str | int) -> str:
    """Runs a script of the repository, or a module, in this process; returns what it printed."""
    printed, argv = io.StringIO(), sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(printed):
            if name.endswith(".py"):
                runpy.run_path(str(REPOSITORY / name), run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__")
    finally:
        sys.argv = argv
    return printed.getvalue()


def digest(array: np.ndarray) -> str:
    """A hash of an array's type, shape and bits."""
    array = np.ascontiguousarray(array)
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()[:16]


def parameters(run_dir: str, step: int) -> dict[str, np.ndarray]:
    """The parameters in a checkpoint by name, as Orbax reads them without a model's structure."""
    path = pathlib.Path(run_dir, "checkpoints", str(step), "params").absolute()
    with ocp.PyTreeCheckpointer() as reader:
        flat, _ = jax.tree.flatten_with_path(reader.restore(path))
    return {jax.tree_util.keystr(keys): np.asarray(array) for keys, array in flat}


def outcome() -> dict:
    """Reads `run` at `STEP`, trains it to `STEPS`, evaluates it and generates text with it.

    All in the current directory, as the archive left it.
    """
    config = small_config(pathlib.Path("corpus"), pathlib.Path("run"))
    state = [digest(array) for array in saved_state(config, STEP)]
    command("train.py", "run", "--log-every", 1)
    trained = parameters("run", STEPS)
    return {
        "state": state,
        "metrics": comparable_metrics("run"),
        "projections": {name: projection(array) for name, array in trained.items()},
        "score": command(*EVAL),
        "text": command(*GENERATE),
    }


def projection(array: np.ndarray) -> float:
    """A sum of the array's entries with weights that differ by position, relative to its norm."""
    flat = array.astype(np.float64).ravel()
    return float(np.cos(np.arange(flat.size)) @ flat / np.linalg.norm(flat))


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same file in the archive, without its owner."""
    return member.replace(deep=False, uid=0, gid=0, uname="", gname="")


def make(directory: pathlib.Path) -> None:
    """Trains the run, keeps its state at `STEP`, and records the outcome of going on from there."""
    directory.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        make_corpus(pathlib.Path())
        command(*TRAIN)
        command(*EXPORT, "weights")
        shutil.rmtree(f"run/checkpoints/{STEPS}")
        for name in ("tensorboard", "report"):
            shutil.rmtree(f"run/{name}")
        metrics = pathlib.Path("run/metrics.jsonl")
        lines = metrics.read_text().splitlines(keepends=True)
        metrics.write_text("".join(x for x in lines if json.loads(x)["step"] <= STEP))
        with tarfile.open(directory / FILES.name, "w:xz") as archive:
            for name in ("corpus", "run", "weights"):
                archive.add(name, filter=anonymous)
        expected = json.dumps(outcome(), indent=1)
    (directory / EXPECTED.name).write_text(expected + "\n")


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  XLA's flags, with which the tests run

    make(pathlib.Path(sys.argv[1]).absolute())
