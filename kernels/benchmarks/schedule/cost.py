"""Static cycles of a whole call: those of each region × how often it runs."""

import dataclasses
from collections.abc import Mapping, Sequence

from gqe_kernels.chips import chip
from gqe_kernels.cycles.bundles import Program, Region, ScheduleError
from gqe_kernels.cycles.counting import executions, kernel_name, split_over
from kernels.benchmarks.schedule.cases import ScheduledCall
from kernels.benchmarks.schedule.compiler import OutOfVmemError, build, schedule

# Units that the dump counts as loads and stores of registers that the compiler ran out of.
FILL, SPILL = "VLOAD:FILL", "VSTORE:SPILL"


@dataclasses.dataclass(frozen=True)
class RegionCost:
    """One region of one Pallas kernel.

    Attributes:
      bundles: cycles of one execution in which something is issued, regions inside left out.
      waits: cycles of one execution in which the core waits for a result.
      executions: times that it runs in the call, on one core; None where nothing says.
      busy: share of each unit's slots that are filled, in all cycles.
      spills, fills: registers stored to VMEM and loaded back, in one execution.
    """

    kernel: str
    region: str
    depth: int
    bundles: int
    waits: int
    executions: int | None
    busy: Mapping[str, float]
    spills: int
    fills: int

    @property
    def cycles(self) -> int:
        return (self.bundles + self.waits) * (self.executions or 0)


@dataclasses.dataclass(frozen=True)
class Cost:
    """The static schedule of one call.

    Attributes:
      cores: TensorCores that the compiler spread the grid over; all figures are those of one.
      others: lengths of the HLO instructions beside the Pallas kernels, which are not in `cycles`:
        how often their loops run is not known.
    """

    case: str
    chip: str
    options: Mapping[str, int | bool]
    regions: tuple[RegionCost, ...]
    others: Mapping[str, int]
    cores: int
    pairs: int
    macs: int

    @property
    def cycles(self) -> int:
        return sum(region.cycles for region in self.regions)

    @property
    def issued(self) -> int:
        """The cycles that are no waits: bundles of the final program, by how often they run."""
        return sum(region.bundles * (region.executions or 0) for region in self.regions)

    def kernels(self) -> dict[str, int]:
        """Cycles of each Pallas kernel, by name."""
        cycles = {}
        for region in self.regions:
            cycles[region.kernel] = cycles.get(region.kernel, 0) + region.cycles
        return cycles

    @property
    def cycles_per_pair(self) -> float:
        """Cycles for each query token × head × key token that attention must look at."""
        return self.cycles / self.pairs

    @property
    def mac_share(self) -> float:
        """Needed multiply-adds, of those that the matrix units could do in the cycles."""
        return self.macs / (self.cycles * self.cores * chip(self.chip).peak_macs)


def measure(case: str, chip_name: str, options: Mapping[str, int | bool]) -> Cost:
    """Compiles a case and counts its cycles.

    Args:
      case: "module:function" of a function that returns a `ScheduledCall`.

    Raises:
      CompileError: the compiler refused the kernel.
      ScheduleError: its dump cannot be read, or is not what the case says it is.
    """
    programs = schedule(case, chip_name, dict(options))
    return cost(programs, case, chip_name, options, build(case, chip_name, dict(options)))


def cycles_at(
    case: str,
    chip_name: str,
    lengths: Sequence[int],
    options: Mapping[str, int | bool],
    like: Sequence[tuple[Program, Region]] | None = None,
) -> dict[int, dict[str, int]] | None:
    """Cycles of each kernel at each length, from one compile for the longest; None: out of VMEM.

    The bundles of a region depend on the length only through addresses, so that block sizes can be
    compared by counting how often the same regions run.

    Args:
      case: as in `measure`; its function takes `length`.
      like: as in `schedule`.
    """
    try:
        programs = schedule(case, chip_name, {**options, "length": max(lengths)}, like=like)
    except OutOfVmemError:
        return None
    found = {}
    for length in lengths:
        at = {**options, "length": length}
        call = build(case, chip_name, at)
        found[length] = cost(programs, case, chip_name, at, call, same_grid=False).kernels()
    return found


def cost(
    programs: list[tuple[Program, Region]],
    name: str,
    chip_name: str,
    options: Mapping[str, int | bool],
    case: ScheduledCall,
    *,
    same_grid: bool = True,
) -> Cost:
    """The cost of scheduled programs that run as often as `case` says.

    Args:
      same_grid: the programs were compiled for the grid of `case`. If not, the grid's loop runs as
        often as `case` says, not as the dump does: to compare block sizes at several lengths.
    """
    regions, others, described, cores = [], {}, set(), 1
    for program, tree in programs:
        if program.opcode != "custom-call":
            others[f"{program.name} ({program.opcode})"] = len(program.bundles)
            continue
        kernel = kernel_name(program.name)
        if case.executions and kernel not in case.executions:
            raise ScheduleError(
                f"the compiled call has a kernel {kernel!r}, which the case does not count; it "
                f"counts {', '.join(map(repr, case.executions))}"
            )
        described.add(kernel)
        runs, split = case.executions.get(kernel), 1
        if runs and same_grid:
            steps = runs["grid"] // runs.get("calls", 1)
            split = split_over(program, tree, steps, chip(chip_name).cores)
        cores = max(cores, split)
        regions += _count(kernel, program, tree, runs, split, same_grid)
    missing = set(case.executions) - described
    if missing:
        raise ScheduleError(f"the compiled call has no kernel named {', '.join(sorted(missing))}")
    return Cost(name, chip_name, options, tuple(regions), others, cores, case.pairs, case.macs)


def _count(kernel, program, tree, runs, split, same_grid) -> list[RegionCost]:
    labels = [region.label for region in tree.walk() if region.label is not None]
    for label in set(runs or ()) - {"grid", "calls"}:
        # A body that every grid step runs is under no branch: the compiler joins it to the step.
        joined = labels.count(label) == 0 and runs[label] == runs["grid"]
        if labels.count(label) != 1 and not joined:
            raise ScheduleError(
                f"{program.name} has {labels.count(label)} regions labelled {label!r}; the case "
                f"counts on one. Its labels are {labels}"
            )
    costs = []

    def visit(region: Region, parent: int | None, depth: int) -> None:
        times = executions(program, region, parent, runs, split, same_grid, depth)
        own = region.own()
        units = {
            unit: sum(program.bundles[i].slots[u] for i in own)
            for u, unit in enumerate(program.units)
        }
        costs.append(
            RegionCost(
                kernel=kernel,
                region=region.label or _PLAIN_NAMES.get((region.kind, depth), region.kind),
                depth=depth,
                bundles=sum(program.bundles[i].issued for i in own),
                waits=sum(not program.bundles[i].issued for i in own),
                executions=times,
                busy={
                    unit: units[unit] / max(1, len(own) * slots)
                    for unit, slots in zip(program.units, program.capacity, strict=True)
                    if unit not in (FILL, SPILL)
                },
                spills=units[SPILL],
                fills=units[FILL],
            )
        )
        for child in region.children:
            visit(child, times, depth + 1)

    visit(tree, (runs or {}).get("calls", 1), 0)
    return costs


_PLAIN_NAMES = {("root", 0): "call", ("loop", 1): "grid", ("guard", 2): "grid step"}
