"""Finds a program's collectives: the kind, mesh axes and bytes of each."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from gqe_jax.compile_for.hlo import Instruction, Program

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# On TPU a reduce-scatter is a fusion of this name, of an all-reduce and a slice.
SCATTERED_SUM = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      axes: the mesh axes along which the devices of a group differ.
      group: flat mesh indices of one group's devices.
      bytes: bytes that one device sends per execution of a ring algorithm over n devices: with b
        the bytes of the full array, b (n - 1) / n for all-gather, reduce-scatter and all-to-all,
        twice that for all-reduce, b for a permutation.
      times: executions per call of the program.
      hidden_cycles: XLA's cycles of what is scheduled between its start and its end, itself
        included, in one execution; 0 for a synchronous one.
      between_slices: whether it uses the data-center network. XLA splits a collective over several
        slices into a part on that network and parts within each slice.
    """

    kind: str
    axes: tuple[str, ...]
    group: tuple[int, ...]
    bytes: float
    times: int
    between_slices: bool = False
    hidden_cycles: int = 0


def collectives(
    program: Program, mesh_shape: Mapping[str, int], num_slices: int = 1
) -> list[Collective]:
    """All collectives of a program compiled for a mesh whose first axis spans the slices.

    An asynchronous collective appears in every fusion that it overlaps, with the same chain_id; it
    is counted once. One that the SparseCore runs is in a computation of its own, and under way from
    the `call-update` that hands over its operands to the `call-done`.
    """
    found = []
    for computation, times in program.runs():
        seen, hidden = set(), _hidden_cycles(program, computation)
        for x, scatters in _within(program, computation, False):
            flight = _flight(x)
            if flight in seen:
                continue
            seen.add(flight)
            if x.opcode == "send":
                found.append(_between_slices(x, num_slices, times, mesh_shape))
                continue
            group = _group(x, math.prod(mesh_shape.values()) // num_slices)
            if len(group) > 1:
                one = _collective(x, scatters, group, mesh_shape, times)
                found.append(dataclasses.replace(one, hidden_cycles=hidden.get(flight, 0)))
    return found


def _flight(x: Instruction) -> str:
    """What a collective's appearances have in common: its chain, or its own name."""
    chain = re.search(r'chain_id="(\d+)"', x.attributes)
    return f"chain {chain[1]}" if chain else x.name


def _hidden_cycles(program: Program, computation: Mapping[str, Instruction]) -> dict[str, int]:
    """Cycles of the instructions from each collective's first appearance to its last.

    A `-done` is an appearance of the start that it reads.
    """
    cycles, first, hidden = 0, {}, {}
    for x in computation.values():
        before, cycles = cycles, cycles + x.estimated_cycles
        flights = {_flight(each) for each, _ in _of(program, computation, x, False)}
        if x.opcode.endswith("-done"):
            flights |= set(x.operands) & set(first)
        for flight in flights:
            if flight in first:
                hidden[flight] = cycles - first[flight]
            first.setdefault(flight, before)
    return hidden


def _within(
    program: Program, computation: Mapping[str, Instruction], scatters: bool
) -> Iterator[tuple[Instruction, bool]]:
    for x in computation.values():
        yield from _of(program, computation, x, scatters)


def _of(
    program: Program, computation: Mapping[str, Instruction], x: Instruction, scatters: bool
) -> Iterator[tuple[Instruction, bool]]:
    """The collectives of an instruction, and whether they are in a fusion that scatters sums."""
    if x.opcode.removesuffix("-start") in KINDS or (
        x.opcode == "send" and "_xla_megascale_transfer_type" in x.attributes
    ):
        yield x, scatters
    elif x.opcode == "fusion":
        called = x.called("calls")
        scattered = called.startswith(SCATTERED_SUM)
        yield from _within(program, program.computations[called], scattered)
    elif x.opcode == "call-update":
        called = computation[x.operands[0]].called("to_apply")
        for one, scattered in _within(program, program.computations[called], scatters):
            yield dataclasses.replace(one, name=x.name), scattered


def _collective(x, scatters, group, mesh_shape, times) -> Collective:
    kind = x.opcode.removesuffix("-start")
    if scatters and kind == "all-reduce":
        kind = "reduce-scatter"
    # The result of a start includes its operands; the largest array is the full one.
    size = max(a.bytes for a in x.arrays) if x.opcode.endswith("-start") else x.bytes
    n = len(group)
    if x.opcode == "reduce-scatter":
        size *= n
    factor = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0, "collective-broadcast": 1.0}
    sent = size * factor.get(kind, (n - 1) / n)
    return Collective(kind, _axes(group, mesh_shape), group, sent, times)


