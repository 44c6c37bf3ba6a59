"""Trains the four variants of a configuration on several seeds and tabulates their held-out text.

    python -m experiments.ablation --config tiny --seeds 3

A run that is there already is not trained again, and one that was stopped goes on.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
from typing import Any, get_args

from configs import CONFIGS
from gqe_jax.commands import parse, run_command
from gqe_jax.config import ConfigError, RunConfig, Variant
from gqe_jax.training.loop import train
from gqe_jax.training.telemetry import read_metrics


@dataclasses.dataclass(frozen=True)
class AblationConfig:
    """Compare the variants at equal steps."""

    config: str = "tiny"
    """The configuration; only its variant and seed change."""
    seeds: int = 3
    """Runs of each variant, with seeds from 0."""
    steps: int | None = None
    """Steps of a run; None: the configuration's."""
    output: pathlib.Path = pathlib.Path("runs/ablation")
    """Directory of the runs and of ablation.json."""

    def __post_init__(self) -> None:
        if self.config not in CONFIGS:
            raise ConfigError(f"config is {self.config!r}; it must be one of {', '.join(CONFIGS)}")
        if self.seeds < 1:
            raise ConfigError(f"seeds is {self.seeds}; it must be positive")


def run_ablation(ablation: AblationConfig) -> dict[str, list[float]]:
    """Held-out bits per byte of each variant, a value a seed.

    Raises:
      KeyboardInterrupt: a run was stopped; the same call goes on.
    """
    base = CONFIGS[ablation.config]
    scores: dict[str, list[float]] = {variant: [] for variant in get_args(Variant)}
    for seed in range(ablation.seeds):
        for variant in scores:
            run_dir = ablation.output / f"{ablation.config}-{variant}-{seed}"
            steps = ablation.steps or base.steps
            config = variant_run(base, variant, run_dir=str(run_dir), steps=steps, seed=seed)
            scores[variant].append(trained(config))
    (ablation.output / "ablation.json").write_text(json.dumps(scores, indent=1) + "\n")
    return scores


def variant_run(base: RunConfig, variant: str, **fields: Any) -> RunConfig:
    """`base` with another variant, and other fields of the run."""
    attention = dataclasses.replace(base.model.attention, variant=variant)
    model = dataclasses.replace(base.model, attention=attention)
    return dataclasses.replace(base, model=model, **fields)


def trained(config: RunConfig) -> float:
    """Trains a run to its end; the held-out bits per byte of its last evaluation.

    Raises:
      KeyboardInterrupt: it was stopped.
    """
    train(config)
    scored = [line for line in read_metrics(config.run_dir) if "eval_loss" in line]
    if not scored or scored[-1]["step"] < config.steps:
        raise KeyboardInterrupt(f"{config.run_dir} was stopped; the same command goes on")
    return scored[-1]["eval_bits_per_byte"]


def table(scores: dict[str, list[float]]) -> str:
    """Markdown: mean, standard deviation over seeds, and each seed's value."""
    rows = ["| variant | bits per byte | spread (std) | by seed |", "|---|---|---|---|"]
    for variant, values in scores.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        seeds = ", ".join(f"{value:.4f}" for value in values)
        rows.append(f"| `{variant}` | {statistics.mean(values):.4f} | {spread:.4f} | {seeds} |")
    return "\n".join(rows)


def main() -> None:
    """The command line."""
    config = parse(AblationConfig, sys.argv[1:], prog="ablation", description=__doc__)
    print(table(run_command(lambda: run_ablation(config))))


if __name__ == "__main__":
    main()
