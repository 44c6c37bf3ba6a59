"""Trains GQE beside dense models and other recipes, on several seeds, and tabulates their text.

    python -m experiments.quality cost --seeds 3
    python -m experiments.quality tokens --seeds 3
    python -m experiments.quality sizes
    python -m experiments.quality experts --tokens 1000000 2000000 4000000
    python -m experiments.quality recipe --seeds 5

`cost` has dense models that cost as much as GQE. `tokens` asks whether the gap closes. `sizes` has
three widths with tokens in proportion, `experts` more experts of which as many are selected (all
are projected), `recipe` one change of the recipe at a time.

With `--tokens`, each model has one run with a constant learning rate, from which runs branch off
that decay it, so that each number of tokens has a finished run.

All models of a seed read the same batches. A run that is there already is not trained again, and
one that was stopped goes on. The scores go to STUDY.json in the output directory, with a table and
a plot beside them; a run that failed is in the table with its error. Runs and results have the
names of a corpus and a learning rate that are given in theirs.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

import matplotlib.figure
import tyro

from configs import CONFIGS
from experiments.ablation import trained
from experiments.contenders import (
    DENSE,
    FEWER_HEADS,
    GQE,
    TIED_HARD,
    cost,
    is_routed,
    of_equal_cost,
    of_experts,
    of_recipes,
    of_sizes,
    static_cycles,
    tied,
)
from gqe_jax.commands import parse, run_command
from gqe_jax.compilation_cache import DEFAULT, keep_programs
from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.errors import UserError
from gqe_jax.report.curves import styled
from gqe_jax.storage import location, write_whole
from gqe_jax.whole_directory import written_whole

Study = Literal["cost", "tokens", "sizes", "experts", "recipe"]
STUDIES = {"cost": of_equal_cost, "sizes": of_sizes, "experts": of_experts, "recipe": of_recipes}
# Of the study `tokens`, if no others are given.
TOKENS = 500_000, 1_000_000, 2_000_000, 4_000_000
# Of the steps of a run that branches off, those with a decaying learning rate.
DECAY = 0.2


@dataclasses.dataclass(frozen=True)
class QualityConfig:
    """What is compared, and on how much text."""

    study: tyro.conf.Positional[Annotated[Study, tyro.conf.arg(metavar="STUDY")]]
    """`cost`, `tokens`, `sizes`, `experts` or `recipe`."""
    config: str = "tiny"
    """The configuration of the GQE model; of it, only what a study compares changes."""
    models: tuple[str, ...] = ()
    """Of the models that the study compares, those to train, by name; none: all."""
    seeds: int = 3
    """Runs of each model, with seeds from 0; with no runs, the table has the costs alone."""
    steps: int | None = None
    """Steps of a run; None: the configuration's. Not with `tokens`."""
    tokens: tuple[int, ...] = ()
    """Tokens of finished runs that branch off one, ascending; none: each run has `steps`, and the
    study `tokens` has 0.5M, 1M, 2M and 4M tokens."""
    workers: int = 1
    """Runs at a time, each in a process of its own if there are more than one. They share a GPU,
    whose memory they then take as they need it."""
    corpus: str | None = None
    """Directory of a corpus that `gqe_jax.data.prepare` wrote; None: the configuration's."""
    cycles: bool = False
    """Compile the forward pass of each model for a v5e, and add the cycles of a token to the table;
    needs `pip install -e '.[tpu]'`, but no TPU."""
    learning_rate: float | None = None
    """Peak learning rate of all runs; None: the configuration's."""
    output: pathlib.Path = pathlib.Path("runs/quality")
    """Directory of the runs and results."""

    def __post_init__(self) -> None:
        if self.config not in CONFIGS:
            raise ConfigError(f"config is {self.config!r}; it must be one of {', '.join(CONFIGS)}")
        attention = CONFIGS[self.config].model.attention
        if attention.variant != "gqe" or not is_routed(attention):
            raise ConfigError(f"config is {self.config!r}; its router must select among experts")
        for field, least in (("seeds", 0), ("workers", 1)):
            if (value := getattr(self, field)) < least:
                raise ConfigError(f"{field} is {value}; it must be at least {least}")
        if self.tokens_at_ends and self.steps is not None:
            raise ConfigError(f"steps is {self.steps}; the runs end at the numbers of --tokens")
        if self.study == "sizes" and self.tokens:
            raise ConfigError(
                f"tokens is {self.tokens}; in `sizes` they are in proportion to parameters"
            )
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if list(self.tokens) != sorted(set(self.tokens)):
            raise ConfigError(f"tokens is {self.tokens}; give numbers in ascending order")

    @property
    def label(self) -> str:
        """What tells runs and results of another text or learning rate from the configuration's."""
        text = "" if self.corpus is None else f"-{pathlib.PurePath(self.corpus).name}"
        return text if self.learning_rate is None else f"{text}-{self.learning_rate:g}"

    @property
    def tokens_at_ends(self) -> tuple[int, ...]:
        """Tokens at which runs that branch off end; empty: no runs branch off."""
        return self.tokens or (TOKENS if self.study == "tokens" else ())


