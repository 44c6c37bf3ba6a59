"""Small training runs for the tests: 30,000 bytes of text and a model of a few thousand weights."""

import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys

import jax
import numpy as np

from gqe_jax.config import (
    AttentionConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)
from gqe_jax.data.prepare import PrepareConfig, prepare
from gqe_jax.sharding import make_mesh
from gqe_jax.training.checkpoint import Checkpoints
from gqe_jax.training.state import lay_out_state
from gqe_jax.training.telemetry import read_metrics

REPOSITORY = pathlib.Path(__file__).parents[2]


def make_corpus(directory: pathlib.Path, validation_fraction: float = 0.1) -> pathlib.Path:
    """Sentences of a small grammar: about 30,000 bytes."""
    rng = random.Random(0)
    words = ["the", "a", "query", "expert", "group", "head", "key", "value", "routes", "reads"]
    source = directory / "texts.jsonl"
    with source.open("w") as file:
        for i in range(400):
            text = " ".join(rng.choices(words, k=rng.randint(6, 18))) + f" {i}.\n"
            file.write(json.dumps({"text": text}) + "\n")
    corpus = directory / "corpus"
    config = PrepareConfig(
        (str(source),), corpus, validation_fraction=validation_fraction, processes=1
    )
    prepare(config, progress=False)
    return corpus


def small_config(corpus: pathlib.Path, run_dir: pathlib.Path, **changes) -> RunConfig:
    """A run of 30 steps that takes seconds."""
    config = RunConfig(
        model=ModelConfig(
            attention=AttentionConfig(embed_dim=32, num_query_experts=4, num_kv_heads=2),
            num_layers=2,
            mlp_dim=48,
            vocab_size=256,
            dtype="float32",
        ),
        data=DataConfig(corpus=str(corpus), read_threads=1, prefetch=2),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, zclip_warmup_steps=5),
        mesh=MeshConfig(data=1, tensor=-1) if len(jax.devices()) == 1 else MeshConfig(),
        run_dir=str(run_dir),
        steps=30,
        batch_size=8,
        sequence_length=32,
        log_every=1,
        eval_every=10,
        eval_batches=2,
        checkpoint_every=7,
    )
    return dataclasses.replace(config, **changes)


def save_untrained(config: RunConfig) -> pathlib.Path:
    """The run's directory, with a checkpoint of its initial parameters."""
    layout = lay_out_state(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    with Checkpoints(config.run_dir) as checkpoints:
        checkpoints.save(layout.init(), config, "none", None)
    return pathlib.Path(config.run_dir)


def start_training(
    config: RunConfig,
    *,
    launcher: tuple[str, ...] = ("train.py",),
    flags: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    **kwargs,
) -> subprocess.Popen:
    """The same run by `train.py`, on one device, in a process of its own.

    Args:
      config: the run.
      launcher: what Python is to start in place of `train.py`, with the same arguments.
      flags: further ones.
      environment: variables to set.
      kwargs: of Popen.
    """
    attention, model = config.model.attention, config.model
    fields = {
        "run-dir": config.run_dir,
        "steps": config.steps,
        "batch-size": config.batch_size,
        "sequence-length": config.sequence_length,
        "log-every": config.log_every,
        "eval-every": config.eval_every,
        "eval-batches": config.eval_batches,
        "checkpoint-every": config.checkpoint_every,
        "model.num-layers": model.num_layers,
        "model.mlp-dim": model.mlp_dim,
        "model.attention.embed-dim": attention.embed_dim,
        "model.attention.num-query-experts": attention.num_query_experts,
        "model.attention.num-kv-heads": attention.num_kv_heads,
        "data.corpus": config.data.corpus,
        "optimizer.peak-learning-rate": config.optimizer.peak_learning_rate,
        "optimizer.final-learning-rate": config.optimizer.final_learning_rate,
        "optimizer.zclip-warmup-steps": config.optimizer.zclip_warmup_steps,
        "mesh.data": config.mesh.data,
        "mesh.fsdp": config.mesh.fsdp,
        "mesh.tensor": config.mesh.tensor,
    }
    arguments = [part for name, value in fields.items() for part in (f"--{name}", str(value))]
    # One device, and programs compiled fast, as tests/conftest.py has it.
    inherited = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.Popen(
        [sys.executable, *launcher, "tiny", *arguments, *flags],
        cwd=REPOSITORY,
        env=inherited | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


def comparable_metrics(run_dir) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [line for line in read_metrics(run_dir) if "goodput" not in line]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def saved_state(config: RunConfig, step: int | None = None) -> list[np.ndarray]:
    """Every array of a checkpoint, by default the latest."""
    with Checkpoints(config.run_dir, read_only=True) as checkpoints:
        step = checkpoints.latest() if step is None else step
        saved, _ = checkpoints.read_run(step)
        one = dataclasses.replace(saved, mesh=MeshConfig(data=1))
        layout = lay_out_state(one, make_mesh(one.mesh, jax.devices()[:1]))
        state = checkpoints.restore(step, layout.abstract)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
