"""The command as it was typed."""

import shlex
import sys
from collections.abc import Sequence


def typed(prog: str, arguments: Sequence[str] | None) -> str:
    """The command line, to be kept with its results; None: that of this process."""
    return shlex.join(["python", "-m", prog, *(sys.argv[1:] if arguments is None else arguments)])
