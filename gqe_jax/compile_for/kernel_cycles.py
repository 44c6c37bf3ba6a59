"""Static cycles of the Pallas kernels of a program compiled in this process.

libtpu writes down the schedule of what it compiles, if flags say so when it is loaded. So they are
set before the first topology is made, and each compile's dump is read after it.
"""

import atexit
import collections
import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

from gqe_jax.compile_for.cycles import Pass, op_name, part_of, pass_of
from gqe_jax.compile_for.hlo import Instruction, Program
from gqe_kernels.chips import Chip
from gqe_kernels.cycles import bundles
from gqe_kernels.cycles.bundles import ScheduleError, read_kernel, regions
from gqe_kernels.cycles.counting import call_cycles, kernel_name
from gqe_kernels.cycles.runs import scheduled_runs

# Executions by region of the kernel of a name, from its schedule; None: nothing is known of it.
type Runs = Callable[[str, bundles.Program], Mapping[str, int] | None]
_ARGUMENTS = "LIBTPU_INIT_ARGS"


@dataclasses.dataclass(frozen=True)
class KernelCycles:
    """One Pallas call of a program, on one core.

    Attributes:
      part, pass_: the part of the model that calls it, and the pass.
      calls: how often it runs.
      cycles: of one call; None where they cannot be counted.
      reason: why not.
    """

    name: str
    part: str
    pass_: Pass
    calls: int
    cycles: float | None
    reason: str = ""

    @property
    def total(self) -> float:
        return (self.cycles or 0.0) * self.calls


@functools.cache
def dump_directory() -> pathlib.Path | None:
    """Where libtpu dumps the schedules of this process's kernels, if it is loaded in `dumping`.

    Returns:
      A folder that is deleted when the process ends; None if at the first call libtpu is loaded
      already, or LIBTPU_INIT_ARGS names another folder.
    """
    if "xla_jf_dump" in os.environ.get(_ARGUMENTS, "") or _is_loaded():
        return None
    directory = pathlib.Path(tempfile.mkdtemp(prefix="gqe-jax-schedules-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


@contextlib.contextmanager
def dumping() -> Iterator[None]:
    """The environment in which libtpu, if it is loaded here, dumps schedules."""
    directory, given = dump_directory(), os.environ.get(_ARGUMENTS)
    if directory is None:
        yield
        return
    flags = [
        f"--xla_jf_dump_to={directory}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_emit_annotations=true",
        "--xla_jf_dump_llo_pass_label_regex=^packed-bundles-post-ra$|^pre-delay",
        # Other categories take time to write, though their files match no label.
        "--xla_jf_dump_category_filter=utilization,codegen",
    ]
    os.environ[_ARGUMENTS] = " ".join([given or "", *flags]).strip()
    try:
        yield
    finally:
        if given is None:
            del os.environ[_ARGUMENTS]
        else:
            os.environ[_ARGUMENTS] = given


def _is_loaded() -> bool:
    maps = pathlib.Path("/proc/self/maps")
    return maps.exists() and "libtpu" in maps.read_text()


def clear_dump() -> None:
    """Deletes the dump of earlier compiles, whose instructions may have the same names."""
    if (directory := dump_directory()) is not None:
        for path in directory.glob("*.txt"):
            path.unlink()


def kernel_cycles(program: Program, chip: Chip, runs: Runs = scheduled_runs) -> list[KernelCycles]:
    """The Pallas calls of the program that was compiled last, in the order of its text.

    Args:
      runs: how often the regions of a kernel run; by default, those of this project's kernels.
    """
    found = [
        (computation, x, times)
        for computation, times in program.runs()
        for x in computation.values()
        if x.text("custom_call_target") == '"tpu_custom_call"'
    ]
    alike = same_kernels([x for _, x, _ in found])
    calls = []
    for computation, x, times in found:
        name = op_name(program, computation, x)
        call = KernelCycles(kernel_name(x.name), part_of(name), pass_of(name), times, None)
        try:
            counted = _count(x.name, alike[x.name], chip, runs)
            calls.append(dataclasses.replace(call, cycles=counted))
        except ScheduleError as error:
            calls.append(dataclasses.replace(call, reason=str(error)))
    return calls


def same_kernels(calls: Sequence[Instruction]) -> dict[str, list[str]]:
    """The calls of the same kernel as each call: libtpu compiles them once, and dumps one.

    Those with the same code come first. Code has the places in the source that it was traced from,
    so a call that was traced again, as under `jax.checkpoint`, has other code; then the kernel's
    name, what it returns, and the number of operands tell.
    """

    def code(x: Instruction) -> str:
        body = re.search(r'"body":"([^"]*)"', x.attributes)
        return body[1] if body else x.name

    def shape(x: Instruction) -> tuple:
        results = tuple((array.dtype, array.shape) for array in x.arrays)
        return kernel_name(x.name), results, len(x.operands)

    alike: dict[Hashable, list[str]] = collections.defaultdict(list)
    keys = {x.name: (code(x), shape(x)) for x in calls}
    for name, each in keys.items():
        for key in each:
            alike[key].append(name)
    return {name: [*alike[first], *alike[then]] for name, (first, then) in keys.items()}


def _count(name: str, alike: list[str], chip: Chip, runs: Runs) -> float:
    """Cycles of one call of the kernel that the HLO instruction `name` calls.

    Args:
      alike: the instructions that call the same kernel.
    """
    directory = dump_directory()
    if directory is None:
        raise ScheduleError(
            f"{name}: {_ARGUMENTS} names a dump, or libtpu was loaded before it was set"
        )
    schedule = read_kernel(directory, [name, *alike])
    executions = runs(kernel_name(name), schedule)
    return call_cycles(schedule, regions(schedule, chip.delay_slots), executions, chip.cores)
