"""Parses libtpu's dump of a schedule into bundles, and the bundles into nested regions.

A TensorCore issues one bundle of instructions a cycle. The dump lists the cycles in program order
with their branches; every branch of a Pallas kernel either closes a loop or jumps over a body, so
the program is a tree: a region is a run of cycles, minus the regions inside it.

Read is the schedule after register allocation, in which a cycle that only waits for a result is an
empty bundle. The last pass takes most of those out, since the hardware waits by itself; what it
leaves, `final_bundles`, is what is issued, not how long it takes.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +([A-Z]{2})?: *(>*) *(?:> *)*\{", re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_BRANCH = re.compile(
    r"sbr\.rel (?:\(!?%p\w+\) )?target bundleno = (\d+) \(0x[0-9a-f]+\), region = (\d+)"
)
_SCOPE = re.compile(r"TraceMeStart\(([^)]*)\)")
_LOOP_TEST = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test \*/")
_WINDOW = re.compile(
    r"allocation for operator (input|output) (\d+)\. The window shape is \w+\[([\d,]*)\], while "
    r"the full shape is \w+\[([\d,]*)\]"
)
_ENTRY = re.compile(r"entry bundle: %(\S+) = ([\w-]+)\(")


type Shape = tuple[int, ...]


class ScheduleError(RuntimeError):
    """A dump is not of the form that this reader knows: no number can be trusted."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What one cycle issues.

    Attributes:
      label: what the assembler calls the place: "LB" a loop body, "PF" the end of a body that may
        be jumped over.
      depth: loops around it; 0 also where the dump does not say.
      issued: whether there is an instruction; if not, the core waits.
      target: the index of the bundle that it may jump to.
      region: libtpu's number of the region jumped to.
      scope: the `jax.named_scope` that opens here, in a dump with traces.
      trips: the constant that a loop's counter is compared with here.
      slots: instructions issued to each unit, in the order of `Program.units`.
    """

    label: str | None
    depth: int
    issued: bool
    target: int | None
    region: int | None
    scope: str | None
    trips: int | None
    slots: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """One scheduled HLO instruction.

    Attributes:
      name: the instruction's name: of a Pallas kernel, the `name` of its `pallas_call`.
      opcode: its HLO opcode; a Pallas kernel is a "custom-call".
      units: the units that the utilisation is given for.
      capacity: slots of each unit in one bundle.
      inputs, outputs: of the operands and results of a Pallas kernel that its grid cuts into
        windows, by number: the shapes of the window and of the whole.
    """

    name: str
    opcode: str
    units: tuple[str, ...]
    capacity: tuple[int, ...]
    bundles: tuple[Bundle, ...]
    inputs: Mapping[int, tuple[Shape, Shape]] = dataclasses.field(default_factory=dict)
    outputs: Mapping[int, tuple[Shape, Shape]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Region:
    """A node of the loop nest; it owns the bundles from start to stop that no child owns.

    Attributes:
      kind: "root", "loop" (runs again and again) or "guard" (may be jumped over).
      number: libtpu's number of the region branched to; the same in a compile with traces.
      trips: iterations of a loop, where the dump says.
      label: the first `jax.named_scope` that opens in the region's own bundles.
    """

    kind: str
    start: int
    stop: int
    number: int | None = None
    trips: int | None = None
    label: str | None = None
    children: list["Region"] = dataclasses.field(default_factory=list)

    def own(self) -> list[int]:
        """The indices of the region's own bundles: those in no child."""
        inner = {i for child in self.children for i in range(child.start, child.stop)}
        return [i for i in range(self.start, self.stop) if i not in inner]

    def walk(self) -> Iterator["Region"]:
        """The region and all inside it, in program order."""
        yield self
        for child in self.children:
            yield from child.walk()


def read_dump(directory: Path) -> list[Program]:
    """Every scheduled instruction of a dump, in the order of its file names.

    Raises:
      ScheduleError: there is none, or one cannot be read.
    """
    programs = []
    for path in sorted(directory.glob("*-final_bundles.txt")):
        entry = _ENTRY.search(path.read_text())
        if entry is None:
            continue  # an analysis, or libtpu's own start and end of the program
        stem = re.sub(r"-\d+-final_bundles\.txt$", "", path.name)
        programs.append(parse_program(entry[1], entry[2], *_texts(directory, re.escape(stem))))
    if not programs:
        raise ScheduleError(
            "the dump has no *-final_bundles.txt of an HLO instruction; this libtpu dumps its "
            "schedule in another form"
        )
    return programs


def read_kernel(directory: Path, names: Sequence[str]) -> Program:
    """The first Pallas kernel of the HLO instructions `names` that the dump has.

    Raises:
      ScheduleError: the dump has none of them, or it cannot be read.
    """
    files = [path.name for path in directory.iterdir()]
    for name in names:
        stem = rf"\d+-{re.escape(name)}"
        if any(re.fullmatch(rf"{stem}-\d+-packed-bundles-post-ra\.txt", file) for file in files):
            return parse_program(name, "custom-call", *_texts(directory, stem))
    raise ScheduleError(f"the dump does not have {names[0]}: the program may come from a cache")


def _texts(directory: Path, stem: str) -> Iterator[str]:
    """The two dumps of an instruction that `parse_program` takes; `stem` matches its files."""
    for kind in ("packed-bundles-post-ra", "pre-delay_hlo-static-per-bundle-utilization"):
        pattern = re.compile(rf"{stem}-\d+-{kind}\.txt")
        paths = [path for path in directory.iterdir() if pattern.fullmatch(path.name)]
        if len(paths) != 1:
            raise ScheduleError(
                f"the dump has {len(paths)} files {pattern.pattern}; it must have 1"
            )
        yield paths[0].read_text()


