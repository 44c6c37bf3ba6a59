"""Scores a run's checkpoint on held-out text, as `eval.py` does."""

import dataclasses
import os
import pathlib
from typing import Literal

import tyro

from gqe_jax.config import ConfigError, DataConfig, MeshConfig, check_kernel
from gqe_jax.data import open_corpus
from gqe_jax.evaluation.perplexity import HeldOut, evaluate
from gqe_jax.runs import Run
from gqe_jax.sharding import check_divides, make_mesh
from gqe_jax.training.steps import make_steps
from gqe_kernels import ImplementationName

_OF_TASKS = ("num_fewshot", "limit", "include_path", "output", "max_length")
_OF_TASKS += ("tokenizer", "end_of_document")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Score a run on held-out text; with `tasks`, score one run or two on the harness's tasks."""

    run_dirs: tyro.conf.Positional[tuple[str, ...]]
    """Directory of the run; with `tasks`, of one run, or of two to compare."""
    step: int | Literal["latest", "best"] = "latest"
    """The checkpoint; `best` has the lowest held-out loss in training."""
    batch_size: int | None = None
    """Sequences per batch, over all devices; None: the run's on held-out text, 32 on tasks."""
    averaged: bool = True
    """Held-out text: score the average of the parameters, where the run keeps one."""
    split: Literal["train", "validation"] = "validation"
    """Held-out text: the split to score."""
    batches: int | None = None
    """Held-out text: maximum number of batches; None: the whole split."""
    sequence_length: int | None = None
    """Held-out text: tokens per window; None: the run's."""
    attention_kernel: ImplementationName | None = None
    """Held-out text: the attention kernel; None: the best for the platform."""
    tasks: str | None = None
    """Names of tasks, groups or tags of the lm-evaluation-harness, separated by commas."""
    num_fewshot: int | None = None
    """Tasks: number of few-shot examples; None: the task's default."""
    limit: float | None = None
    """Tasks: use the first examples only, a number or a fraction below 1; None: all."""
    include_path: str | None = None
    """Tasks: a directory with your own task files (YAML)."""
    output: pathlib.Path | None = None
    """Tasks: the JSON file to write; None: evaluation.json in the (first) run's directory."""
    max_length: int | None = None
    """Tasks: maximum tokens of context and answer; longer contexts are truncated on the left. None:
    the run's sequence_length."""
    tokenizer: str | None = None
    """Tasks: `byte` or a tokenizer.json; None: the run's."""
    end_of_document: str | None = None
    """Tasks: token that ends a text; None: the tokenizer's."""
    compilation_cache: str | None = "default"
    """Directory or bucket in which compiled programs are kept for the next start; `default`:
    `gqe_jax/programs` in the user's cache directory; None or empty: none are kept."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        fields = ("batch_size", "batches", "sequence_length", "max_length", "limit")
        for field in fields:
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise ConfigError(f"{field} is {value}; it must be positive, or None")
        check_kernel(self)
        if self.tasks is None:
            if len(self.run_dirs) != 1:
                raise ConfigError(f"run_dirs is {self.run_dirs}; name one run, or give tasks")
            for field in _OF_TASKS:
                if (value := getattr(self, field)) is not None:
                    raise ConfigError(f"{field} is {value!r}; it needs tasks")
            return
        if len(self.run_dirs) not in (1, 2):
            raise ConfigError(f"run_dirs is {self.run_dirs}; name one run, or two to compare")
        if self.batches is not None:
            raise ConfigError(f"batches is {self.batches}; tasks are limited by limit")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ConfigError(f"num_fewshot is {self.num_fewshot}; it must be >= 0")


@dataclasses.dataclass(frozen=True)
class RunEvaluation:
    """The result that `eval.py` prints."""

    run_dir: str
    step: int
    split: str
    held_out: HeldOut

    def __str__(self) -> str:
        scores = self.held_out
        return (
            f"{self.run_dir}, step {self.step}, {self.split}: loss {scores.loss:.4f}, "
            f"perplexity {scores.perplexity:.4f}, {scores.bits_per_byte:.4f} bits per byte "
            f"on {scores.tokens:,} tokens"
        )


def defaults_for(run_dir: str | os.PathLike) -> EvalConfig:
    """Returns the default evaluation of a run, from its own configuration by the rules of `runs`.

    Raises:
      CheckpointError: the run has no checkpoint.
    """
    run = Run.find(run_dir)
    return EvalConfig(
        run_dirs=(os.fspath(run_dir),),
        attention_kernel=run.attention_kernel,
        data=run.config.data,
        mesh=run.mesh(),
    )


def evaluate_run(config: EvalConfig) -> RunEvaluation:
    """Scores a checkpoint on the mesh of `config`, whatever mesh trained it.

    Raises:
      CheckpointError: the run has no such checkpoint, or it is damaged.
      ConfigError: the mesh or batch does not fit the devices.
      DataError: the corpus does not fit the model.
    """
    [run_dir] = config.run_dirs
    found = Run.find(run_dir, config.step, averaged=config.averaged)
    run = dataclasses.replace(
        found.config,
        data=config.data,
        mesh=config.mesh,
        batch_size=config.batch_size or found.config.batch_size,
        sequence_length=config.sequence_length or found.config.sequence_length,
        accumulation_steps=1,
    )
    mesh = make_mesh(run.mesh)
    check_divides(run, dict(mesh.shape))
    corpus = open_corpus(run.data.corpus, verify=run.data.verify_checksums)
    corpus.check(vocab_size=run.model.vocab_size, sequence_length=run.sequence_length)
    _, params = found.load(mesh)
    result = evaluate(
        make_steps(run, mesh, implementation=config.attention_kernel),
        params,
        getattr(corpus, config.split),
        run.data,
        batch_size=run.batch_size,
        sequence_length=run.sequence_length,
        limit=config.batches,
        progress=True,
    )
    assert result is not None, "nothing stops it"
    return RunEvaluation(run_dir, found.step, config.split, result)
