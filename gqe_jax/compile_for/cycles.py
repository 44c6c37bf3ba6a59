"""Cycles of a compiled program by part of the model, as XLA:TPU estimates its own instructions.

XLA notes `estimated_cycles` in each instruction that it schedules. Parts are the `jax.named_scope`s
of the model, of which the innermost counts. Pallas kernels have no such note: `kernel_cycles.py`.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Literal

from gqe_jax.compile_for.costs import hbm_bytes, product_flops
from gqe_jax.compile_for.hlo import Instruction, Program

PARTS = (
    *("projections", "rope", "routing", "attention", "out", "mlp", "norm", "embedding", "loss"),
    "optimizer",
)
OTHER = "other"
Pass = Literal["forward", "recomputed", "backward"]
PASSES: tuple[Pass, ...] = ("forward", "recomputed", "backward")
# Instructions that only move or pad arrays, or change their layout.
_MOVES = ("copy", "transpose", "pad", "reshape", "slice", "concatenate", "bitcast")
_TRIVIAL = ("parameter", "bitcast", "get-tuple-element", "tuple", "constant")


@dataclasses.dataclass(frozen=True)
class PartCycles:
    """Cycles of one part of the model in one pass, on one core, and what they are for.

    Attributes:
      products: cycles of instructions with a matrix product, and of what is fused with it.
      copies: cycles of instructions that only copy, transpose, pad, slice or concatenate.
      rest: cycles of all others.
      flops: FLOPs of the matrix products.
      hbm_bytes: bytes that the instructions read from and write to HBM.
    """

    products: int = 0
    copies: int = 0
    rest: int = 0
    flops: int = 0
    hbm_bytes: int = 0

    @property
    def cycles(self) -> int:
        return self.products + self.copies + self.rest

    def __add__(self, other: "PartCycles") -> "PartCycles":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return PartCycles(*(a + b for a, b in pairs))


@dataclasses.dataclass(frozen=True)
class Cycles:
    """XLA's cycles of one call of a program, on one core; collectives have no estimate.

    Attributes:
      parts: by part and pass; instructions of no part are `OTHER`.
    """

    parts: Mapping[tuple[str, Pass], PartCycles]

    @functools.cached_property
    def total(self) -> PartCycles:
        """The sum over parts."""
        return sum(self.parts.values(), PartCycles())


def cycles(program: Program) -> Cycles:
    """XLA's cycles of a program; loop bodies are counted as often as they run."""
    parts: dict[tuple[str, Pass], PartCycles] = {}
    for computation, times in program.runs():
        for x in computation.values():
            if not (noted := x.estimated_cycles):
                continue
            flops = product_flops(program, computation, x)
            name = op_name(program, computation, x)
            column = "products" if flops else "copies" if _only_moves(program, x) else "rest"
            traffic = hbm_bytes(program, computation, x)
            own = PartCycles(flops=flops * times, hbm_bytes=traffic * times)
            own = dataclasses.replace(own, **{column: noted * times})
            key = part_of(name), pass_of(name)
            parts[key] = parts.get(key, PartCycles()) + own
    return Cycles(parts)


def part_of(name: str) -> str:
    """The part of the model that an `op_name` belongs to: its innermost scope that is one."""
    words = re.findall(r"\w+", name)
    return next((word for word in reversed(words) if word in PARTS), OTHER)


def pass_of(name: str) -> Pass:
    """The pass that an `op_name` belongs to."""
    if "rematted_computation" in name:
        return "recomputed"
    return "backward" if "transpose(" in name else "forward"


def op_name(program: Program, table: Mapping[str, Instruction], x: Instruction) -> str:
    """The path of scopes in which an instruction was traced.

    Of a fusion it is that of its product, if there is one. An instruction that the compiler made is
    given that of what it reads.
    """
    for _ in range(len(table)):
        names = [_noted(x)]
        if x.opcode == "fusion":
            inner = list(_inside(program, x))
            products = [_noted(i) for i in inner if i.opcode in ("dot", "convolution")]
            names = [*products, _noted(x), *(_noted(i) for i in reversed(inner))]
        names = [name for name in names if name]
        known = (name for name in names if part_of(name) != OTHER)
        if names:
            return next(known, names[0])
        if not x.operands or x.operands[0] not in table:
            break
        x = table[x.operands[0]]
    return ""


def _noted(x: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', x.attributes)
    # Where instructions were merged, the paths of all are there: the first is the whole one's.
    return found[1].partition(";")[0] if found else ""


def _inside(program: Program, fusion: Instruction) -> Iterator[Instruction]:
    for x in program.computations[fusion.called("calls")].values():
        if x.opcode == "fusion":
            yield from _inside(program, x)
        yield x


def _only_moves(program: Program, x: Instruction) -> bool:
    """Whether an instruction computes nothing."""
    inside = _inside(program, x) if x.opcode == "fusion" else [x]
    opcodes = {each.opcode for each in inside} - set(_TRIVIAL)
    return bool(opcodes) and opcodes <= set(_MOVES)
