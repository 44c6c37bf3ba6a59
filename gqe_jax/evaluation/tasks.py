"""Scores runs on tasks of EleutherAI's lm-evaluation-harness, as `eval.py --tasks` does."""

import dataclasses
import importlib.util
import json
import logging
import math
import statistics
from typing import Any

import jax

from gqe_jax.config import ConfigError
from gqe_jax.data import DataError
from gqe_jax.evaluation.run import EvalConfig
from gqe_jax.runs import restore_run
from gqe_jax.storage import location, write_whole

_BATCH_SIZE = 32

# A task's primary metric is the first of these that it has. `acc_norm` divides an answer's
# log-likelihood by its length in characters; HellaSwag, PIQA and ARC-Easy have it.
PRIMARY = ("acc_norm", "acc", "exact_match")


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference between two runs on one task, over the same examples."""

    task: str
    metric: str
    first: float
    second: float
    stderr: float
    """Standard error of `second - first`: the per-example differences' deviation over √n."""
    p_value: float
    """Two-sided p-value of a paired t-test; for the mean over tasks, of a z-test."""


def evaluate_tasks(config: EvalConfig) -> str:
    """Evaluates the runs, writes the JSON file and returns the tables as text.

    Raises:
      ConfigError: the extra `eval` is not installed, or a task is unknown.
      DataError: a task's data cannot be loaded.
      CheckpointError: a run has no such checkpoint.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "tasks: the lm-evaluation-harness is not installed; pip install -e '.[eval]'"
        )
    manager, tasks = load_tasks((config.tasks or "").split(","), config.include_path)
    results = [_evaluate_run(config, run_dir, manager, tasks) for run_dir in config.run_dirs]
    differences = compare(*results) if len(results) == 2 else None
    if differences is not None:
        report = {
            "runs": dict(zip(config.run_dirs, map(_without_samples, results), strict=True)),
            "differences": [dataclasses.asdict(difference) for difference in differences],
        }
    else:
        report = _without_samples(results[0])
    output = config.output or location(config.run_dirs[0]) / "evaluation.json"
    if jax.process_index() == 0:
        write_whole(output, json.dumps(report, indent=1, default=str) + "\n")
    pages = [
        f"{run_dir}\n{_table(result)}"
        for run_dir, result in zip(config.run_dirs, results, strict=True)
    ]
    if differences is not None:
        first, second = config.run_dirs
        pages.append(_table_of_differences(first, second, differences))
    return "\n".join([*pages, f"written to {output}"])


def load_tasks(names: list[str], include_path: str | None = None) -> tuple[Any, list[Any]]:
    """The harness's task manager, and the loaded tasks and groups of these names.

    Raises:
      ConfigError: a name is unknown.
      DataError: a task's data cannot be loaded; says how to provide it.
    """
    import huggingface_hub  # sets its logger's level when it is imported
    from lm_eval.tasks import TaskManager

    for library in (huggingface_hub.__name__, "lm_eval", "datasets", "httpx"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if include_path is not None:
        if not location(include_path).is_dir():
            raise ConfigError(
                f"include_path is {include_path!r}; it must be a directory of YAML files"
            )
        include_path = str(location(include_path))
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)  # slow: reads thousands of files
    for name in names:
        if name not in manager.all_tasks:
            raise ConfigError(
                f"tasks has {name!r}, which is not a task, group or tag of the harness; `lm-eval "
                "ls tasks` lists them, and --include-path adds your own"
            )
    loaded, missing = [], []
    for name in names:
        try:
            found = manager.load([name])
        except Exception as error:  # from any library that the harness uses
            missing.append((name, error))
            continue
        group = found["groups"].get(name)
        loaded.extend(found["tasks"].values() if group is None else [group])
    if missing:
        raise DataError(_where_data_goes(missing, manager)) from missing[0][1]
    return manager, loaded


def _where_data_goes(missing: list[tuple[str, Exception]], manager: Any) -> str:
    lines, commands = [], []
    for name, error in missing:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        lines.append(f"task {name}: its data cannot be loaded: {reason}")
        fields = manager.task_index[name].cfg or {}
        arguments = [fields.get("dataset_path"), fields.get("dataset_name")]
        commands.append(f"load_dataset({', '.join(repr(x) for x in arguments if x)})")
    return (
        "\n".join(lines) + "\nOn a machine with a network, run\n"
        f'    python -c "from datasets import load_dataset; {"; ".join(commands)}"\n'
        "and copy its ~/.cache/huggingface (or $HF_HOME) to the same place here, then set "
        "HF_DATASETS_OFFLINE=1. Or write a task file with dataset_path: json and dataset_kwargs: "
        "{data_files: {test: FILE}}, and give its directory as --include-path"
    )


def _evaluate_run(
    config: EvalConfig, run_dir: str, manager: Any, tasks: list[Any]
) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    from gqe_jax.evaluation.harness import HarnessModel

    run = restore_run(
        run_dir,
        step=config.step,
        mesh=config.mesh,
        tokenizer=config.tokenizer,
        end_of_document=config.end_of_document,
    )
    max_length = config.max_length or run.config.sequence_length
    batch_size = config.batch_size or _BATCH_SIZE
    model = HarnessModel(run, batch_size=batch_size, max_length=max_length)
    results = simple_evaluate(
        model,
        tasks=list(tasks),
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        batch_size=batch_size,
        task_manager=manager,
    )
    results["config"] |= {"run_dir": run_dir, "step": run.step, "max_length": max_length}
    results["mean"] = mean_score(results)
    return results


def primary_metric(scores: dict[str, Any]) -> str | None:
    """The key of a task's primary metric, the first of `PRIMARY` that it has."""
    for metric in PRIMARY:
        for key in scores:
            if key.split(",")[0] == metric:
                return key
    return None


