"""Evaluates a run's checkpoint, as `eval.py` does."""

import dataclasses
from typing import Literal

import jax
import tyro

from gqe_jax.config import ConfigError, DataConfig, MeshConfig
from gqe_jax.data import open_corpus
from gqe_jax.evaluation.perplexity import HeldOut, evaluate
from gqe_jax.sharding import check_divides, make_mesh
from gqe_jax.training.checkpoint import Checkpoints
from gqe_jax.training.steps import make_steps


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Score a run's checkpoint on held-out text."""

    run_dir: tyro.conf.Positional[str]
    """Directory of the run."""
    step: int | Literal["latest", "best"] = "latest"
    """Which checkpoint; `best` is the one with the lowest held-out loss in training."""
    split: Literal["train", "validation"] = "validation"
    """What is scored."""
    batches: int | None = None
    """The most batches; None: the whole split."""
    batch_size: int = 16
    """Sequences at once, over all devices."""
    sequence_length: int = 128
    """Tokens of a window."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        if self.batches is not None and self.batches < 1:
            raise ConfigError(f"batches is {self.batches}; it must be positive, or None for all")


@dataclasses.dataclass(frozen=True)
class RunEvaluation:
    """What `eval.py` prints."""

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


def defaults_for(run_dir: str) -> EvalConfig:
    """The evaluation that a run's own configuration implies.

    Its mesh is the run's, which a large model may need, where that fits the devices there are; else
    all of them share the batch.

    Raises:
      CheckpointError: there is no such run.
    """
    with Checkpoints(run_dir, read_only=True) as checkpoints:
        run, _ = checkpoints.read_run(checkpoints.resolve("latest"))
    return EvalConfig(
        run_dir=run_dir,
        batch_size=run.batch_size,
        sequence_length=run.sequence_length,
        data=run.data,
        mesh=run.mesh if _fits(run.mesh) else MeshConfig(),
    )


def _fits(mesh: MeshConfig) -> bool:
    try:
        mesh.resolve(jax.device_count())
    except ConfigError:
        return False
    return True


def evaluate_run(config: EvalConfig) -> RunEvaluation:
    """Scores a checkpoint on the mesh of `config`, whatever mesh trained it.

    Raises:
      CheckpointError: the run has no such checkpoint, or it is damaged.
      ConfigError: the mesh or batch does not fit the devices.
      DataError: the corpus does not fit the model.
    """
    with Checkpoints(config.run_dir, read_only=True) as checkpoints:
        step = checkpoints.resolve(config.step)
        trained, _ = checkpoints.read_run(step)
        run = dataclasses.replace(
            trained,
            data=config.data,
            mesh=config.mesh,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            accumulation_steps=1,
        )
        mesh = make_mesh(run.mesh)
        check_divides(run, dict(mesh.shape))
        corpus = open_corpus(run.data.corpus, verify=run.data.verify_checksums)
        corpus.check(vocab_size=run.model.vocab_size, sequence_length=run.sequence_length)
        steps = make_steps(run, mesh)
        params = checkpoints.restore_params(step, steps.abstract_state, steps.state_sharding)
    result = evaluate(
        steps,
        params,
        getattr(corpus, config.split),
        run.data,
        batch_size=run.batch_size,
        sequence_length=run.sequence_length,
        limit=config.batches,
        progress=True,
    )
    return RunEvaluation(config.run_dir, step, config.split, result)
