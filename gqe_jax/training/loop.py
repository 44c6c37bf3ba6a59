"""The training loop: restore, step, log, evaluate, checkpoint, stop cleanly."""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from gqe_jax import processes, report
from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.config_json import to_dict
from gqe_jax.data import Split, training_batches
from gqe_jax.data.pipeline import describe_rows, held_out_tokens, progress
from gqe_jax.data.sources import Sources, open_sources
from gqe_jax.errors import UserError
from gqe_jax.evaluation import HeldOut, evaluate
from gqe_jax.model.flops import matmul_flops_per_token
from gqe_jax.runs import Run, write_config
from gqe_jax.sharding import batch_sharding, check_divides, global_batch, local_rows, make_mesh
from gqe_jax.storage import location
from gqe_jax.training import executable
from gqe_jax.training.checkpoint import (
    LOSS,
    TOKENS,
    Checkpoints,
    NonFiniteStateError,
    checkpoint_directory,
)
from gqe_jax.training.ending import describe_end
from gqe_jax.training.goodput import Goodput
from gqe_jax.training.interrupt import Interrupt
from gqe_jax.training.lock import RunLock
from gqe_jax.training.profile import Profile
from gqe_jax.training.spikes import MOST_IN_A_ROW
from gqe_jax.training.start import describe_changes, find_start
from gqe_jax.training.state import TrainState
from gqe_jax.training.steps import Steps, Teacher, make_steps
from gqe_jax.training.telemetry import Silent, Stream, Telemetry, read_metrics
from gqe_jax.training.timer import Timer
from gqe_jax.training.watchdog import Watchdog
from gqe_jax.training.writers import WeightsAndBiases, Writer, check_wandb


class NonFiniteLossError(UserError, RuntimeError):
    """The loss, the gradient or the state became infinite or NaN."""


def _check_agreement(config: RunConfig, sources: Sources) -> None:
    """Checks that all processes run the same configuration on the same tokens.

    Raises:
      ConfigError: this process's differ from those of process 0.
    """
    ours = json.loads(json.dumps({"config": to_dict(config), "corpus": sources.fingerprint}))
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


def train(
    config: RunConfig, *, stream: Stream | None = None, began: float | None = None
) -> TrainState:
    """Trains a run to its last step, or until a signal; resumes from its latest checkpoint.

    A run whose only checkpoint is step 0, as `gqe_jax.interop` writes it, begins with those
    weights. The configuration is checked before anything is compiled or written.

    Args:
      config: the run.
      stream: where progress is printed; None: the error stream.
      began: when the process began, as of `time.time`; None: now.

    Returns:
      The state on the mesh; its `step` is less than `config.steps` if a signal came.

    Raises:
      ConfigError: a field does not fit the devices, or the run in the directory.
      DataError: the corpus cannot be used.
      CheckpointError: the latest checkpoint cannot be read, or a new one not written.
      RunLockedError: another job trains this run.
      NonFiniteLossError: the loss became infinite or NaN.
    """
    checkpoint_directory(config.run_dir)  # refuses before anything is written
    check_wandb(config.wandb)
    mesh = make_mesh(config.mesh)
    check_divides(config, dict(mesh.shape))
    sources = open_sources(config)
    _check_agreement(config, sources)

    with (
        Goodput(began) as goodput,
        Watchdog(config.watchdog_seconds, end=config.watchdog_exit) as watchdog,
        Interrupt() as interrupt,
        RunLock(config.run_dir) as lock,
        Checkpoints(config.run_dir, keep=config.keep_checkpoints) as checkpoints,
    ):
        start, changed, config = find_start(config, checkpoints, sources.fingerprint)
        steps = make_steps(
            config,
            mesh,
            implementation=config.attention_kernel,
            teacher=_load_teacher(config, mesh),
        )
        train_step = steps.train_step if config.compiled is None else executable.load(config, steps)
        layout = steps.layout
        if start is None:
            state, start = layout.init(), 0
        elif start == 0:
            state = layout.begin(checkpoints.restore_params(0, layout.abstract.params))
        else:
            state = checkpoints.restore(start, layout.abstract)
            if jax.tree.structure(state) != jax.tree.structure(layout.abstract):
                state = layout.complete(state)
        if "restarted_from" in changed:
            checkpoints.delete_after(start)
        goodput.resume(read_metrics(config.run_dir) if processes.is_first() else [], start)
        with _telemetry(config, mesh, start, stream) as telemetry:
            telemetry.say(_describe(config, sources, steps, start))
            if changed:
                telemetry.say(describe_changes(start, changed))
                telemetry.changed(start, changed)
            vote = processes.Vote(mesh, lambda: bool(interrupt))

            def stop() -> bool:  # asked after each step, and each batch of an evaluation
                watchdog.alive()
                return vote()

            loop = _Loop(config, sources, steps, checkpoints, telemetry, stop, lock, goodput)
            state = loop.run(train_step, state, start)
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
    # The checkpoints have `resume_step`: one restart is not repeated by a later command.
    write_config(dataclasses.replace(config, resume_step=None))
    return Telemetry(
        config.run_dir,
        start=start,
        steps=config.steps,
        flops_per_token=3 * matmul_flops_per_token(config.model, config.sequence_length),
        devices=list(mesh.devices.flat),
        stream=stream,
        more=functools.partial(_more_writers, config),
    )


