"""Checkpoints of a run, written by Orbax: asynchronous and atomic; the latest and best are kept."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    LatestN,
    PreservationPolicy,
)
from upath import UPath

from gqe_jax import processes
from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.config_json import differences, from_dict, to_dict
from gqe_jax.data.sources import other_history
from gqe_jax.errors import UserError
from gqe_jax.storage import explain, is_remote, location, write_whole
from gqe_jax.training.integrity import measure
from gqe_jax.training.state import TrainState

DIRECTORY = "checkpoints"
LOSS, TOKENS = "eval_loss", "eval_tokens"
"""Metrics of a checkpoint: the held-out loss, and the number of tokens that it was measured on."""
_STATE_SHAPES = ("optimizer.zclip_warmup_steps", "optimizer.name")
"""Fields that shape the optimizer's state."""
_OPTIONAL = ("average", "spikes")
_ARRAYS = ("params", "training", *_OPTIONAL)
Score = Mapping[str, float]


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be read or written."""


class NonFiniteStateError(UserError, RuntimeError):
    """The state has NaN or infinity and is not saved."""


def best_step(scores: Mapping[int, Score | None]) -> int | None:
    """The step with the lowest loss, the latest of equals; None if none was scored.

    Losses of different numbers of held-out tokens are not comparable: only those of the text that
    was scored last count.
    """
    scored = {step: score for step, score in scores.items() if score is not None}
    if not scored:
        return None
    text = scored[max(scored)].get(TOKENS)
    same = {step: score[LOSS] for step, score in scored.items() if score.get(TOKENS) == text}
    return min(same, key=lambda step: (same[step], -step))


class _KeepBest(PreservationPolicy):
    """Keeps the checkpoint of `best_step`."""

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        best = best_step({info.step: _score(info.metrics) for info in checkpoints})
        return [info.step == best for info in checkpoints]


def _score(metrics: Any) -> Score | None:
    """The metrics of a checkpoint, or None where they are missing or damaged."""
    loss = metrics.get(LOSS) if isinstance(metrics, dict) else None
    is_number = type(loss) is float or (type(loss) is int and abs(loss) <= sys.float_info.max)
    return metrics if is_number and math.isfinite(loss) else None


class _Manager(ocp.CheckpointManager):
    """A manager for which a checkpoint with damaged metrics was not evaluated."""

    def metrics(self, step: int) -> Any:
        try:
            return _score(super().metrics(step))
        except (ValueError, RecursionError):  # the latter of JSON that is nested too deeply
            return None


def checkpoint_directory(run_dir: str | os.PathLike | UPath) -> epath.Path:
    """The directory of a run's checkpoints.

    Raises:
      ConfigError: Orbax cannot write there; of object stores, it knows Google Cloud Storage only.
    """
    path = location(run_dir)
    if not is_remote(path):
        return epath.Path(path.absolute()) / DIRECTORY
    if path.protocol != "gs":
        raise ConfigError(
            f"run_dir is '{path}'; checkpoints go to a local or mounted directory, or to gs://"
        )
    return epath.Path(str(path)) / DIRECTORY


class Checkpoints:
    """The checkpoints below a run directory; use it as a context manager.

    A checkpoint has three items: `params`, `training` (step and optimizer state) and `run`
    (configuration and the corpus's fingerprint, as JSON); and `average` and `spikes`, where the
    state has them.

    Args:
      run_dir: the run's directory.
      keep: number of latest checkpoints to keep, besides the one with the lowest held-out loss.
      read_only: whether to write and remove nothing.
    """

    def __init__(
        self, run_dir: str | os.PathLike | UPath, *, keep: int = 3, read_only: bool = False
    ):
        self.directory = checkpoint_directory(run_dir)
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            preservation_policy=AnyPreservationPolicy([LatestN(keep), _KeepBest()]),
            best_fn=lambda metrics: metrics[LOSS],  # without it, Orbax writes no metrics
            best_mode="min",
            enable_async_checkpointing=not read_only,
            cleanup_tmp_directories=not read_only,  # those of killed saves
        )
        if read_only and not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory.parent} has no {DIRECTORY}; name the run directory of train.py"
            )
        with self._writing(), self._opening():
            self._manager = _Manager(
                self.directory,
                item_names=(*_ARRAYS, "run"),
                item_handlers={
                    **{name: ocp.StandardCheckpointHandler() for name in _ARRAYS},
                    "run": ocp.JsonCheckpointHandler(),
                },
                options=options,
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        # Closing waits until every process has written. After an error in a job of several, another
        # process may be dead, and closing would never return.
        if error is None or jax.process_count() == 1:
            with self._writing():
                self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Names a disk that is full or cannot be written, in place of Orbax's errors."""
        try:
            yield
        except Exception as error:
            if isinstance(error, UserError) or (reason := explain(error)) is None:
                raise
            raise CheckpointError(
                f"a checkpoint in {self.directory} cannot be written ({reason}). Earlier "
                "checkpoints are whole: then the same command goes on from the last one"
            ) from error

    @contextlib.contextmanager
    def _opening(self) -> Iterator[None]:
        """Names the directory where Orbax cannot make sense of its own files."""
        try:
            yield
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"a checkpoint in {self.directory} is damaged ({_first_line(error)}); delete its "
                "directory, or copy it again"
            ) from error

    def latest(self) -> int | None:
        """The last saved step; None if there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The saved step with the lowest held-out loss; None if none was evaluated."""
        return best_step(self._scores())

    def _scores(self) -> dict[int, Score | None]:
        return {step: self._manager.metrics(step) for step in self._manager.all_steps()}

    def save(
        self,
        state: TrainState,
        config: RunConfig,
        fingerprint: str,
        eval_loss: float | None,
        eval_tokens: int | None = None,
    ) -> int:
        """Starts an asynchronous write and returns the step; the arrays may be donated thereafter.

        Args:
          state: the state after `state.step` steps.
          config: the run's configuration.
          fingerprint: the corpus's fingerprint.
          eval_loss: held-out loss of these parameters, if they were evaluated.
          eval_tokens: number of tokens that it was measured on.

        Raises:
          NonFiniteStateError: an array has NaN or infinity; nothing is written.
          CheckpointError: this or the previous checkpoint cannot be written.
        """
        step = int(state.step)
        items = _items(state)
        checksums, not_finite = measure(items)
        if not_finite:
            raise NonFiniteStateError(f"{not_finite[0]} has NaN or infinity")
        run = {"config": to_dict(config), "corpus": fingerprint, "checksums": checksums}
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(item) for name, item in items.items()},
                    run=ocp.args.JsonSave(run),
                ),
                metrics=None if eval_loss is None else _metrics(eval_loss, eval_tokens),
            )
        return step

    def record(self, scores: Mapping[int, tuple[float, int]]) -> None:
        """Adds (held-out loss, number of tokens) to saved steps that lack them.

        All processes of a job call it.
        """
        with self._writing():
            self._manager.wait_until_finished()
            saved = processes.from_first({str(k): v for k, v in self._scores().items()})
            missing = {
                step: _metrics(*score)
                for step, score in scores.items()
                if str(step) in saved and saved[str(step)] != _metrics(*score)
            }
            if not missing:
                return
            if processes.is_first():
                for step, metrics in missing.items():
                    path = location(os.fspath(self.directory)) / str(step) / "metrics" / "metrics"
                    write_whole(path, json.dumps(metrics))
            processes.from_first(True)  # the others read after process 0 has written
            self._manager.reload()

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps; all processes of a job call it."""
        with self._writing():
            for later in sorted(self._manager.all_steps(), reverse=True):
                if later > step:
                    self._manager.delete(later)

    def save_weights(self, params: nnx.State, config: RunConfig) -> None:
        """Writes step 0 of a run: imported weights, without optimizer state or corpus."""
        checksums, _ = measure({"params": params})
        run = {"config": to_dict(config), "corpus": None, "checksums": checksums}
        with self._writing():
            self._manager.save(
                0,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params), run=ocp.args.JsonSave(run)
                ),
            )

    def read_run(self, step: int) -> tuple[RunConfig, str | None]:
        """Reads the configuration and the corpus's fingerprint, None in one of `save_weights`."""
        run = self._restore(step, run=ocp.args.JsonRestore())["run"]
        if not isinstance(run, dict) or not {"config", "corpus"} <= run.keys():
            raise self._unreadable(step, "its item run has no configuration")
        corpus = run["corpus"]
        if corpus is not None and not isinstance(corpus, str):
            raise self._unreadable(step, f"corpus is {corpus!r}, which is no fingerprint")
        try:
            return from_dict(RunConfig, run["config"]), corpus
        except ConfigError as error:
            raise self._unreadable(step, f"of its configuration, {error}") from None

    def check_fits(
        self, step: int, config: RunConfig, fingerprint: str, *, restart: bool = False
    ) -> None:
        """Checks that a run of `config` on this corpus can resume from the checkpoint.

        A checkpoint of `save_weights` needs only the same model. With `restart` the fields of
        `optimizer` can differ, as far as the shapes of the optimizer's state allow.

        Raises:
          ConfigError: names the fields that differ, with both values.
        """
        if config.steps < step:
            raise ConfigError(
                f"steps is {config.steps}; run_dir {config.run_dir} is at step {step} already: "
                "give at least that, or another run_dir"
            )
        saved, corpus = self.read_run(step)
        fields = [
            f"{name} is {ours!r}, the checkpoint has {theirs!r}"
            for name, (ours, theirs) in differences(config, saved).items()
            if corpus is not None or name.startswith("model.")
            if not (restart and name.startswith("optimizer."))
            or name in _STATE_SHAPES
            # Without it the state has no count of its steps.
            or (name == "optimizer.tied_fraction" and not (ours and theirs))
        ]
        main, now = (None if text is None else text.split()[0] for text in (corpus, fingerprint))
        if corpus is not None and main == now:
            if other := other_history((config, fingerprint), (saved, corpus), step):
                fields.append(f"data.mixture: the checkpoint was trained on {other}")
        elif corpus is not None:
            fields.append(
                f"data.corpus {config.data.corpus!r} now has the fingerprint {fingerprint}, the "
                f"checkpoint was trained on {corpus}"
            )
        if fields:
            restartable = all(field.startswith("optimizer.") for field in fields)
            raise ConfigError(
                f"run_dir {config.run_dir} holds a run of another configuration: "
                f"{'; '.join(fields)}; give the same values, or another run_dir"
                + (f", or --resume-step {step} to go on with these" if restartable else "")
            )

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Reads the state after `step` steps, without what the checkpoint or `abstract` lacks.

        Args:
          step: the checkpoint's.
          abstract: shapes, types and shardings; the checkpoint may have been written on any mesh.

        Raises:
          CheckpointError: the checkpoint is damaged or does not have these arrays.
        """
        wanted = _items(abstract)
        optional = [name for name in _OPTIONAL if name in wanted and not self._has(step, name)]
        items = self._restore_checked(
            step, **{name: item for name, item in wanted.items() if name not in optional}
        )
        training, others = items["training"], (items.get(name) for name in _OPTIONAL)
        return TrainState(training["step"], items["params"], training["opt_state"], *others)

    def restore_params(
        self, step: int, abstract: nnx.State, *, averaged: bool = False
    ) -> nnx.State:
        """Reads only the parameters after `step` steps; errors as of `restore`.

        Args:
          step, abstract: as of `restore`.
          averaged: read their average where the checkpoint has one.
        """
        name = "average" if averaged and self._has(step, "average") else "params"
        return self._restore_checked(step, **{name: abstract})[name]

    def _has(self, step: int, item: str) -> bool:
        return (self.directory / str(step) / item).is_dir()

    def resolve(self, step: int | str) -> int:
        """The number of a saved step, given by its number, `latest` or `best`.

        Raises:
          CheckpointError: there is no such step; names the saved ones.
        """
        steps = sorted(self._manager.all_steps())
        named: dict[int | str, int | None] = {"latest": self.latest(), "best": self.best()}
        found = named.get(step, step)
        if found not in steps:
            names = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(f"step is {step}; {self.directory} has {names}")
        return found

    def _restore_checked(self, step: int, **abstract: Any) -> dict[str, Any]:
        """Reads items of arrays and compares their checksums with those that were saved."""
        restore = {name: ocp.args.StandardRestore(item) for name, item in abstract.items()}
        items = self._restore(step, **restore, run=ocp.args.JsonRestore())
        saved = items["run"].get("checksums", {}) if isinstance(items["run"], dict) else None
        if not isinstance(saved, dict):
            raise self._unreadable(step, "its item run has no checksums")
        found, _ = measure({name: items[name] for name in abstract}) if saved else ({}, [])
        for name, checksum in found.items():
            if saved.get(name, checksum) != checksum:
                raise self._unreadable(
                    step, f"the bits of {name.rpartition(':')[0]} are not those that were saved"
                )
        return {name: items[name] for name in abstract}

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._unreadable(step, _first_line(error)) from error

    def _unreadable(self, step: int, reason: str) -> CheckpointError:
        earlier = [saved for saved in self._manager.all_steps() if saved < step]
        remedy = (
            f"delete that directory to resume from step {max(earlier)}"
            if earlier
            else "delete that directory to start over; there is no earlier checkpoint"
        )
        return CheckpointError(
            f"checkpoint {self.directory / str(step)} cannot be read ({reason}); if it is "
            f"damaged or of another version, {remedy}"
        )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), repr(error))


def _metrics(eval_loss: float, eval_tokens: int | None) -> dict[str, float]:
    return {LOSS: eval_loss} | ({} if eval_tokens is None else {TOKENS: eval_tokens})


def _items(state: TrainState) -> dict[str, Any]:
    """The trees of arrays of a checkpoint, by item."""
    training = {"step": state.step, "opt_state": state.opt_state}
    items = {"params": state.params, "training": training}
    others = {name: getattr(state, name) for name in _OPTIONAL}
    return items | {name: item for name, item in others.items() if item is not None}
