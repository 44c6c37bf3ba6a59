"""What the benchmarks' command lines share."""

import shlex
import sys
from collections.abc import Sequence

import tyro


class OptionError(Exception):
    """An option has a value that cannot work."""


def parse[Options](
    kind: type[Options], arguments: Sequence[str] | None, *, prog: str, description: str
) -> Options:
    """A dataclass from the command line: every field is a flag.

    Exits with status 2 and a line on the error stream if a value cannot work.
    """
    try:
        return tyro.cli(kind, args=arguments, prog=f"python -m {prog}", description=description)
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def typed(prog: str, arguments: Sequence[str] | None) -> str:
    """The command as it was typed, to be kept with its results."""
    return shlex.join(["python", "-m", prog, *(sys.argv[1:] if arguments is None else arguments)])
