"""Schedules as text, a Markdown table, JSON and a plot."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kernels.benchmarks.schedule.compare import Comparison
from kernels.benchmarks.schedule.compiler import versions
from kernels.benchmarks.schedule.cost import Cost


def text(cost: Cost) -> str:
    """The regions of a call, and their sums."""
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
    """The options that a case was built with."""
    return ", ".join(f"{name}={value}" for name, value in cost.options.items())


def _align(table: Sequence[Sequence[str]]) -> list[str]:
    name, *others = (max(map(len, column)) for column in zip(*table, strict=True))
    return [
        "  ".join([row[0].ljust(name), *map(str.rjust, row[1:], others)]).rstrip() for row in table
    ]


def row(comparison: Comparison) -> dict[str, Any]:
    """The figures of a comparison that are quoted, or that quoted figures are sums of."""
    costs = {name: getattr(comparison, name) for name in ("splash", "dense", "gqe")}
    blocks = (v for k, v in comparison.splash.options.items() if k.startswith("block"))
    return {
        **{name: getattr(comparison, name) for name in ("chip", "head_dim", "length", "training")},
        "splash_blocks": " × ".join(map(str, blocks)),
        "cycles": {name: cost.cycles for name, cost in costs.items()},
        "issued": {name: cost.issued for name, cost in costs.items()},
        "ratio": costs["splash"].cycles / costs["gqe"].cycles,
        "dense_ratio": costs["dense"].cycles / costs["gqe"].cycles,
        "issued_ratio": costs["splash"].issued / costs["gqe"].issued,
        "cycles_per_pair": {name: round(cost.cycles_per_pair, 5) for name, cost in costs.items()},
        "mac_share": {name: round(cost.mac_share, 5) for name, cost in costs.items()},
        "regions": {name: _regions(costs[name]) for name in ("dense", "gqe")},
        "sweep": "; ".join(f"{blocks}: {cycles}" for blocks, cycles in comparison.sweep.items()),
    }


def _regions(cost: Cost) -> str:
    """Each region's cycles in one execution, by how often it runs."""
    return ", ".join(f"{r.region} {r.bundles + r.waits} × {r.executions}" for r in cost.regions)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a comparison."""
    lines = [
        "| chip | D | tokens | pass | splash's blocks | splash | dense | GQE | splash / GQE "
        "| without waits | dense / GQE | cycles a pair: splash | GQE | peak MACs: splash | GQE |",
        "|" + "---|" * 15,
    ]
    for each in rows:
        cycles, pairs, macs = (each[name] for name in ("cycles", "cycles_per_pair", "mac_share"))
        kind = "both" if each["training"] else "forward"
        lines.append(
            f"| {each['chip']} | {each['head_dim']} | {each['length']:,} | {kind} "
            f"| {each['splash_blocks']} | {cycles['splash']:,} | {cycles['dense']:,} "
            f"| {cycles['gqe']:,} | **{each['ratio']:.2f}** | {each['issued_ratio']:.2f} "
            f"| {each['dense_ratio']:.2f} | {pairs['splash']:.5f} | {pairs['gqe']:.5f} "
            f"| {macs['splash']:.0%} | {macs['gqe']:.0%} |"
        )
    return "\n".join(lines)


def write_json(path: Path, command: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Writes results with the command that made them and the versions that they depend on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"command": command, "versions": versions(), "results": results}
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def regions(cost: Cost) -> dict[str, Any]:
    """All figures of one schedule, every region's among them."""
    plain = dataclasses.asdict(cost) | {"cycles": cost.cycles, "issued": cost.issued}
    if cost.pairs:
        plain |= {"cycles_per_pair": cost.cycles_per_pair, "mac_share": cost.mac_share}
    for region in plain["regions"]:
        region["busy"] = {unit: round(busy, 3) for unit, busy in region["busy"].items()}
    return plain


def plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The ratio against the length, a line for each chip and head size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for chip, head_dim in dict.fromkeys((each["chip"], each["head_dim"]) for each in rows):
        points = sorted(
            (each["length"], each["ratio"])
            for each in rows
            if (each["chip"], each["head_dim"]) == (chip, head_dim)
        )
        style = "-" if head_dim == 128 else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", label=f"{chip}, D = {head_dim}")
    axes.axhline(16 / 9, color="grey", linewidth=1, label="work left out: 16/9")
    lengths = sorted({each["length"] for each in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("static cycles, splash attention (dense) / GQE")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
