"""Parses a compiled program's text: its computations, and how often each of them runs.

The costs are not taken from XLA's analysis, which counts a loop body once and ignores Pallas
kernels.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

from gqe_jax.errors import UserError

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d+[a-z0-9]*)\[([\d,<=]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")


class UnknownTripsError(UserError, ValueError):
    """How often a loop runs is not in the program."""


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool
    """From the layout's memory space: none or 0 is HBM, 1 is vector memory."""

    @functools.cached_property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype)
        if bits is None:
            bits = int("".join(filter(str.isdigit, self.dtype)))
        return math.prod(self.shape) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, *attributes: str) -> str:
        """The name of the computation in the first of these attributes, such as `body`.

        Raises:
          ValueError: the instruction calls none.
        """
        for attribute in attributes:
            if found := re.search(rf"\b{attribute}=%([\w.\-]+)", self.attributes):
                return found[1]
        raise ValueError(f"{self.name} has no {' or '.join(attributes)}")

    def text(self, attribute: str) -> str | None:
        """The value of an attribute, which has neither spaces nor braces."""
        found = re.search(rf"\b{attribute}=([^\s,{{}}]+)", self.attributes)
        return found[1] if found else None

    @property
    def estimated_cycles(self) -> int:
        """XLA's note of the cycles that it takes; 0 where there is none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else 0

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @property
    def hbm_bytes(self) -> int:
        return sum(array.bytes for array in self.arrays if array.in_hbm)


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each a mapping of its instructions in order."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    def runs(self) -> Iterator[tuple[Mapping[str, Instruction], int]]:
        """Yields every computation outside fusions, with its number of executions.

        A loop's body is repeated by the loop's trip count.
        """
        yield from self._runs(self.entry, 1)

    def _runs(self, name: str, times: int):
        computation = self.computations[name]
        yield computation, times
        for instruction in computation.values():
            if instruction.opcode == "while":
                trips = self.trip_count(instruction)
                yield from self._runs(instruction.called("body"), times * trips)
            elif instruction.opcode in ("call", "async-start"):
                yield from self._runs(instruction.called("to_apply", "calls"), times)
            elif instruction.opcode == "conditional":
                # The branch is unknown: count all of them, an upper bound.
                for branch in re.findall(r"%([\w.\-]+)", _branches(instruction.attributes)):
                    yield from self._runs(branch, times)

    def trip_count(self, loop: Instruction) -> int:
        """Iterations of a `while`, from XLA's known_trip_count or the constant in its condition.

        The loop of `jax.lax.scan` counts from 0 while below a constant.

        Raises:
          UnknownTripsError: the condition has no constant.
        """
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if noted:
            return int(noted[1])
        condition = self.computations[loop.called("condition")]
        for instruction in condition.values():
            if instruction.opcode == "constant" and instruction.arrays[0].dtype in ("s32", "u32"):
                return int(instruction.attributes[1:].partition(")")[0])
        raise UnknownTripsError(
            f"the loop {loop.name} has no known_trip_count, and its condition has no constant"
        )


def _branches(attributes: str) -> str:
    found = re.search(r"branch_computations=\{([^}]*)\}", attributes)
    if found:
        return found[1]
    return " ".join(re.findall(r"(?:true|false)_computation=(%[\w.\-]+)", attributes))


def parse(text: str) -> Program:
    """Parses the text of `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif line == "}":
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current[found[2]] = _instruction(found[2], found[3], bool(found[1]))
    if entry is None:
        raise ValueError("the text of the compiled program has no ENTRY computation")
    return Program(computations, entry)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:]
    opcode = _OPCODE.match(rest)
    if opcode is None:
        raise ValueError(f"{name} has no opcode: {rest[:80]!r}")
    start = opcode.end() - 1
    end = _closing(rest, start)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[start:end]))
    # A constant's value and a parameter's index are in the place of the operands.
    attributes = rest[start:] if opcode[1] in ("constant", "parameter") else rest[end:]
    return Instruction(name, opcode[1], tuple(_arrays(result)), operands, attributes, is_root)


def _arrays(result: str) -> Iterator[Array]:
    for dtype, shape, layout in _ARRAY.findall(result):
        sizes = tuple(int(size.lstrip("<=")) for size in shape.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout)
        yield Array(dtype, sizes, space is None or space[1] == "0")


def _closing(text: str, start: int) -> int:
    """The position after the closing bracket of the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    raise ValueError(f"unbalanced brackets in {text[:80]!r}")
