"""Upcycles a dense model in every way, trains on, and tabulates held-out text, on several seeds.

    python -m experiments.upcycling --config tiny --seeds 3

The extra steps are the same text for every row. A run that is there already is not trained again,
and one that was stopped goes on.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
from typing import get_args

import jax

from configs import CONFIGS
from experiments.ablation import trained, variant_run
from gqe_jax.commands import parse, run_command
from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.evaluation.run import defaults_for, evaluate_run
from gqe_jax.interop.upcycle import Start, UpcycleConfig, upcycle
from gqe_jax.runs import SPREAD, Run, load_config, write_run
from gqe_jax.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class UpcyclingConfig:
    """Compare the ways to upcycle."""

    config: str = "tiny"
    """The configuration; its variant, seed and steps change."""
    seeds: int = 3
    """Dense models, with seeds from 0, each upcycled in every way."""
    dense_steps: int = 160
    """Steps of the dense model."""
    healing_steps: int = 40
    """Steps after the conversion, from a fresh optimizer and with a schedule of their own."""
    eval_batches: int = 32
    """Batches of held-out text that each model is scored on."""
    output: pathlib.Path = pathlib.Path("runs/upcycling")
    """Directory of the runs and of upcycling.json."""

    def __post_init__(self) -> None:
        if self.config not in CONFIGS:
            raise ConfigError(f"config is {self.config!r}; it must be one of {', '.join(CONFIGS)}")
        for field in ("seeds", "dense_steps", "healing_steps", "eval_batches"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be positive")


def run_upcycling(config: UpcyclingConfig) -> dict[str, dict[str, list[float]]]:
    """Held-out bits per byte of each row of the table, converted and trained, a value a seed.

    Raises:
      KeyboardInterrupt: a run was stopped; the same call goes on.
    """
    scores: dict[str, dict[str, list[float]]] = {}

    def add(row: str, column: str, score: float) -> None:
        scores.setdefault(row, {}).setdefault(column, []).append(score)

    for seed in range(config.seeds):
        dense = _run(config, "gqa", config.dense_steps, seed)
        add("dense", "before", trained(dense))
        for row, start, distill in _conversions():
            output = config.output / f"{row.replace(' ', '-')}-{seed}"
            if not output.exists():
                upcycle(
                    UpcycleConfig(
                        pathlib.Path(dense.run_dir),
                        output,
                        top_k=dense.model.attention.top_k,
                        start=start,
                        steps=config.healing_steps,
                        distill=distill,
                        seed=seed,
                    )
                )
            add(f"GQE, {row}", "before", _converted(config, output))
            add(f"GQE, {row}", "after", trained(load_config(output)))
        more = config.output / f"dense-more-{seed}"
        if not more.exists():
            found = Run.find(dense.run_dir)
            _, params = found.load(make_mesh(SPREAD))
            run = dataclasses.replace(found.config, run_dir=str(more), steps=config.healing_steps)
            write_run(run, params, None)
        add("dense, trained on", "after", trained(load_config(more)))
        for row, steps in (
            ("GQE from scratch, the extra steps alone", config.healing_steps),
            ("GQE from scratch, all steps", config.dense_steps + config.healing_steps),
        ):
            add(row, "after", trained(_run(config, "gqe", steps, seed)))
    (config.output / "upcycling.json").write_text(json.dumps(scores, indent=1) + "\n")
    return scores


def _conversions() -> list[tuple[str, Start, bool]]:
    plain = [(start.replace("_", " "), start, False) for start in get_args(Start)]
    return [*plain, ("least squares and distillation", "least_squares", True)]


def _run(config: UpcyclingConfig, variant: str, steps: int, seed: int) -> RunConfig:
    return variant_run(
        CONFIGS[config.config],
        variant,
        run_dir=str(config.output / f"{variant}-{steps}-{seed}"),
        steps=steps,
        seed=seed,
        eval_batches=config.eval_batches,
        checkpoint_every=max(steps, config.healing_steps),
    )


def _converted(config: UpcyclingConfig, output: pathlib.Path) -> float:
    """Bits per byte of step 0, kept in a file: training may remove that checkpoint."""
    path = output / "converted.json"
    if not path.exists():
        evaluation = dataclasses.replace(
            defaults_for(str(output)), step=0, batches=config.eval_batches
        )
        path.write_text(json.dumps(evaluate_run(evaluation).held_out.bits_per_byte))
    return json.loads(path.read_text())


def table(scores: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: mean and standard deviation over seeds, before and after the extra steps."""

    def cell(values: list[float] | None) -> str:
        if values is None:
            return ""
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.4f} ± {spread:.4f}"

    rows = ["| | before the extra steps | after |", "|---|---|---|"]
    for row, columns in scores.items():
        rows.append(f"| {row} | {cell(columns.get('before'))} | {cell(columns.get('after'))} |")
    return "\n".join(rows)


def main() -> None:
    """The command line."""
    config = parse(UpcyclingConfig, sys.argv[1:], prog="upcycling", description=__doc__)
    # The same steps are compiled for every seed.
    jax.config.update("jax_compilation_cache_dir", str(config.output.absolute() / "compiled"))
    print(table(run_command(lambda: run_upcycling(config))))


if __name__ == "__main__":
    main()
