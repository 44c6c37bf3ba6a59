"""Trains a language model: `python train.py [CONFIG | RUN_DIR] [--field value ...]`."""

import dataclasses
import pathlib
import sys
from typing import Annotated

import tyro

from configs import CONFIGS
from gqe_jax.commands import parse, run_command
from gqe_jax.compile_for import CompileOptions, compile_for
from gqe_jax.config import RunConfig
from gqe_jax.trainer import CONFIG_FILE, read_config, train


@dataclasses.dataclass(frozen=True)
class _Command:
    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    proof: Annotated[CompileOptions, tyro.conf.arg(name="")]


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
    command = parse(
        _Command(default, CompileOptions()),
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
