"""Trains a language model: `python train.py [CONFIG | RUN_DIR] [--field value ...]`."""

import sys

from gqe_jax.commands import parse, run_command
from gqe_jax.compilation_cache import keep_programs
from gqe_jax.compile_for.__main__ import forwarded
from gqe_jax.compile_for.__main__ import main as compile_main
from gqe_jax.processes import process_began
from gqe_jax.runs import find_config, named_configs
from gqe_jax.training.loop import train


def main() -> None:
    """Runs the command line: a configuration's name or a run, by default `tiny`, then fields."""
    arguments = sys.argv[1:]
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments.pop(0) if named else "tiny"
    if compiling := forwarded(name, arguments):
        return compile_main(compiling, "train")
    config = parse(
        run_command(lambda: find_config(name)),
        arguments,
        prog=f"train.py {name}",
        description=f"Train a run, or resume it. Configurations: {', '.join(named_configs())}, or "
        "a run's directory; tiny if none is named. The defaults below are those of the one named. "
        "With --compile-for SLICE the step is compiled for TPUs and nothing is run: see python -m "
        "gqe_jax.compile_for --help.",
    )

    def start() -> None:
        keep_programs(config.compilation_cache)
        train(config, began=process_began())

    run_command(start, all_processes=True)


if __name__ == "__main__":
    main()
