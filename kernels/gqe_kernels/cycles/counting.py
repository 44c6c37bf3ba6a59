"""How often each region of a scheduled kernel runs, and the cycles that the kernel takes so."""

import itertools
import re
from collections.abc import Mapping

from gqe_kernels.cycles.bundles import Program, Region, ScheduleError

# The Pallas pipeline starts copies before the first step and drains them after the last one.
PIPELINE_STEPS = 2
# The pipeline has small conditional regions of its own.
_NEGLIGIBLE = 0.05
# Functions under `pl.when` that have no matrix products; all others have: `start`, `add` and
# `finish` of this project's kernels, `init` and `end` of splash attention's.
_WITHOUT_PRODUCTS = re.compile(r"(start|add|finish)(_.*)?|init|end")


def kernel_name(instruction: str) -> str:
    """The `name` of a `pallas_call`, from that of its HLO instruction.

    XLA numbers instructions, and JAX writes a transformation around a name: transpose(jvp(name)).
    """
    name = re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", instruction)
    transformed = re.fullmatch(r"(?:transpose_)?jvp_(.+?)_+", name)
    return transformed[1] if transformed else name


def call_cycles(
    program: Program, tree: Region, runs: Mapping[str, int] | None, cores: int
) -> float:
    """Static cycles of one call, on one core.

    Args:
      runs: executions by region, as `scheduled_runs` returns them; None: nothing is known, and
        the kernel is counted only if the conditional regions of its grid's step are negligible.
      cores: TensorCores that the compiler may have spread the grid over.

    Raises:
      ScheduleError: how often a region runs is not known.
    """
    launches = (runs or {}).get("calls", 1)
    split = 1
    if runs:
        split = split_over(program, tree, runs["grid"] // launches, cores)
        label_by_order(program, tree, runs, split)
    else:
        guards = conditional(tree, pipelined=True)
        unknown = sum(guard.stop - guard.start for guard in guards)
        if unknown > _NEGLIGIBLE * len(program.bundles):
            raise ScheduleError(
                f"{program.name}: how often its {len(guards)} conditional regions run is not known"
            )
    total = 0

    def visit(region: Region, parent: int | None, depth: int) -> None:
        nonlocal total
        times = executions(program, region, parent, runs, split, True, depth)
        if times is None:
            raise ScheduleError(
                f"{program.name}: how often the loop {region.number} runs is unknown"
            )
        total += len(region.own()) * times
        for child in region.children:
            visit(child, times, depth + 1)

    visit(tree, launches, 0)
    return total / launches


def executions(
    program: Program,
    region: Region,
    parent: int | None,
    runs: Mapping[str, int] | None,
    split: int,
    same_grid: bool,
    depth: int,
) -> int | None:
    """How often a region runs: as `runs` says, else as the dump does.

    A guard that nothing is said of counts as often as what is around it: at most too much.

    Args:
      parent: how often the region around it runs.
      split: cores that share the grid.
      same_grid: the program was compiled for the grid of `runs`.
      depth: regions around it.

    Raises:
      ScheduleError: the dump does not agree with `runs`, or neither says it.
    """
    if region.kind == "root" or parent is None:
        return parent
    if region.kind == "guard":
        return -(-runs[region.label] // split) if runs and region.label in runs else parent
    if depth == 1 and runs and not same_grid:
        return runs["grid"] + parent * PIPELINE_STEPS
    if region.label is not None and runs and region.label in runs:
        times = -(-runs[region.label] // split)
        if region.trips is not None and same_grid and times != parent * region.trips:
            raise ScheduleError(
                f"{program.name}: the loop {region.label!r} runs {parent} × {region.trips} times "
                f"by the dump, but {times} times by the case"
            )
        return times
    if region.trips is not None:
        return parent * region.trips
    if runs is None:
        return None
    raise ScheduleError(
        f"{program.name}: the loop at bundle {region.start:#x} ({region.label or 'no label'}) has "
        "no constant number of iterations; the case must say how often it runs"
    )


def split_over(program: Program, tree: Region, steps: int, cores: int) -> int:
    """Over how many cores the compiler spread the grid, seen from its loop's iterations.

    Raises:
      ScheduleError: the loop does not fit a grid of `steps`.
    """
    loops = [region for region in tree.children if region.kind == "loop"]
    if not loops and steps == 1:
        return 1
    trips = loops[0].trips if len(loops) == 1 else None
    for split in {1, cores}:
        if trips is not None and 0 <= trips - -(-steps // split) <= PIPELINE_STEPS:
            return split
    raise ScheduleError(
        f"{program.name}: the dump's outermost loops run {[r.trips for r in loops]} times; the "
        f"case says that the grid has {steps} steps"
    )


def conditional(tree: Region, *, pipelined: bool) -> list[Region]:
    """The guards that a kernel's author wrote: those of the grid's step.

    Args:
      pipelined: the grid's loop has a guard around all of a step, and others around copies.
    """
    loops = [child for child in tree.children if child.kind == "loop"]
    around = loops[0] if len(loops) == 1 else tree
    guards = [child for child in around.children if child.kind == "guard"]
    if not pipelined or not guards:
        return guards
    step = max(guards, key=lambda guard: guard.stop - guard.start)
    return [child for child in step.children if child.kind == "guard"]


def label_by_order(program: Program, tree: Region, runs: Mapping[str, int], split: int = 1) -> None:
    """Names the guards of a kernel, which stand in the order of `runs`.

    The compiler joins a body to the step that always runs it, and may drop one that never runs, so
    names may have no guard; that products stand in some bodies and not in others tells which.

    Raises:
      ScheduleError: the guards fit the names in no way, or in several.
    """
    names = [name for name in runs if name not in ("grid", "calls")]
    if not names:
        return
    steps = runs["grid"] // runs.get("calls", 1)
    trips = max((each.trips or 0 for each in tree.children if each.kind == "loop"), default=0)
    guards = _largest(conditional(tree, pipelined=trips * split > steps), len(names), program)
    mxu = program.units.index("MXU")

    def multiplies(guard: Region) -> bool:
        return any(program.bundles[i].slots[mxu] for i in range(guard.start, guard.stop))

    may_lack = {name for name in names if runs[name] in (0, runs["grid"])}
    fitting = [
        chosen
        for chosen in itertools.combinations(names, len(guards))
        if set(names) - set(chosen) <= may_lack
        and all(
            multiplies(guard) == (_WITHOUT_PRODUCTS.fullmatch(name) is None)
            for guard, name in zip(guards, chosen, strict=True)
        )
    ]
    counts = {tuple(runs[name] for name in chosen) for chosen in fitting}
    if len(counts) != 1:
        raise ScheduleError(
            f"{program.name} has {len(guards)} conditional regions, which fit {', '.join(names)} "
            f"in {len(fitting)} ways; they must fit in one"
        )
    for guard, name in zip(guards, fitting[0], strict=True):
        guard.label = name


def _largest(guards: list[Region], most: int, program: Program) -> list[Region]:
    """At most so many guards, in program order, if the others are negligible: the pipeline's own.

    Where no guard is around all of a step, those around its copies stand beside the author's.
    """
    size = lambda guard: guard.stop - guard.start  # noqa: E731
    ordered = sorted(guards, key=size, reverse=True)
    others = sum(map(size, ordered[most:]))
    is_clear = len(ordered) > most and size(ordered[most]) < size(ordered[most - 1])
    if not is_clear or others > _NEGLIGIBLE * len(program.bundles):
        return guards
    return [guard for guard in guards if guard in ordered[:most]]