def _between_slices(x, num_slices, times, mesh_shape) -> Collective:
    """The collective that a send to libtpu's multi-slice runtime names in its attributes."""
    (name,) = re.findall(r'_xla_megascale_transfer_type="(\w+)"', x.attributes)
    kind, n = name.lower().replace("_", "-"), num_slices
    factor = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1}.get(kind, (n - 1) / n)
    sent = x.arrays[0].bytes * factor
    return Collective(kind, (next(iter(mesh_shape)),), (), sent, times, between_slices=True)


def _axes(group: tuple[int, ...], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    indices = np.unravel_index(np.array(group), tuple(mesh_shape.values()))
    varies = (len(set(index.tolist())) > 1 for index in indices)
    return tuple(axis for axis, differs in zip(mesh_shape, varies, strict=True) if differs)


def _group(x: Instruction, num_devices: int) -> tuple[int, ...]:
    """The first replica group; for a permutation the first pair of different devices."""
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", x.attributes)
    if pairs:
        found = re.findall(r"\{(\d+),(\d+)\}", pairs[1])
        return next(((int(a), int(b)) for a, b in found if a != b), ())
    return replica_groups(x.attributes, num_devices)[0]


def replica_groups(attributes: str, num_devices: int) -> list[tuple[int, ...]]:
    """Parses the replica groups of a collective, in any of XLA's notations.

    The notations are lists, `{{0,1},{2,3}}`; iota, `[2,4]<=[4,2]T(1,0)`: arange(8) of shape [4, 2],
    transposed and reshaped to 2 groups of 4; and a mesh with the axes of a group,
    `mesh['x'=4,'y'=2] {'x'}`, optionally with device_ids. No groups mean one group of all devices.

    Raises:
      ValueError: the notation is unknown.
    """
    text = attributes[attributes.find("replica_groups=") :].removeprefix("replica_groups=")
    if "replica_groups=" not in attributes or text.startswith("{}"):
        return [tuple(range(num_devices))]
    if text.startswith("{{"):
        lists = re.findall(r"\{([\d, ]+)\}", text[: text.index("}}") + 1])
        return [tuple(int(n) for n in one.split(",")) for one in lists]
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        return [tuple(row) for row in _iota(*iota.groups()).tolist()]
    mesh = re.match(r"mesh\[([^\]]*)\](?:, ?device_ids=\(?([^)]*\)?)\)?)? \{([^}]*)\}", text)
    if mesh and ":(" not in mesh[3]:
        return _mesh_groups(mesh[1], mesh[2], mesh[3], num_devices)
    raise ValueError(f"replica groups of an unknown form: {text[:120]}")


def _iota(groups: str, shape: str, transposed: str | None) -> np.ndarray:
    numbers = [int(n) for n in shape.split(",")]
    devices = np.arange(math.prod(numbers)).reshape(numbers)
    if transposed:
        devices = devices.transpose([int(n) for n in transposed.split(",")])
    return devices.reshape([int(n) for n in groups.split(",")])


def _mesh_groups(
    shape: str, device_ids: str | None, grouped: str, num_devices: int
) -> list[tuple[int, ...]]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", shape)}
    devices = np.arange(num_devices)
    iota = re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?", device_ids or "")
    if iota:
        devices = _iota(iota[1], iota[2] or iota[1], iota[3])
    devices = devices.reshape(list(sizes.values()))
    inner = re.findall(r"'([^']+)'", grouped)
    order = [axis for axis in sizes if axis not in inner] + inner
    devices = devices.transpose([list(sizes).index(axis) for axis in order])
    width = math.prod(sizes[axis] for axis in inner)
    return [tuple(row) for row in devices.reshape(-1, width).tolist()]
