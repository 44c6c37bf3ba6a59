"""Formats the static cycles of a program, by part of the model."""

from collections.abc import Iterator, Sequence
from typing import Any

from gqe_jax.compile_for.cycles import OTHER, PARTS, PASSES, Cycles, PartCycles, Pass
from gqe_jax.compile_for.kernel_cycles import KernelCycles
from gqe_kernels.chips import Chip

type Row = tuple[str, Pass, PartCycles, list[KernelCycles]]


def rows(cycles: Cycles, kernels: Sequence[KernelCycles]) -> Iterator[Row]:
    """Yields each part and pass that has cycles, with its XLA cycles and its kernels."""
    for part in (*PARTS, OTHER):
        for pass_ in PASSES:
            own = cycles.parts.get((part, pass_), PartCycles())
            called = [each for each in kernels if (each.part, each.pass_) == (part, pass_)]
            if own.cycles or called:
                yield part, pass_, own, called


def ideal(own: PartCycles, chip: Chip) -> tuple[float, float]:
    """The cycles that a part's products need of the matrix units, and its bytes of the HBM."""
    cores = chip.peak_macs * chip.cores
    return own.flops / (2 * cores), own.hbm_bytes * chip.clock / chip.hbm_bandwidth


def table(cycles: Cycles, kernels: Sequence[KernelCycles], chip: Chip) -> str:
    """The table as text, in millions of cycles of one core."""
    columns = ("products", "copies", "rest", "kernels", "total", "ideal MXU", "ideal HBM")
    lines = [f"  {'M cycles':<26}" + "".join(f"{each:>10}" for each in columns)]

    def line(name: str, own: PartCycles, called: Sequence[KernelCycles]) -> str:
        known = sum(each.total for each in called)
        values = (own.products, own.copies, own.rest, known, own.cycles + known, *ideal(own, chip))
        shown = [f"{value / 1e6:10.3f}" for value in values]
        if any(each.cycles is None for each in called):
            shown[3] = f"{'unknown' if not known else f'>{known / 1e6:.3f}':>10}"
        return f"  {name:<26}" + "".join(shown)

    for part, pass_, own, called in rows(cycles, kernels):
        lines.append(line(part if pass_ == "forward" else f"{part}, {pass_}", own, called))
    lines.append(line("all", cycles.total, kernels))
    lines += [f"  {reason}" for reason in dict.fromkeys(k.reason for k in kernels if k.reason)]
    return "\n".join(lines)


def as_json(cycles: Cycles, kernels: Sequence[KernelCycles], chip: Chip) -> dict[str, Any]:
    """The table as JSON-serialisable values, in cycles of one core."""
    parts = []
    for part, pass_, own, called in rows(cycles, kernels):
        mxu, hbm = ideal(own, chip)
        parts.append(
            {
                "part": part,
                "pass": pass_,
                "products": own.products,
                "copies": own.copies,
                "rest": own.rest,
                "kernels": {each.name: each.total for each in called if each.cycles is not None},
                "product_flops": own.flops,
                "hbm_bytes": own.hbm_bytes,
                "ideal_mxu": mxu,
                "ideal_hbm": hbm,
            }
        )
    return {
        "clock": chip.clock,
        "parts": parts,
        "xla": cycles.total.cycles,
        "kernels": sum(each.total for each in kernels),
        "not_counted": {each.name: each.reason for each in kernels if each.reason},
    }
