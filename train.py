"""Trains a language model: `python train.py [CONFIG | RUN_DIR] [--field value ...]`."""

import sys

from configs import CONFIGS
from gqe_jax.commands import parse, run_command, run_config
from gqe_jax.compile_for import CompileCommand, CompileOptions, compile_for
from gqe_jax.training.loop import train


def main() -> None:
    """The command line: a configuration's name or a run, by default `tiny`, then any fields."""
    arguments = sys.argv[1:]
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments.pop(0) if named else "tiny"
    default = run_command(lambda: run_config(name, CONFIGS))
    command = parse(
        CompileCommand(default, CompileOptions()),
        arguments,
        prog=f"train.py {name}",
        description=f"Train a run, or go on with it. Configurations: {', '.join(CONFIGS)}, or "
        "a run's directory; tiny if none is named. Defaults below are those of the one named.",
    )
    if command.proof.compile_for is not None:
        print(run_command(lambda: compile_for(command.run, command.proof)))
    else:
        run_command(lambda: train(command.run), all_processes=True)


if __name__ == "__main__":
    main()
