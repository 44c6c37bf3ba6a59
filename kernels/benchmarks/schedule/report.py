"""Schedules as text, a Markdown table, JSON and a plot."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from kernels.benchmarks.schedule.compare import Comparison
from kernels.benchmarks.schedule.compiler import versions
from kernels.benchmarks.schedule.cost import Cost


def text(cost: Cost) -> str:
    """The regions of a call and what they sum up to."""
    units = list(cost.regions[0].busy) if cost.regions else []
    head = ["region", "bundles", "waits", "runs", "cycles", "share", *units, "spills", "fills"]
    rows = []
    for region in cost.regions:
        known = region.executions is not None
        rows.append(
            [
                "  " * region.depth + region.region,
                f"{region.bundles:,}",
                f"{region.waits:,}",
                f"{region.executions:,}" if known else "?",
                f"{region.cycles:,}" if known else "?",
                f"{region.cycles / cost.cycles:.1%}" if cost.pairs and known else "",
                *(f"{busy:.0%}" if busy else "·" for busy in region.busy.values()),
                f"{region.spills:,}",
                f"{region.fills:,}",
            ]
        )
    kernels = ", ".join(dict.fromkeys(region.kernel for region in cost.regions))
    lines = [f"{cost.case.partition(':')[2]} on {cost.chip} ({settings(cost)}): {kernels}"]
    lines += _align([head, *rows])
    if cost.pairs:
        lines.append(
            f"static cycles {cost.cycles:,} on {'one core' if cost.cores == 1 else 'each core'}, "
            f"of which {cost.cycles - cost.issued:,} are waits; "
            f"{cost.cycles_per_pair:.5f} per query token x head x KV token seen; "
            f"{cost.mac_share:.1%} of the peak MACs"
        )
    if cost.others:
        listed = ", ".join(f"{name} {bundles:,}" for name, bundles in cost.others.items())
        lines.append(f"not counted, cycles of other instructions: {listed}")
    return "\n".join(lines)


def settings(cost: Cost) -> str:
    """The options that the case was built with."""
    return ", ".join(f"{name}={value}" for name, value in cost.options.items())


def _align(table: Sequence[Sequence[str]]) -> list[str]:
    name, *others = (max(map(len, column)) for column in zip(*table, strict=True))
    return [
        "  ".join([row[0].ljust(name), *map(str.rjust, row[1:], others)]).rstrip() for row in table
    ]


def markdown(comparisons: Sequence[Comparison]) -> str:
    """One row a comparison."""
    lines = [
        "| chip | D | tokens | pass | splash's blocks | splash | dense | GQE | splash / GQE "
        "| without waits | dense / GQE | cycles a pair: splash | GQE | peak MACs: splash | GQE |",
        "|" + "---|" * 15,
    ]
    for c in comparisons:
        blocks = " × ".join(str(v) for k, v in c.splash.options.items() if k.startswith("block"))
        kind = "both" if c.training else "forward"
        lines.append(
            f"| {c.chip} | {c.head_dim} | {c.length:,} | {kind} | {blocks} | {c.splash.cycles:,} "
            f"| {c.dense.cycles:,} | {c.gqe.cycles:,} | **{c.ratio:.2f}** | {c.issued_ratio:.2f} "
            f"| {c.dense_ratio:.2f} | {c.splash.cycles_per_pair:.5f} "
            f"| {c.gqe.cycles_per_pair:.5f} | {c.splash.mac_share:.0%} | {c.gqe.mac_share:.0%} |"
        )
    return "\n".join(lines)


def write_json(path: Path, costs: Sequence[Cost | Comparison]) -> None:
    """Everything that was measured, with the versions that it depends on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"versions": versions(), "results": [_plain(cost) for cost in costs]}
    path.write_text(json.dumps(document, indent=1) + "\n")


def _plain(result: Cost | Comparison) -> dict:
    if isinstance(result, Cost):
        plain = dataclasses.asdict(result)
        plain["cycles"], plain["issued"] = result.cycles, result.issued
        if result.pairs:
            plain["cycles_per_pair"] = result.cycles_per_pair
            plain["mac_share"] = result.mac_share
        for region in plain["regions"]:
            region["busy"] = {unit: round(busy, 3) for unit, busy in region["busy"].items()}
        return plain
    return {
        "chip": result.chip,
        "head_dim": result.head_dim,
        "length": result.length,
        "training": result.training,
        "ratio": result.ratio,
        "issued_ratio": result.issued_ratio,
        "dense_ratio": result.dense_ratio,
        "splash": _plain(result.splash),
        "gqe": _plain(result.gqe),
        "dense": _plain(result.dense),
        "sweep": result.sweep,
    }


def plot(path: Path, comparisons: Sequence[Comparison]) -> None:
    """The ratio against the length, a line for each chip and head size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for chip, head_dim in dict.fromkeys((c.chip, c.head_dim) for c in comparisons):
        points = sorted(
            (c.length, c.ratio) for c in comparisons if (c.chip, c.head_dim) == (chip, head_dim)
        )
        style = "-" if head_dim == 128 else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", label=f"{chip}, D = {head_dim}")
    axes.axhline(16 / 9, color="grey", linewidth=1, label="work left out: 16/9")
    lengths = sorted({c.length for c in comparisons})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("static cycles, splash attention (dense) / GQE")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