def parse_program(name: str, opcode: str, bundles: str, utilization: str) -> Program:
    """Reads the two dumps of one instruction: its bundles and the slots that each one fills.

    Raises:
      ScheduleError: the dumps are not of the known form or do not fit each other.
    """
    units, capacity, table = _parse_utilization(utilization)
    starts = list(_BUNDLE.finditer(bundles))
    if not starts or [int(m[1], 16) for m in starts] != list(range(len(starts))):
        raise ScheduleError(f"{name}: the bundles are not numbered 0, 1, 2, ...")
    if len(starts) != len(table):
        raise ScheduleError(
            f"{name}: {len(starts)} bundles but utilisation for {len(table)}; they must agree"
        )
    ends = [*(m.start() for m in starts[1:]), len(bundles)]
    parsed = [
        _parse_bundle(m, bundles[m.start() : end], slots)
        for m, end, slots in zip(starts, ends, table, strict=True)
    ]
    windows: dict[str, dict[int, tuple[Shape, Shape]]] = {"input": {}, "output": {}}
    for kind, number, window, whole in _WINDOW.findall(bundles):
        windows[kind][int(number)] = _shape(window), _shape(whole)
    return Program(
        name, opcode, units, capacity, tuple(parsed), windows["input"], windows["output"]
    )


def _shape(text: str) -> Shape:
    return tuple(int(size) for size in text.split(",") if size)


def _parse_bundle(header: re.Match, text: str, slots: tuple[int, ...]) -> Bundle:
    code = _COMMENT.sub("", text)
    branches = _BRANCH.findall(code)
    if len(branches) != len(re.findall(r"\bs(?:br|call)\w*\b", code)) or len(branches) > 1:
        shown = code.strip()[:200]
        raise ScheduleError(f"bundle {header[1]} has branches of a form not known: {shown}")
    scope, trips = _SCOPE.search(text), _LOOP_TEST.search(text)
    return Bundle(
        label=header[2],
        depth=header[0].count(">"),
        issued=re.match(r"[^{]*\{\s*\}", code) is None,
        target=int(branches[0][0]) if branches else None,
        region=int(branches[0][1]) if branches else None,
        scope=scope[1] if scope else None,
        trips=int(trips[1]) if trips else None,
        slots=slots,
    )


def _parse_utilization(text: str):
    # The head is "== CAPACTIY:" (libtpu's spelling), the units, their slots, "== UTILIZATION:".
    lines = text.strip().splitlines()
    if len(lines) < 4 or not lines[0].startswith("== CAP") or not lines[3].startswith("== UTIL"):
        raise ScheduleError(f"the utilisation table starts with an unknown head: {lines[:4]}")
    units = tuple(unit.strip() for unit in lines[1].split(","))
    capacity = tuple(map(int, lines[2].split()))
    rows = [tuple(map(int, line.split())) for line in lines[4:]]
    if any(len(row) != len(units) for row in [capacity, *rows]):
        raise ScheduleError(f"the utilisation table has rows that are not {len(units)} numbers")
    return units, capacity, rows


def regions(program: Program, delay_slots: int) -> Region:
    """The tree of a program's regions.

    The bundles in the delay slots of a branch belong to the region that branches: they always run.

    Raises:
      ScheduleError: the branches do not nest, or jump to no known place.
    """
    root = Region("root", 0, len(program.bundles))
    found = []
    for i, bundle in enumerate(program.bundles):
        if bundle.target is None:
            continue
        target, after = bundle.target, i + delay_slots + 1
        if target >= len(program.bundles) or program.bundles[target].label is None:
            raise ScheduleError(f"{program.name}: bundle {i:#x} jumps to no known place")
        if any(b.target is not None for b in program.bundles[i + 1 : after]):
            raise ScheduleError(f"{program.name}: a branch in the delay slots of bundle {i:#x}")
        if target <= i:
            _check_delay_slots(program, target, i, after)
            trips = [b.trips for b in program.bundles[target:after] if b.trips is not None]
            found.append(Region("loop", target, after, bundle.region, trips[-1] if trips else None))
        elif target > after:
            found.append(Region("guard", after, target, bundle.region))
    # Outer regions first; of two that are the same run of bundles, the loop is inside the guard.
    found.sort(key=lambda r: (r.start, -r.stop, r.kind == "loop"))
    stack = [root]
    for region in found:
        while region.start >= stack[-1].stop:
            stack.pop()
        if region.stop > stack[-1].stop:
            raise ScheduleError(
                f"{program.name}: region {region.number} ends at bundle {region.stop:#x}, outside "
                f"the region {stack[-1].number} that it starts in"
            )
        stack[-1].children.append(region)
        stack.append(region)
    for region in root.walk():
        # The scheduler may start a body in the delay slots of the branch around it.
        hoisted = {i for c in region.children if c.kind == "guard" for i in _slots(c, delay_slots)}
        place = [i for i in region.own() if i not in hoisted]
        if region.kind == "guard":
            place = [*_slots(region, delay_slots), *place]
        scopes = [s for i in place if (s := program.bundles[i].scope) is not None]
        region.label = scopes[0] if scopes else None
    return root


def _slots(guard: Region, delay_slots: int) -> range:
    return range(guard.start - delay_slots, guard.start)


def _check_delay_slots(program: Program, target: int, branch: int, after: int) -> None:
    # The dump marks a bundle with the loops around it, by its instructions: those that belong to
    # no loop, such as the branch itself, may lack the mark.
    depth = program.bundles[target].depth
    if any(b.depth >= depth and b.label is None for b in program.bundles[after : after + 1]):
        raise ScheduleError(
            f"{program.name}: the loop that ends at bundle {branch:#x} goes on after its delay "
            "slots; this libtpu branches with more of them"
        )
