"""Trains a language model: `python train.py [CONFIG] [--field value ...]`."""

import sys

from configs import CONFIGS
from gqe_jax.commands import parse, run_command
from gqe_jax.trainer import train


def main() -> None:
    """The command line: a configuration's name, by default `tiny`, then any of its fields."""
    arguments = sys.argv[1:]
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments.pop(0) if named else "tiny"
    if name not in CONFIGS:
        sys.exit(f"error: CONFIG is {name!r}; it must be one of {', '.join(CONFIGS)}")
    config = parse(
        CONFIGS[name],
        arguments,
        prog=f"train.py {name}",
        description=f"Train a run, or go on with it. Configurations: {', '.join(CONFIGS)}; tiny "
        "if none is named. Defaults below are those of the one named.",
    )
    run_command(lambda: train(config), all_processes=True)


if __name__ == "__main__":
    main()
