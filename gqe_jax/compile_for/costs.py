"""FLOPs and HBM traffic of a compiled program, with loop bodies counted once per iteration."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from gqe_jax.compile_for.collectives import KINDS, SCATTERED_SUM
from gqe_jax.compile_for.hlo import Array, Instruction, Program

# Opcodes that only refer to buffers, without HBM traffic.
_FREE = {
    *("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "call", "iota"),
    *("conditional", "after-all", "partition-id", "replica-id", "domain", "opt-barrier"),
}
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of one call on one device.

    Attributes:
      product_flops: FLOPs of the matrix products that XLA compiles.
      kernel_flops: FLOPs of the Pallas kernels by name, from their cost estimates.
      hbm_bytes: bytes that all instructions read from and write to HBM, without vector memory.
    """

    product_flops: int
    kernel_flops: Mapping[str, int]
    hbm_bytes: int

    @property
    def flops(self) -> int:
        return self.product_flops + sum(self.kernel_flops.values())


def count(program: Program) -> Costs:
    """The costs of a program."""
    products, kernels, traffic = 0, {}, 0
    for computation, times in program.runs():
        for instruction in computation.values():
            products += times * product_flops(program, computation, instruction)
            traffic += times * hbm_bytes(program, computation, instruction)
            if instruction.text("custom_call_target") == '"tpu_custom_call"':
                name = re.sub(r"\.\d+$", "", instruction.name)
                flops = re.search(r'"flops":"?(\d+)', instruction.attributes)
                kernels[name] = kernels.get(name, 0) + times * (int(flops[1]) if flops else 0)
    return Costs(products, kernels, traffic)


def product_flops(program: Program, table: Mapping[str, Instruction], x: Instruction) -> int:
    """FLOPs of an instruction's matrix products; `table` is the computation that it stands in."""
    if x.opcode == "fusion":
        inner = program.computations[x.called("calls")]
        return sum(product_flops(program, inner, each) for each in inner.values())
    if x.opcode == "dot":
        left = table[x.operands[0]].arrays[0].shape
        (contracted,) = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", x.attributes)
        depth = math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
        return 2 * math.prod(x.arrays[0].shape) * depth
    if x.opcode == "convolution":
        return _convolution_flops(x, *(table[name].arrays[0] for name in x.operands[:2]))
    return 0


def _convolution_flops(x: Instruction, image: Array, kernel: Array) -> int:
    """FLOPs of a convolution: 2 per multiply-add whose input is not padding.

    On TPU a matrix product is a convolution. An axis that only one operand has is a spatial axis,
    whose window covers padding except at one position.
    """
    (labels,) = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes)
    image_axes, kernel_axes, out_axes = labels
    out, flops = x.arrays[0].shape, 2
    for axis in ("b", "f"):
        flops *= out[out_axes.index(axis)]
    flops *= kernel.shape[kernel_axes.index("i")]
    window = re.search(r"window=\{([^}]*)\}", x.attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    spatial = sorted(axis for axis in out_axes if axis.isdigit())
    for position, axis in enumerate(spatial):

        def of(name: str, default: str, position: int = position) -> str:
            return fields[name].split("x")[position] if name in fields else default

        flops *= _unpadded_pairs(
            image.shape[image_axes.index(axis)],
            kernel.shape[kernel_axes.index(axis)],
            out[out_axes.index(axis)],
            stride=int(of("stride", "1")),
            low=int(of("pad", "0_0").split("_")[0]),
            spread=int(of("lhs_dilate", "1")),
            dilation=int(of("rhs_dilate", "1")),
        )
    return flops


@functools.cache
def _unpadded_pairs(size, window, out, *, stride, low, spread, dilation) -> int:
    """The number of (output, window position) pairs at which the input is not padding."""
    at = np.arange(out)[:, None] * stride + np.arange(window) * dilation - low
    return int(np.sum((at % spread == 0) & (at >= 0) & (at // spread < size)))


def hbm_bytes(program: Program, table: Mapping[str, Instruction], x: Instruction) -> int:
    """Bytes that an instruction reads from and writes to HBM."""
    if x.opcode in _FREE or x.opcode.endswith("-done"):
        return 0
    if x.opcode == "slice-start":
        source, slice_ = x.arrays[:2]
        return slice_.bytes * (source.in_hbm + slice_.in_hbm)
    if x.opcode.endswith(("-start", "-update")):
        return x.hbm_bytes  # its result includes source and destination
    if x.opcode == "custom-call" and "AllocateBuffer" in x.attributes:
        return 0
    read = [table[name] for name in x.operands]
    if x.opcode in _SLICES:
        return x.hbm_bytes + (x.bytes if read[0].hbm_bytes else 0)
    if x.opcode == "dynamic-update-slice":
        return read[1].hbm_bytes + (read[1].bytes if x.hbm_bytes else 0)
    if x.opcode != "fusion" or x.called("calls").startswith(SCATTERED_SUM):
        return x.hbm_bytes + sum(operand.hbm_bytes for operand in read)
    inner = program.computations[x.called("calls")]
    total = _written(inner, x)
    for position, operand in enumerate(read):
        if operand.hbm_bytes:
            total += min(operand.hbm_bytes, _read(program, inner, position))
    return total


def _read(program: Program, inner: Mapping[str, Instruction], position: int) -> int:
    """Bytes that a fusion reads of a parameter; for a parameter that it only slices, the slices."""
    parameter = next(
        x
        for x in inner.values()
        if x.opcode == "parameter" and x.attributes.startswith(f"({position})")
    )
    total, names = 0, [parameter.name]
    while names:
        name = names.pop()
        for user in (x for x in inner.values() if name in x.operands):
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode in _SLICES and user.operands[0] == name:
                total += user.bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue  # updated in place
            elif user.opcode == "fusion":
                called = program.computations[user.called("calls")]
                total += _read(program, called, user.operands.index(name))
            elif not _passes_on(user):
                total += parameter.bytes
    return total


def _written(inner: Mapping[str, Instruction], fusion: Instruction) -> int:
    """Bytes that a fusion writes to HBM; for a buffer that it updates in place, the update."""
    root = next(x for x in inner.values() if x.is_root)
    parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    starts = (x for x in inner.values() if "AsyncCollectiveStart" in x.attributes)
    total = sum(start.hbm_bytes for start in starts)  # source and destination
    if len(parts) != len(fusion.arrays):
        return total if _passes_on(root) else total + fusion.hbm_bytes
    for part, array in zip(parts, fusion.arrays, strict=True):
        while part.opcode == "bitcast":
            part = inner[part.operands[0]]
        if part.opcode == "dynamic-update-slice":
            total += inner[part.operands[1]].bytes if array.in_hbm else 0
        elif part.opcode != "parameter" and not _passes_on(part):
            total += array.bytes if array.in_hbm else 0
    return total


def _passes_on(x: Instruction) -> bool:
    """Whether this is part of an asynchronous collective, whose bytes are counted at its start."""
    return (
        x.opcode in ("tuple", "get-tuple-element")
        or x.opcode in KINDS
        or (x.opcode == "custom-call" and "AsyncCollective" in x.attributes)
    )