@dataclasses.dataclass(frozen=True)
class Job:
    """One run, or the runs that branch off one.

    Attributes:
      run: to the end of its steps.
      ends: steps at which runs that branch off end; empty: the run itself is what is scored.
    """

    name: str
    seed: int
    run: RunConfig
    ends: tuple[int, ...] = ()


def models_of(config: QualityConfig, base: RunConfig) -> Mapping[str, RunConfig]:
    """The models that a study compares, by name; `base` is the GQE model's run."""
    if config.steps is not None:
        base = dataclasses.replace(base, steps=config.steps)
    if config.study == "tokens":
        models = of_equal_cost(base)
        models = {name: models[name] for name in (GQE, DENSE, FEWER_HEADS)}
        models[TIED_HARD] = tied(base, variant="hard_concat")
    else:
        models = STUDIES[config.study](base)
    for name in config.models:
        if name not in models:
            names = ", ".join(map(repr, models))
            raise ConfigError(f"models has {name!r}; it must be among {names}")
    return {name: models[name] for name in config.models or models}


def jobs(config: QualityConfig, base: RunConfig) -> Iterator[Job]:
    """All runs of a study, seed by seed."""
    per_step = base.batch_size * base.sequence_length
    ends = tuple(round(tokens / per_step) for tokens in config.tokens_at_ends)
    models = models_of(config, base)
    rate = config.learning_rate
    for seed in range(config.seeds):
        for name, run in models.items():
            words = "".join(c if c.isalnum() else "-" for c in name.lower())
            run_dir = config.output / config.study / f"{config.config}-{words}{config.label}-{seed}"
            optimizer = run.optimizer
            if rate is not None:
                optimizer = dataclasses.replace(optimizer, peak_learning_rate=rate)
            changed = dataclasses.replace(
                run,
                run_dir=str(run_dir),
                seed=seed,
                eval_every=max(ends, default=run.steps),
                data=dataclasses.replace(run.data, corpus=config.corpus or run.data.corpus),
                optimizer=optimizer,
            )
            yield Job(name, seed, changed, ends)


def scores_of(job: Job) -> dict[int, float]:
    """Held-out bits per byte, by the number of trained tokens.

    Raises:
      KeyboardInterrupt: the run was stopped; the same call goes on.
      UserError: the run failed.
    """
    per_step = job.run.batch_size * job.run.sequence_length
    if not job.ends:
        return {job.run.steps * per_step: trained(job.run)}
    return {end * per_step: trained(branch(job.run, end)) for end in job.ends}


def branch(run: RunConfig, end: int) -> RunConfig:
    """A run whose learning rate decays from `run`'s plateau to `end`; trains `run` up to there.

    The plateau is one run that is made longer each time; its state is copied where a run branches.

    Raises:
      ConfigError: the warm-up is longer than the plateau, or the plateau is past the branch.
    """
    # The same whatever the ends, so that a longer study goes on.
    constant = dataclasses.replace(run.optimizer, schedule_steps=run.steps, decay_fraction=0.0)
    warmup, _, _ = constant.phases(run.steps)
    tied_steps = run.optimizer.tied_fraction * run.steps
    start = end - round(DECAY * end)
    if warmup > start:
        raise ConfigError(f"tokens: the warm-up has {warmup} steps; a run of {end} is too short")
    decaying = dataclasses.replace(
        run.optimizer,
        schedule_steps=end,
        warmup_fraction=warmup / end,
        tied_fraction=min(tied_steps / end, 1.0),
        decay_fraction=DECAY,
    )
    directory = pathlib.Path(f"{run.run_dir}-{end}")
    if not directory.exists():
        trained(dataclasses.replace(run, steps=start, eval_batches=1, optimizer=constant))
        saved = pathlib.Path(run.run_dir) / "checkpoints" / str(start)
        with written_whole(location(directory)) as partial:
            for path in pathlib.Path(run.run_dir).iterdir():
                if path.name in ("config.json", "metrics.jsonl"):
                    partial.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, pathlib.Path(partial) / path.name)
            shutil.copytree(saved, pathlib.Path(partial) / "checkpoints" / str(start))
    return dataclasses.replace(
        run, run_dir=str(directory), steps=end, resume_step=start, optimizer=decaying
    )


type Scores = dict[str, dict[int, dict[int, float]]]
"""Bits per byte by model, tokens and seed."""


