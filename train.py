"""Trains a language model: `python train.py [CONFIG | RUN_DIR] [--field value ...]`."""

import dataclasses
import pathlib
import sys

from configs import CONFIGS
from gqe_jax.commands import parse, run_command
from gqe_jax.trainer import CONFIG_FILE, read_config, train


def main() -> None:
    """The command line: a configuration's name or a run, by default `tiny`, then any fields."""
    arguments = sys.argv[1:]
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments.pop(0) if named else "tiny"
    if name in CONFIGS:
        default = CONFIGS[name]
    elif (run_dir := pathlib.Path(name)).joinpath(CONFIG_FILE).is_file():
        default = run_command(lambda: dataclasses.replace(read_config(run_dir), run_dir=name))
    else:
        sys.exit(
            f"error: CONFIG is {name!r}; it must be one of {', '.join(CONFIGS)}, or the directory "
            f"of a run, with its {CONFIG_FILE}"
        )
    config = parse(
        default,
        arguments,
        prog=f"train.py {name}",
        description=f"Train a run, or go on with it. Configurations: {', '.join(CONFIGS)}, or "
        "a run's directory; tiny if none is named. Defaults below are those of the one named.",
    )
    run_command(lambda: train(config))


if __name__ == "__main__":
    main()
