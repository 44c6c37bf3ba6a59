"""Scores trained runs: `python eval.py RUN_DIR` on held-out text, `--tasks` on the harness's."""

import sys

from configs import CONFIGS
from gqe_jax.commands import parse, run_command, run_config
from gqe_jax.compile_for import CompileCommand, CompileOptions, compile_for
from gqe_jax.evaluation.run import EvalConfig, defaults_for, evaluate_run
from gqe_jax.evaluation.tasks import TasksConfig, evaluate_tasks
from gqe_jax.processes import is_first


def main() -> None:
    """The command line; `--tasks` or `--compile-for` among the arguments says which it is."""
    arguments = sys.argv[1:]
    flags = {argument.split("=")[0] for argument in arguments}
    if "--tasks" in flags:
        score_tasks(arguments)
    elif "--compile-for" in flags:
        compile_evaluation(arguments)
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


def compile_evaluation(arguments: list[str]) -> None:
    """A configuration's name or a run's directory, then fields: nothing is scored."""
    if arguments[0].startswith("-"):
        sys.exit("error: name a configuration or a run's directory before --compile-for")
    name, *arguments = arguments
    command = parse(
        CompileCommand(
            run_command(lambda: run_config(name, CONFIGS)), CompileOptions(compile_step="eval")
        ),
        arguments,
        prog=f"eval.py {name}",
        description="Compile the step that scores held-out text for a TPU slice.",
    )
    print(run_command(lambda: compile_for(command.run, command.proof)))


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
        "is scored on tasks instead: see --tasks '' --help. With --compile-for SLICE its step is "
        "compiled for TPUs that are not here, as train.py does.",
    )
    result = run_command(lambda: evaluate_run(config), all_processes=True)
    if is_first():
        print(result)


if __name__ == "__main__":
    main()