def run_study(todo: Sequence[Job], workers: int = 1) -> tuple[Scores, dict[str, str]]:
    """Trains what is not trained yet.

    Args:
      workers: runs at a time.

    Returns:
      The scores, and the errors of the runs that failed, by model and seed.

    Raises:
      KeyboardInterrupt: a run was stopped; the same call goes on.
    """
    scores: Scores = {}
    errors: dict[str, str] = {}
    for job, result in _results(todo, workers):
        if isinstance(result, str):
            errors[f"{job.name}, seed {job.seed}"] = result
            continue
        for tokens, score in result.items():
            scores.setdefault(job.name, {}).setdefault(tokens, {})[job.seed] = score
    return scores, errors


def _results(todo: Sequence[Job], workers: int) -> Iterator[tuple[Job, dict[int, float] | str]]:
    if workers == 1:
        yield from ((job, _result(job)) for job in todo)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=keep_programs, initargs=(DEFAULT,)
    ) as pool:
        yield from zip(todo, pool.map(_result, todo), strict=True)


def _result(job: Job) -> dict[int, float] | str:
    try:
        return scores_of(job)
    except UserError as error:
        return str(error)


def table(
    models: Mapping[str, RunConfig],
    scores: Scores,
    errors: Mapping[str, str],
    cycles: Mapping[str, tuple[float, float]],
) -> str:
    """Markdown: each model's cost and score, and how far it is from the first, seed by seed.

    Args:
      models: the runs of the study.
      scores, errors: from `run_study`.
      cycles: a token's cycles at both lengths, by model.
    """
    of_cycles = "cycles a token on v5e | " if cycles else ""
    rows = [
        f"| model | parameters | MFLOP a token at 2,048 and 32,768 | {of_cycles}tokens "
        "| bits per byte | from the first | by seed |",
        "|---|---|---|---|---|---|---|" + "---|" * bool(cycles),
    ]
    first = scores.get(next(iter(models)), {})
    for name, run in models.items():
        of = cost(run)
        costs = " and ".join(f"{flops / 1e6:.2f}" for flops in of.flops)
        if name in cycles:
            costs += " | " + " and ".join(f"{count:,.0f}" for count in cycles[name])
        if name not in scores:
            rows.append(f"| {name} | {of.parameters:,} | {costs} | | | | |")
        for tokens, by_seed in scores.get(name, {}).items():
            pairs = [
                score - first[tokens][seed]
                for seed, score in by_seed.items()
                if seed in first.get(tokens, {})
            ]
            each = ", ".join(f"{score:.4f}" for _, score in sorted(by_seed.items()))
            rows.append(
                f"| {name} | {of.parameters:,} | {costs} | {tokens:,} "
                f"| {mean_and_spread(list(by_seed.values()))} | {mean_and_spread(pairs, '+')} "
                f"| {each} |"
            )
    rows += [f"| {name} | failed: {error} | | | | | |" for name, error in errors.items()]
    return "\n".join(rows)


def mean_and_spread(values: list[float], sign: str = "") -> str:
    """The mean, and the sample's standard deviation if there is more than one value."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{sign}.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


@styled
def plot(models: Mapping[str, RunConfig], scores: Scores) -> matplotlib.figure.Figure:
    """Bits per byte against tokens, or against the cost of a token where all have as many."""
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    by_tokens = any(len(of_model) > 1 for of_model in scores.values())
    for name, of_model in scores.items():
        at = list(of_model) if by_tokens else [cost(models[name]).flops[0] / 1e6] * len(of_model)
        values = [list(by_seed.values()) for by_seed in of_model.values()]
        spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
        means = [statistics.mean(each) for each in values]
        axes.errorbar(at, means, spread, label=name, marker="o", capsize=3)
    axes.set_xscale("log" if by_tokens else "linear")
    axes.set_xlabel("tokens" if by_tokens else "MFLOP a token at 2,048")
    axes.set_ylabel("held-out bits per byte")
    axes.legend()
    return figure


def main() -> None:
    """The command line."""
    default = QualityConfig(tyro.MISSING)
    config = parse(default, sys.argv[1:], prog="python -m experiments.quality", description=__doc__)
    if config.workers > 1:  # JAX would give the first process three quarters of a GPU's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    else:
        run_command(lambda: keep_programs(DEFAULT))
    base = CONFIGS[config.config]
    models = run_command(lambda: models_of(config, base))
    todo = run_command(lambda: list(jobs(config, base)))
    cycles = run_command(
        lambda: {name: static_cycles(run) for name, run in models.items() if config.cycles}
    )
    scores, errors = run_command(lambda: run_study(todo, config.workers))
    output = config.output / f"{config.study}{config.label}.json"
    document = {
        "command": shlex.join(sys.argv[1:]),
        "scores": scores,
        "errors": errors,
        "cycles": cycles,
    }
    write_whole(location(output), json.dumps(document, indent=1) + "\n")
    text = table(models, scores, errors, cycles)
    write_whole(location(output.with_suffix(".md")), text + "\n")
    if scores:
        plot(models, scores).savefig(output.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
