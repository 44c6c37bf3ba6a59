"""Checkpoints of a run, by Orbax: asynchronous and whole; the latest and the best are kept."""

import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.config_json import differences, from_dict, to_dict
from gqe_jax.storage import is_remote, location
from gqe_jax.training.steps import TrainState

DIRECTORY = "checkpoints"
_METRIC = "eval_loss"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read."""


def _checkpoint_directory(run_dir: str | os.PathLike) -> epath.Path:
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
      keep: latest checkpoints that stay, beside the one with the lowest held-out loss.
      read_only: for evaluation: nothing is written or removed.
    """

    def __init__(self, run_dir: str | os.PathLike, *, keep: int = 3, read_only: bool = False):
        self.directory = _checkpoint_directory(run_dir)
        loss_of = lambda metrics: metrics[_METRIC]  # noqa: E731
        best = BestN(
            get_metric_fn=loss_of,
            reverse=True,  # Orbax keeps the last of the sorted
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
        # Closing waits for what is being written, by every process: after an error, for ever if it
        # is that another one died.
        if error is None or jax.process_count() == 1:
            self._manager.close()

    def latest(self) -> int | None:
        """The last step that was saved."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The saved step with the lowest held-out loss; None if none was evaluated."""
        return self._manager.best_step()

    def save(
        self, state: TrainState, config: RunConfig, fingerprint: str, eval_loss: float | None
    ) -> int:
        """Starts to write the state; the arrays may be donated when this returns.

        Args:
          state: after `state.step` steps.
          config: the run's.
          fingerprint: the corpus's.
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
        """Writes step 0 of a run: weights from elsewhere, which no corpus has trained yet."""
        run = {"config": to_dict(config), "corpus": None}
        self._manager.save(
            0,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params), run=ocp.args.JsonSave(run)
            ),
        )

    def read_run(self, step: int) -> tuple[RunConfig, str | None]:
        """The configuration and corpus fingerprint of a checkpoint; None: of `save_weights`."""
        run = self._restore(step, run=ocp.args.JsonRestore())["run"]
        return from_dict(RunConfig, run["config"]), run["corpus"]

    def check_fits(self, step: int, config: RunConfig, fingerprint: str) -> None:
        """Whether a run of `config` on this corpus can go on from the checkpoint.

        From weights that `save_weights` wrote it can if the model is theirs.

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

    def restore(self, step: int, abstract: TrainState, sharding: TrainState) -> TrainState:
        """The state after `step` steps, laid out as `sharding` says, whatever mesh wrote it."""
        target = _with_sharding(abstract, sharding)
        items = self._restore(
            step,
            params=ocp.args.StandardRestore(target.params),
            training=ocp.args.StandardRestore(_training(target)),
        )
        training = items["training"]
        return TrainState(training["step"], items["params"], training["opt_state"])

    def restore_params(self, step: int, abstract: TrainState, sharding: TrainState) -> Any:
        """Only the parameters after `step` steps."""
        target = _with_sharding(abstract, sharding)
        return self._restore(step, params=ocp.args.StandardRestore(target.params))["params"]

    def resolve(self, step: int | str) -> int:
        """A saved step, by its number, `latest` or `best`.

        Raises:
          CheckpointError: there is none; names those there are.
        """
        steps = sorted(self._manager.all_steps())
        found = {"latest": self.latest(), "best": self.best()}.get(step, step)
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
                f"delete that directory to go on from step {max(earlier)}"
                if earlier
                else "delete that directory to start anew: there is no earlier one"
            )
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} cannot be read ({reason}); if it is "
                f"damaged or of another version, {remedy}"
            ) from error


def _training(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state}


def _with_sharding(abstract: TrainState, sharding: TrainState) -> TrainState:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, sharding
    )
