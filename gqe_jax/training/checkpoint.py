"""Checkpoints of a run, written by Orbax: asynchronous and atomic; the latest and best are kept."""

import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
from upath import UPath

from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.config_json import differences, from_dict, to_dict
from gqe_jax.errors import UserError
from gqe_jax.storage import is_remote, location
from gqe_jax.training.state import TrainState

DIRECTORY = "checkpoints"
_METRIC = "eval_loss"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be read."""


def _checkpoint_directory(run_dir: str | os.PathLike | UPath) -> epath.Path:
    path = location(run_dir)
    if not is_remote(path):
        return epath.Path(path.absolute()) / DIRECTORY
    if path.protocol not in ("gs", "s3"):
        raise ConfigError(
            f"run_dir is '{path}'; checkpoints go to a local directory, gs:// or s3://"
        )
    return epath.Path(str(path)) / DIRECTORY


class Checkpoints:
    """The checkpoints below a run directory; use it as a context manager.

    A checkpoint has three items: `params`, `training` (step and optimizer state) and `run`
    (configuration and the corpus's fingerprint, as JSON).

    Args:
      run_dir: the run's directory.
      keep: number of latest checkpoints to keep, besides the one with the lowest held-out loss.
      read_only: whether to write and remove nothing.
    """

    def __init__(
        self, run_dir: str | os.PathLike | UPath, *, keep: int = 3, read_only: bool = False
    ):
        self.directory = _checkpoint_directory(run_dir)
        loss_of = lambda metrics: metrics[_METRIC]  # noqa: E731
        best = BestN(
            get_metric_fn=loss_of,
            reverse=True,  # Orbax sorts by the metric and keeps the last
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
            best_fn=loss_of,  # without it, Orbax writes no metrics for the policy to read
            best_mode="min",
            enable_async_checkpointing=not read_only,
        )
        if read_only and not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory.parent} has no {DIRECTORY}; name the run directory of train.py"
            )
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=("params", "training", "run"),
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "training": ocp.StandardCheckpointHandler(),
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
            self._manager.close()

    def latest(self) -> int | None:
        """The last saved step; None if there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The saved step with the lowest held-out loss; None if none was evaluated."""
        return self._manager.best_step()

    def save(
        self, state: TrainState, config: RunConfig, fingerprint: str, eval_loss: float | None
    ) -> int:
        """Starts an asynchronous write and returns the step; the arrays may be donated thereafter.

        Args:
          state: the state after `state.step` steps.
          config: the run's configuration.
          fingerprint: the corpus's fingerprint.
          eval_loss: held-out loss of these parameters, if they were evaluated.
        """
        step = int(state.step)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                training=ocp.args.StandardSave(_training(state)),
                run=ocp.args.JsonSave({"config": to_dict(config), "corpus": fingerprint}),
            ),
            metrics=None if eval_loss is None else {_METRIC: eval_loss},
        )
        return step

    def save_weights(self, params: nnx.State, config: RunConfig) -> None:
        """Writes step 0 of a run: imported weights, without optimizer state or corpus."""
        run = {"config": to_dict(config), "corpus": None}
        self._manager.save(
            0,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params), run=ocp.args.JsonSave(run)
            ),
        )

    def read_run(self, step: int) -> tuple[RunConfig, str | None]:
        """Reads the configuration and the corpus's fingerprint, None in one of `save_weights`."""
        run = self._restore(step, run=ocp.args.JsonRestore())["run"]
        return from_dict(RunConfig, run["config"]), run["corpus"]

    def check_fits(self, step: int, config: RunConfig, fingerprint: str) -> None:
        """Checks that a run of `config` on this corpus can resume from the checkpoint.

        A checkpoint of `save_weights` needs only the same model.

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
        ]
        if corpus not in (None, fingerprint):
            fields.append(
                f"data.corpus {config.data.corpus!r} now has the fingerprint {fingerprint}, the "
                f"checkpoint was trained on {corpus}"
            )
        if fields:
            raise ConfigError(
                f"run_dir {config.run_dir} holds a run of another configuration: "
                f"{'; '.join(fields)}; give the same values, or another run_dir"
            )

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Reads the state after `step` steps.

        Args:
          step: the checkpoint's.
          abstract: shapes, types and shardings; the checkpoint may have been written on any mesh.

        Raises:
          CheckpointError: the checkpoint is damaged or does not have these arrays.
        """
        items = self._restore(
            step,
            params=ocp.args.StandardRestore(abstract.params),
            training=ocp.args.StandardRestore(_training(abstract)),
        )
        training = items["training"]
        return TrainState(training["step"], items["params"], training["opt_state"])

    def restore_params(self, step: int, abstract: nnx.State) -> nnx.State:
        """Reads only the parameters after `step` steps; arguments and errors as of `restore`."""
        return self._restore(step, params=ocp.args.StandardRestore(abstract))["params"]

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

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            earlier = [saved for saved in self._manager.all_steps() if saved < step]
            remedy = (
                f"delete that directory to resume from step {max(earlier)}"
                if earlier
                else "delete that directory to start over; there is no earlier checkpoint"
            )
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} cannot be read ({reason}); if it is "
                f"damaged or of another version, {remedy}"
            ) from error


def _training(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state}
