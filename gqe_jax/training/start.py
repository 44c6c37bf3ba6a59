"""Where a run begins or goes on, and what changes there."""

import dataclasses
from typing import Any

import jax

from gqe_jax import processes
from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.config_json import changes, differences
from gqe_jax.training.checkpoint import Checkpoints
from gqe_jax.training.optimizer import learning_rate_schedule


def find_start(
    config: RunConfig, checkpoints: Checkpoints, fingerprint: str
) -> tuple[int | None, dict[str, Any], RunConfig]:
    """Finds the checkpoint from which a run goes on, and checks that the configuration fits it.

    Returns:
      Its step, None for a new run; what changes there; and the configuration to train and save,
      whose `resume_step` marks a run that was restarted, so that the same command does it once.
    """
    latest = processes.from_first(checkpoints.latest())
    if latest is None:
        if config.resume_step is not None:
            raise ConfigError(
                f"resume_step is {config.resume_step}; run_dir {config.run_dir} has no checkpoints"
            )
        return None, {}, config
    saved, corpus = checkpoints.read_run(latest)
    done = saved.resume_step == config.resume_step and not differences(config, saved)
    if config.resume_step is None or done:
        start = latest
        checkpoints.check_fits(start, config, fingerprint)
        config = dataclasses.replace(config, resume_step=saved.resume_step)
    else:
        start = checkpoints.resolve(config.resume_step)
        saved, corpus = checkpoints.read_run(start)
        checkpoints.check_fits(start, config, fingerprint, restart=True)
    changed: dict[str, Any] = {}
    if start and corpus is not None:
        for name, (new, old) in changes(config, saved).items():
            if name.startswith("optimizer.") or name in ("steps", "accumulation_steps"):
                changed[name] = [old, new]
    rates = [
        jax.device_get(learning_rate_schedule(run.optimizer, run.steps)(step)).item()
        for run, step in ((saved, start - 1), (config, start))
    ]
    if set(changed) - {"accumulation_steps"} and start < config.steps:
        changed["learning_rate_change"] = rates
    if start != latest:
        changed["restarted_from"] = latest
    return start, changed, config


def describe_changes(start: int, changed: dict[str, Any]) -> str:
    """A line for the terminal that says what `find_start` found to change."""
    parts = [
        f"{name} is {values[1]}, was {values[0]}"
        for name, values in changed.items()
        if name not in ("learning_rate_change", "restarted_from")
    ]
    if "restarted_from" in changed:
        parts.insert(0, f"restarted; the run was at step {changed['restarted_from']}")
    if "learning_rate_change" in changed:
        before, after = changed["learning_rate_change"]
        parts.append(f"the learning rate goes from {before:.2e} to {after:.2e}")
        if after > before:
            parts.append("optimizer.schedule_steps keeps a schedule's length apart from steps")
    if "accumulation_steps" in changed:
        parts.append(
            "sums are in another order, and the router's losses are means over other microbatches"
        )
    return f"changes at step {start}: {'; '.join(parts)}"