def _more_writers(config: RunConfig, directory: pathlib.Path) -> list[Writer]:
    if config.wandb is None:
        return []
    identity = location(config.run_dir) / "wandb_id"
    return [WeightsAndBiases(config.wandb, directory, config, identity)]


def _describe(config: RunConfig, sources: Sources, steps: Steps, start: int) -> str:
    attention = config.model.attention
    params = sum(x.size for x in jax.tree.leaves(steps.layout.abstract.params))
    device = steps.mesh.devices.flat[0].device_kind
    axes = ", ".join(f"{axis} {size}" for axis, size in steps.mesh.shape.items())
    begins = f"resuming {config.run_dir} at step {start}" if start else f"run {config.run_dir}"
    return (
        f"{begins}: {attention.variant}, {params:,} parameters, "
        f"{attention.num_active_heads} active heads a token; {steps.mesh.size} x {device} "
        f"({axes}); {sources.describe()}"
    )


def _is_scored(line: dict[str, Any]) -> bool:
    loss, tokens = line.get(LOSS), line.get(TOKENS)
    return isinstance(loss, float) and math.isfinite(loss) and isinstance(tokens, int)


class _Loop:
    """The loop of one call of `train`; the state is passed from step to step, not held."""

    def __init__(
        self,
        config: RunConfig,
        sources: Sources,
        steps: Steps,
        checkpoints: Checkpoints,
        telemetry: Telemetry | Silent,
        stop: Callable[[], bool],
        lock: RunLock,
        goodput: Goodput,
    ):
        self.lock, self.goodput = lock, goodput
        self.config, self.sources, self.steps = config, sources, steps
        self.checkpoints, self.telemetry, self.stop = checkpoints, telemetry, stop
        self.batch_sharding = batch_sharding(steps.mesh)
        self.timer = Timer(steps.mesh, config.checkpoint_minutes)
        self.pending: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()
        # Only one host fetches the file from a bucket.
        lines = read_metrics(config.run_dir) if processes.is_first() else []
        scored = [(line["step"], line[LOSS], line[TOKENS]) for line in lines if _is_scored(line)]
        scores = {step: (loss, text) for step, loss, text in processes.from_first(scored)}
        checkpoints.record(scores)
        self.eval_tokens = held_out_tokens(
            sources.main.validation,
            config.batch_size,
            config.sequence_length,
            config.eval_batches,
        )
        self.eval_loss = {
            step: loss for step, (loss, text) in scores.items() if text == self.eval_tokens
        }
        others = sorted({text for _, text in scores.values()} - {self.eval_tokens})
        if others and not self.eval_loss:
            telemetry.say(
                f"evaluations have {self.eval_tokens:,} tokens, earlier ones "
                f"{', '.join(f'{text:,}' for text in others)}: their losses are not compared, and "
                "the best checkpoint is chosen anew"
            )

    def run(self, train_step: Callable[..., Any], state: TrainState, start: int) -> TrainState:
        """Trains the state after `start` steps to the last step, or until a signal.

        Args:
          train_step: `Steps.train_step`, or the same step from a file.
          state, start: where to begin.
        """
        self.goodput.begin_steps()
        with Profile(self.config.profile, self.config.run_dir, self.log_pending) as profile:
            return self._run(train_step, state, start, profile)

    def _run(
        self, train_step: Callable[..., Any], state: TrainState, start: int, profile: Profile
    ) -> TrainState:
        config, step = self.config, start
        batches = training_batches(
            self.sources.mixture,
            config.data,
            start=start,
            stop=config.steps,
            rows=local_rows(self.batch_sharding, config.batch_size),
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            seed=config.seed,
        )
        while True:
            last = step == config.steps
            best = unscored = False
            if last or (step and step % config.eval_every == 0):
                best = self.evaluate(state, step)
                unscored = step not in self.eval_loss
            due = self.timer() | (step % config.checkpoint_every == 0) and step > 0
            stop = self.stop()
            if last or best or due or stop:
                self.save(state, step, ended=last or stop)
                self.timer.reset()
            if last or stop:
                break
            with self.goodput.spend("data", hidden=self._computes):
                rows = next(batches)
            batch = global_batch(self.batch_sharding, config.batch_size, rows)
            with profile.step(step + 1):
                state, metrics = train_step(state, batch)
            step += 1
            self.telemetry.advance()
            self.log_pending(keep=1)
            self.pending.append((step, metrics))
            if step == start + 1:
                self.log_pending()
                self._say_first_step(start)
            if profile.ends_with(step):
                with self._aside("saving"):
                    profile.finish()
        if step > start:
            self.telemetry.say(self.goodput.describe())
        if not last:
            self.telemetry.say(f"stopped at step {step}; the same command resumes from there")
        elif unscored:
            self.telemetry.say(
                f"stopped at step {step}, the last, before its evaluation was done; the same "
                "command evaluates it"
            )
        bits = None
        if self.eval_loss:
            loss = self.eval_loss[max(self.eval_loss)]
            bits = HeldOut.of(loss, 1.0, self.sources.main.validation).bits_per_byte
        self.telemetry.say(describe_end(config, step, self.eval_loss, bits))
        return state

    def _computes(self) -> bool:
        """Whether the devices still compute the last step that was started."""
        return bool(self.pending) and not self.pending[-1][1]["loss"].is_ready()

    def _say_first_step(self, start: int) -> None:
        seconds, spent = self.goodput.since_start(), self.goodput.record()
        compiling = self.goodput.compiling_since_start()
        self.telemetry.say(
            f"first step {seconds:.1f} s after the start, {compiling:.1f} s of them compiling"
        )
        self.telemetry.clock(start, {"seconds_to_first_step": seconds, **spent})

    @contextlib.contextmanager
    def _aside(self, kind: str) -> Iterator[None]:
        """What is inside is not part of the steps: of their time, and of their speed."""
        begun = time.perf_counter()
        with self.goodput.spend(kind):
            yield
        self.telemetry.outside(time.perf_counter() - begun)

    def log_pending(self, keep: int = 0) -> None:
        """Waits for the metrics of all but the last `keep` steps, checks them, and logs them.

        One step stays in flight, so that the device never waits for the host.
        """
        while len(self.pending) > keep:
            step, metrics = self.pending.popleft()
            if skipped := int(metrics.get("skipped_in_a_row", 0)):
                self.skip(step, metrics, skipped)
                continue
            for name in ("loss", "grad_norm"):
                if not math.isfinite(value := float(metrics[name])):
                    raise NonFiniteLossError(self._non_finite(step, f"{name} is {value}"))
            if step % self.config.log_every == 0 or step in (1, self.config.steps):
                fetched = jax.device_get(metrics)
                record = {k: v if v.ndim else float(v) for k, v in fetched.items()}
                length = self.config.sequence_length
                record |= progress(self.sources.mixture, step, sequence_length=length)
                tokens = self.config.batch_size * length
                self.telemetry.training(step, record, tokens)

    def skip(self, step: int, metrics: dict[str, Any], in_a_row: int) -> None:
        """Reports a step that was skipped, or ends the run if there were too many in a row."""
        found = ", ".join(f"{name} {float(metrics[name]):.4g}" for name in ("loss", "grad_norm"))
        if in_a_row >= MOST_IN_A_ROW:
            problem = f"{in_a_row} steps in a row were skipped, the last with {found},"
            raise NonFiniteLossError(self._non_finite(step, problem))
        self.telemetry.say(f"step {step} is skipped: {found}; {self._batch(step)}")
        self.telemetry.changed(step, {"skipped_batch": step - 1, "skipped_in_a_row": in_a_row})

    def _batch(self, step: int) -> str:
        config = self.config
        return describe_rows(
            self.sources.mixture,
            step - 1,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            seed=config.seed,
        )

    def _non_finite(self, step: int, problem: str) -> str:
        config = self.config
        batch = self._batch(step)
        good = self.checkpoints.latest()
        saved = "there is no checkpoint" if good is None else f"the last good checkpoint is {good}"
        lower = f"a lower optimizer.peak_learning_rate than {config.optimizer.peak_learning_rate}"
        restart = lower if good is None else f"--resume-step {good} and {lower}"
        return (
            f"{problem} at step {step} ({batch}); {saved} in {self.checkpoints.directory}. "
            f"Resuming repeats the same batches: restart with {restart}, or inspect these windows"
        )

    def evaluate(self, state: TrainState, step: int) -> bool:
        """Scores held-out text, unless this step was scored before an interruption.

        Returns:
          Whether this step has the lowest loss so far.
        """
        self.log_pending()
        if step not in self.eval_loss:
            with self._aside("evaluating"):
                params = self.steps.weights(state)
                result = self.score(params, self.sources.main.validation)
                others = {name: self.score(params, x) for name, x in self.sources.held_out.items()}
            if result is None or None in others.values():
                return False
            if math.isfinite(result.loss):
                self.eval_loss[step] = result.loss
            named = {"": result} | {f"/{name}": other for name, other in others.items()}
            self.telemetry.evaluation(
                step,
                {
                    f"eval_{field}{name}": getattr(scores, field)
                    for name, scores in named.items()
                    for field in ("loss", "perplexity", "bits_per_byte", "tokens")
                },
            )
        lowest = min(self.eval_loss.values(), default=math.nan)
        return self.eval_loss.get(step, math.inf) <= lowest

    def score(self, params: nnx.State, split: Split) -> HeldOut | None:
        """The scores of a split, or None where a signal came before the end."""
        return evaluate(
            self.steps,
            params,
            split,
            self.config.data,
            batch_size=self.config.batch_size,
            sequence_length=self.config.sequence_length,
            limit=self.config.eval_batches,
            stop=self.stop,
        )

    def save(self, state: TrainState, step: int, *, ended: bool) -> None:
        """Checkpoints the state, after checking that it and the loss are finite.

        Args:
          ended: whether the run stops here.
        """
        self.log_pending()
        self.lock.check()
        loss = self.eval_loss.get(step)
        if self.checkpoints.latest() == step:
            if loss is not None:
                self.checkpoints.record({step: (loss, self.eval_tokens)})
            return
        self.telemetry.clock(step, self.goodput.record(ended=ended))
        with self._aside("saving"):
            self.telemetry.sync()
            try:
                self.checkpoints.save(
                    state, self.config, self.sources.fingerprint, loss, self.eval_tokens
                )
            except NonFiniteStateError as error:
                raise NonFiniteLossError(self._non_finite(step, str(error))) from None
