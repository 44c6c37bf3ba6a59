"""Scores trained runs: `python eval.py RUN_DIR` on held-out text, `--tasks` on the harness's."""

import sys

from gqe_jax.commands import parse, run_command
from gqe_jax.compilation_cache import keep_programs
from gqe_jax.compile_for.__main__ import FLAG, forwarded
from gqe_jax.compile_for.__main__ import main as compile_main
from gqe_jax.evaluation.run import EvalConfig, defaults_for, evaluate_run
from gqe_jax.evaluation.tasks import evaluate_tasks
from gqe_jax.processes import is_first


def main() -> None:
    """Runs the command line: a run's directory, whose values are the defaults, then fields."""
    arguments = sys.argv[1:]
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments[0] if named else ""
    if compiling := forwarded(name, arguments[named:]):
        if not named:
            sys.exit(f"error: name a configuration or a run's directory before {FLAG}")
        return compile_main(compiling, "eval")
    default = EvalConfig
    if named:
        default = run_command(lambda: defaults_for(name), all_processes=True)
    config = parse(
        default,
        arguments,
        prog="eval.py",
        description="Score a run's checkpoint on held-out text: loss, perplexity, bits per byte. "
        "With --tasks NAME,... score one run, or compare two, on tasks of the lm-evaluation-"
        "harness. RUN_DIR comes first; the defaults of the fields are then that run's. With "
        f"{FLAG} SLICE the step is compiled for TPUs and nothing is scored: see python -m "
        "gqe_jax.compile_for --help.",
    )
    score = evaluate_run if config.tasks is None else evaluate_tasks

    def start() -> object:
        keep_programs(config.compilation_cache)
        return score(config)

    result = run_command(start, all_processes=True)
    if is_first():
        print(result)


if __name__ == "__main__":
    main()
