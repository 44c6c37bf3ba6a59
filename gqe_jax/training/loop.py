"""The training loop: restore, step, log, evaluate, checkpoint, stop cleanly."""

import collections
import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from gqe_jax import processes, report
from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.config_json import to_dict
from gqe_jax.data import Corpus, open_corpus, training_batches, window_indices
from gqe_jax.data.pipeline import num_windows
from gqe_jax.errors import UserError
from gqe_jax.evaluation import evaluate
from gqe_jax.model.flops import matmul_flops_per_token
from gqe_jax.runs import Run, write_config
from gqe_jax.sharding import batch_sharding, check_divides, global_batch, local_rows, make_mesh
from gqe_jax.training.checkpoint import Checkpoints
from gqe_jax.training.state import TrainState
from gqe_jax.training.steps import Steps, Teacher, make_steps
from gqe_jax.training.telemetry import Silent, Stream, Telemetry, read_metrics


class NonFiniteLossError(UserError, RuntimeError):
    """The loss or the gradient became infinite or NaN."""


class Interrupt:
    """True after SIGINT or SIGTERM, so that the loop can save and stop; a second signal exits.

    It stays False outside the main thread, where Python delivers no signals.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "Interrupt":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.received is not None

    def _handle(self, number: int, _: Any) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        name = self.received.name
        print(f"{name}: saving after this step; once more to exit now", file=sys.stderr, flush=True)


def _check_agreement(config: RunConfig, corpus: Corpus) -> None:
    """Checks that all processes run the same configuration on the same tokens.

    Raises:
      ConfigError: this process's differ from those of process 0.
    """
    ours = {"config": to_dict(config), "corpus": corpus.fingerprint}
    theirs = processes.from_first(ours)
    for name, value in theirs["config"].items():
        if ours["config"][name] != value:
            raise ConfigError(
                f"{name} is {ours['config'][name]!r}, process 0 has {value!r}; start all processes "
                "with the same command"
            )
    if ours["corpus"] != theirs["corpus"]:
        raise ConfigError(
            f"data.corpus {config.data.corpus!r} has the fingerprint {ours['corpus']} here, "
            f"{theirs['corpus']} on process 0; give all hosts the same files"
        )


def train(config: RunConfig, *, stream: Stream | None = None) -> TrainState:
    """Trains a run to its last step, or until a signal; resumes from its latest checkpoint.

    A run whose only checkpoint is step 0, as `gqe_jax.interop` writes it, begins with those
    weights. The configuration is checked before anything is compiled or written.

    Args:
      config: the run.
      stream: where progress is printed; None: the error stream.

    Returns:
      The state on the mesh; its `step` is less than `config.steps` if a signal came.

    Raises:
      ConfigError: a field does not fit the devices, or the run in the directory.
      DataError: the corpus cannot be used.
      CheckpointError: the latest checkpoint cannot be read.
      NonFiniteLossError: the loss became infinite or NaN.
    """
    mesh = make_mesh(config.mesh)
    check_divides(config, dict(mesh.shape))
    corpus = open_corpus(config.data.corpus, verify=config.data.verify_checksums)
    corpus.check(vocab_size=config.model.vocab_size, sequence_length=config.sequence_length)
    _check_agreement(config, corpus)

    with (
        Interrupt() as interrupt,
        Checkpoints(config.run_dir, keep=config.keep_checkpoints) as checkpoints,
    ):
        start = processes.from_first(checkpoints.latest())
        if start is not None:
            checkpoints.check_fits(start, config, corpus.fingerprint)
        steps = make_steps(
            config,
            mesh,
            implementation=config.attention_kernel,
            teacher=_load_teacher(config, mesh),
        )
        layout = steps.layout
        if start is None:
            state, start = layout.init(), 0
        elif start == 0:
            state = layout.begin(checkpoints.restore_params(0, layout.abstract.params))
        else:
            state = checkpoints.restore(start, layout.abstract)
        with _telemetry(config, mesh, start, stream) as telemetry:
            telemetry.say(_describe(config, corpus, steps, start))
            stop = processes.Vote(mesh, lambda: bool(interrupt))
            loop = _Loop(config, corpus, steps, checkpoints, telemetry, stop)
            state = loop.run(state, start)
        if int(state.step) == config.steps and processes.is_first():
            report.draw(config.run_dir)
    return state


def _load_teacher(config: RunConfig, mesh: Mesh) -> Teacher | None:
    if config.teacher is None:
        return None
    run = Run.find(config.teacher)
    if run.config.model.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"teacher {config.teacher} has a vocabulary of {run.config.model.vocab_size}; it must "
            f"be model.vocab_size ({config.model.vocab_size})"
        )
    return Teacher(*run.load(mesh))


def _telemetry(
    config: RunConfig, mesh: Mesh, start: int, stream: Stream | None
) -> contextlib.AbstractContextManager[Telemetry | Silent]:
    """Writes the configuration and returns what writes the metrics, on the first process only."""
    if not processes.is_first():
        return contextlib.nullcontext(Silent())
    write_config(config)
    return Telemetry(
        config.run_dir,
        start=start,
        steps=config.steps,
        flops_per_token=3 * matmul_flops_per_token(config.model, config.sequence_length),
        devices=list(mesh.devices.flat),
        stream=stream,
    )


def _describe(config: RunConfig, corpus: Corpus, steps: Steps, start: int) -> str:
    attention = config.model.attention
    params = sum(x.size for x in jax.tree.leaves(steps.layout.abstract.params))
    device = steps.mesh.devices.flat[0].device_kind
    axes = ", ".join(f"{axis} {size}" for axis, size in steps.mesh.shape.items())
    begins = f"resuming {config.run_dir} at step {start}" if start else f"run {config.run_dir}"
    return (
        f"{begins}: {attention.variant}, {params:,} parameters, "
        f"{attention.num_active_heads} active heads a token; {steps.mesh.size} x {device} "
        f"({axes}); {len(corpus.train):,} tokens of {config.data.corpus}"
    )


class _Loop:
    """The loop of one call of `train`; the state is passed from step to step, not held."""

    def __init__(
        self,
        config: RunConfig,
        corpus: Corpus,
        steps: Steps,
        checkpoints: Checkpoints,
        telemetry: Telemetry | Silent,
        stop: Callable[[], bool],
    ):
        self.config, self.corpus, self.steps = config, corpus, steps
        self.checkpoints, self.telemetry, self.stop = checkpoints, telemetry, stop
        self.batch_sharding = batch_sharding(steps.mesh)
        self.pending: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()
        # Only one host fetches the file from a bucket.
        lines = read_metrics(config.run_dir) if processes.is_first() else []
        scored = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
        self.eval_loss: dict[int, float] = dict(processes.from_first(scored))

    def run(self, state: TrainState, step: int) -> TrainState:
        config = self.config
        batches = training_batches(
            self.corpus.train,
            config.data,
            start=step,
            stop=config.steps,
            rows=local_rows(self.batch_sharding, config.batch_size),
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            seed=config.seed,
        )
        while True:
            last = step == config.steps
            best = False
            if last or (step and step % config.eval_every == 0):
                best = self.evaluate(state, step)
            due = step and step % config.checkpoint_every == 0
            stop = self.stop()
            if last or best or due or stop:
                self.save(state, step)
            if last or stop:
                break
            batch = global_batch(self.batch_sharding, config.batch_size, next(batches))
            state, metrics = self.steps.train_step(state, batch)
            step += 1
            self.telemetry.advance()
            self.log_pending(keep=1)
            self.pending.append((step, metrics))
        if not last:
            self.telemetry.say(f"stopped at step {step}; the same command resumes from there")
        return state

    def log_pending(self, keep: int = 0) -> None:
        """Waits for the metrics of all but the last `keep` steps, checks them, and logs them.

        One step stays in flight, so that the device never waits for the host.
        """
        while len(self.pending) > keep:
            step, metrics = self.pending.popleft()
            for name in ("loss", "grad_norm"):
                if not math.isfinite(value := float(metrics[name])):
                    raise NonFiniteLossError(self._non_finite(step, name, value))
            if step % self.config.log_every == 0 or step in (1, self.config.steps):
                fetched = jax.device_get(metrics)
                record = {k: v if v.ndim else float(v) for k, v in fetched.items()}
                tokens = self.config.batch_size * self.config.sequence_length
                self.telemetry.training(step, record, tokens)

    def _non_finite(self, step: int, name: str, value: float) -> str:
        config = self.config
        windows = window_indices(
            step - 1,
            slice(None),
            batch_size=config.batch_size,
            windows=num_windows(self.corpus.train, config.sequence_length),
            seed=config.seed,
        )
        good = self.checkpoints.latest()
        saved = "there is no checkpoint" if good is None else f"the last good checkpoint is {good}"
        shown = ", ".join(map(str, windows[:8])) + (", ..." if len(windows) > 8 else "")
        return (
            f"{name} is {value} at step {step} (batch {step - 1}: windows {shown} of the train "
            f"split); {saved} in {self.checkpoints.directory}. Resuming repeats the same batches: "
            "lower optimizer.peak_learning_rate or inspect these windows"
        )

    def evaluate(self, state: TrainState, step: int) -> bool:
        """Scores held-out text, unless this step was scored before an interruption.

        Returns:
          Whether this step has the lowest loss so far.
        """
        self.log_pending()
        if step not in self.eval_loss:
            begun = time.perf_counter()
            result = evaluate(
                self.steps,
                state.params,
                self.corpus.validation,
                self.config.data,
                batch_size=self.config.batch_size,
                sequence_length=self.config.sequence_length,
                limit=self.config.eval_batches,
                stop=self.stop,
            )
            if result is None:
                return False
            self.eval_loss[step] = result.loss
            self.telemetry.evaluation(
                step,
                {
                    "eval_loss": result.loss,
                    "eval_perplexity": result.perplexity,
                    "eval_bits_per_byte": result.bits_per_byte,
                    "eval_tokens": result.tokens,
                },
            )
            self.telemetry.outside(time.perf_counter() - begun)
        return self.eval_loss[step] <= min(self.eval_loss.values())

    def save(self, state: TrainState, step: int) -> None:
        """Checkpoints the state, after checking that the loss is finite."""
        self.log_pending()
        if self.checkpoints.latest() == step:
            return
        begun = time.perf_counter()
        self.telemetry.sync()
        fingerprint = self.corpus.fingerprint
        self.checkpoints.save(state, self.config, fingerprint, self.eval_loss.get(step))
        self.telemetry.outside(time.perf_counter() - begun)
