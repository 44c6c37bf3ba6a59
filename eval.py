"""Scores a trained run on held-out text: `python eval.py RUN_DIR [--field value ...]`."""

import sys

from gqe_jax.commands import parse, run_command
from gqe_jax.evaluation.run import EvalConfig, defaults_for, evaluate_run
from gqe_jax.processes import is_first


def main() -> None:
    """The command line: a run's directory, then fields; the run gives their defaults."""
    arguments = sys.argv[1:]
    default = EvalConfig
    if arguments and not arguments[0].startswith("-"):
        default = run_command(lambda: defaults_for(arguments[0]), all_processes=True)
    config = parse(
        default,
        arguments,
        prog="eval.py",
        description="Score a run's checkpoint: held-out loss, perplexity, bits per byte. RUN_DIR "
        "comes first; the defaults of the fields are then that run's.",
    )
    result = run_command(lambda: evaluate_run(config), all_processes=True)
    if is_first():
        print(result)


if __name__ == "__main__":
    main()
