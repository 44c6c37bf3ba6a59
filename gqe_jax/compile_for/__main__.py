"""Compiles a run's step for TPUs: `python -m gqe_jax.compile_for CONFIG SLICE [options]`."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from gqe_jax.commands import parse, run_command
from gqe_jax.compile_for import CompileOptions, compile_for
from gqe_jax.compile_for.program import Step
from gqe_jax.config import RunConfig
from gqe_jax.runs import find_config, named_configs

FLAG = "--compile-for"


@dataclasses.dataclass(frozen=True)
class CompileCommand:
    """The command line."""

    config: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CONFIG")]]
    """A configuration's name or a run's directory, which gives the defaults of the fields."""
    slice: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SLICE")]]
    """A TPU slice, such as v5p:4x4x8."""
    options: Annotated[CompileOptions, tyro.conf.arg(name="")]
    run: Annotated[RunConfig, tyro.conf.arg(name="")]


def read_command(arguments: Sequence[str], step: Step = "train") -> CompileCommand:
    """Parses the command line; `step` is the default of `--compile-step`."""
    named = bool(arguments) and not arguments[0].startswith("-")
    run = run_command(lambda: find_config(arguments[0])) if named else RunConfig()
    return parse(
        CompileCommand(tyro.MISSING, tyro.MISSING, CompileOptions(compile_step=step), run),
        arguments,
        prog="python -m gqe_jax.compile_for",
        description="Compile a run's step for a TPU slice on this machine, say whether it fits and "
        f"what it costs, and run nothing. Configurations: {', '.join(named_configs())}.",
    )


def main(arguments: Sequence[str], step: Step = "train") -> None:
    """Runs the command line; arguments as of `read_command`."""
    command = read_command(arguments, step)
    print(run_command(lambda: compile_for(command.run, command.slice, command.options)))


def forwarded(name: str, arguments: Sequence[str]) -> list[str]:
    """Returns this command's arguments for `train.py NAME ... --compile-for SLICE ...`.

    Args:
      name: the configuration's.
      arguments: the script's, after the name.

    Returns:
      The arguments; none where the script's have no `--compile-for`.
    """
    at = next((i for i, each in enumerate(arguments) if each.split("=")[0] == FLAG), None)
    if at is None:
        return []
    _, separator, value = arguments[at].partition("=")
    behind = arguments[at + 1 :]
    chosen, rest = ([value], behind) if separator else (behind[:1], behind[1:])
    return [name, *chosen, *arguments[:at], *rest]


if __name__ == "__main__":
    main(sys.argv[1:])
