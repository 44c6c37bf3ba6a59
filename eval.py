"""Scores trained runs: `python eval.py RUN_DIR` on held-out text, `--tasks` on the harness's."""

import sys

from gqe_jax.commands import parse, run_command
from gqe_jax.evaluation.run import EvalConfig, defaults_for, evaluate_run
from gqe_jax.evaluation.tasks import TasksConfig, evaluate_tasks
from gqe_jax.processes import is_first


def main() -> None:
    """The command line; `--tasks` among the arguments says that it is the harness's."""
    arguments = sys.argv[1:]
    if any(argument.split("=")[0] == "--tasks" for argument in arguments):
        score_tasks(arguments)
    else:
        score_held_out(arguments)


def score_tasks(arguments: list[str]) -> None:
    """One run, or two, on tasks of the lm-evaluation-harness."""
    config = parse(
        TasksConfig,
        arguments,
        prog="eval.py",
        description="Score a run, or compare two, on tasks of the lm-evaluation-harness.",
    )
    table = run_command(lambda: evaluate_tasks(config), all_processes=True)
    if is_first():
        print(table)


def score_held_out(arguments: list[str]) -> None:
    """A run's directory, then fields; the run gives their defaults."""
    default = EvalConfig
    if arguments and not arguments[0].startswith("-"):
        default = run_command(lambda: defaults_for(arguments[0]), all_processes=True)
    config = parse(
        default,
        arguments,
        prog="eval.py",
        description="Score a run's checkpoint: held-out loss, perplexity, bits per byte. RUN_DIR "
        "comes first; the defaults of the fields are then that run's. With --tasks NAME,... it "
        "is scored on tasks instead: see --tasks '' --help.",
    )
    result = run_command(lambda: evaluate_run(config), all_processes=True)
    if is_first():
        print(result)


if __name__ == "__main__":
    main()
