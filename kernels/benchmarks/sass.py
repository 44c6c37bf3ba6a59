"""Counts what the warps of a Hopper kernel issue in a step of its loops, from its machine code.

The loops that matter are those with products of the tensor cores (`HGMMA`). Counted is one step of
one warpgroup, whose four warps sit on the four quarters of a multiprocessor: instructions, of which
a quarter issues one a cycle; cycles of the tensor cores, whose m64nNk16 takes N / 2; and cycles of
the unit of exponentials (`MUFU`), which does four lanes a cycle in each quarter. All computing
warpgroups share these three, so that the largest bounds the others.
"""

import dataclasses
import re

_FUNCTION = re.compile(r"^\.text\.(\w+):")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(.*?) ?;")
_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16\.")
LANES, LANES_A_CYCLE = 32, 4  # of a warp; of the unit of exponentials, for it


@dataclasses.dataclass(frozen=True)
class Loop:
    """One step of a loop, for each warp.

    Attributes:
      tensor_cycles, exponential_cycles: of the units, without waiting.
    """

    kernel: str
    instructions: int
    tensor_cycles: int
    exponential_cycles: int

    @property
    def most(self) -> float:
        """The share of the tensor cores' peak that no schedule of these instructions passes."""
        return self.tensor_cycles / max(
            self.tensor_cycles, self.exponential_cycles, self.instructions
        )


def loops(text: str) -> list[Loop]:
    """The innermost loops with products, in the order of the program, of nvdisasm's listing."""
    found = []
    for kernel, code, labels in _functions(text):
        ends = [at for at, line in enumerate(code) if line.startswith("EXIT")]
        spans = []
        for at, line in enumerate(code[: ends[-1]] if ends else code):
            target = re.match(r"BRA.*?(\.L_x_\d+)", line)
            if target and labels.get(target[1], at + 1) <= at:
                spans.append((labels[target[1]], at + 1))
        spans = [span for span in spans if any(map(_PRODUCT.match, code[slice(*span)]))]
        for span in spans:
            if not any(span[0] <= a and b <= span[1] and (a, b) != span for a, b in spans):
                found.append(_count(kernel, code[slice(*span)]))
    return found


def _functions(text: str):
    """(name, instructions without predicates, positions of labels) of each function."""
    kernel, code, labels = None, [], {}
    for line in text.splitlines():
        if match := _FUNCTION.match(line):
            if kernel is not None:
                yield kernel, code, labels
            kernel, code, labels = match[1], [], {}
        elif match := _LABEL.match(line):
            labels[match[1]] = len(code)
        elif match := _INSTRUCTION.match(line):
            code.append(match[1])
    if kernel is not None:
        yield kernel, code, labels


def _count(kernel: str, code: list[str]) -> Loop:
    products = [int(match[1]) for match in map(_PRODUCT.match, code) if match]
    exponentials = sum(line.startswith("MUFU") for line in code)
    return Loop(
        kernel,
        instructions=len(code),
        tensor_cycles=sum(products) // 2,
        exponential_cycles=exponentials * LANES // LANES_A_CYCLE,
    )
