"""Who takes part in a case: GQE by the platform's kernel, dense GQA by the best there is."""

from collections.abc import Mapping
from typing import Any

from kernels.benchmarks.speed import whole
from kernels.benchmarks.speed.cases import Case, Scale
from kernels.benchmarks.speed.experts import projection
from kernels.benchmarks.speed.op import attention
from kernels.benchmarks.speed.timing import Contender

SIDES = {"projection": ("selected", "all")}  # of the other levels: gqe, dense


def sides(case: Case) -> tuple[str, str]:
    """What is compared with what: the ratio is the second's time over the first's."""
    return SIDES.get(case.level, ("gqe", "dense"))


def contenders(
    case: Case, scale: Scale, platform: str, known: Mapping[tuple[str, str], Mapping[str, Any]]
) -> list[Contender]:
    """All contenders of a case.

    Args:
      known: the best options of the best kernels, by side and name, where the op has been timed; at
        the levels above it no others are tried.
    """
    if case.level in ("op", "blocks"):
        return attention(case, scale, platform)
    if case.level == "projection":
        return projection(case, scale)
    build = {"layer": whole.layer, "model": whole.model, "step": whole.step}
    return build[case.level](case, scale, platform, known)