def mean_score(results: dict[str, Any]) -> float | None:
    """The mean of the tasks' primary metrics; None if no task has one."""
    tasks = (results["results"][name] for name in results["samples"])
    values = [scores[key] for scores in tasks if (key := primary_metric(scores))]
    return statistics.mean(values) if values else None


def compare(first: dict[str, Any], second: dict[str, Any]) -> list[Difference]:
    """Paired differences in each task's primary metric, and in the mean over tasks."""
    from scipy import stats  # comes with the harness

    differences = []
    for task, samples in first["samples"].items():
        key = primary_metric(first["results"][task])
        if key is None:
            continue
        metric, filter_name = key.split(",")
        a, b = (
            [float(s[metric]) for s in chosen if s["filter"] == filter_name]
            for chosen in (samples, second["samples"][task])
        )
        deltas = [y - x for x, y in zip(a, b, strict=True)]
        spread = statistics.stdev(deltas) if len(deltas) > 1 else math.nan
        if spread == 0:
            p_value = 1.0 if deltas[0] == 0 else 0.0
        else:
            p_value = float(stats.ttest_rel(b, a).pvalue) if len(deltas) > 1 else math.nan
        stderr = spread / math.sqrt(len(deltas))
        differences.append(
            Difference(task, metric, statistics.mean(a), statistics.mean(b), stderr, p_value)
        )
    if len(differences) > 1:
        before = statistics.mean(d.first for d in differences)
        after = statistics.mean(d.second for d in differences)
        stderr = math.sqrt(sum(d.stderr**2 for d in differences)) / len(differences)
        z = (after - before) / stderr if stderr else math.inf
        p_value = math.erfc(abs(z) / math.sqrt(2)) if after != before else 1.0
        differences.append(Difference("mean", "", before, after, stderr, p_value))
    return differences


def _without_samples(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if name != "samples"}


def _table(results: dict[str, Any]) -> str:
    from lm_eval.utils import make_table

    table = make_table(results)
    if results["mean"] is None:
        return table
    names = {task: primary_metric(results["results"][task]) for task in results["samples"]}
    parts = ", ".join(f"{task} ({key.split(',')[0]})" for task, key in names.items() if key)
    return f"{table}\nmean of {parts}: {100 * results['mean']:.2f} %"


def _table_of_differences(first: str, second: str, differences: list[Difference]) -> str:
    lines = [
        f"difference: {second} minus {first}, in points; stderr of the paired differences",
        "| task | metric | first | second | difference | stderr | p |",
        "|---|---|---|---|---|---|---|",
    ]
    for d in differences:
        lines.append(
            f"| {d.task} | {d.metric} | {100 * d.first:.2f} | {100 * d.second:.2f} | "
            f"{100 * (d.second - d.first):+.2f} | {100 * d.stderr:.2f} | {d.p_value:.3g} |"
        )
    return "\n".join(lines)
