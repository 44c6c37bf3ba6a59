"""The speed-up against the length, laid out as the paper's Figure 1: a panel for each level."""

import io
import pathlib
from collections.abc import Mapping
from typing import Any

from kernels.benchmarks.speed.document import write

PANELS = {"op": "attention op", "layer": "attention layer", "model": "whole model"}
BOUND = 16 / 9
# Figure 1 of arXiv 2606.20945: about 1.15 at 2,048 tokens, 1.67 to 1.80 from 4,096 up.
PAPER_SHORT, PAPER_LONG = (2048, 1.15), (4096, 1.67, 1.80)


def lines(document: Mapping[str, Any], level: str) -> dict[str, list[tuple[int, dict]]]:
    """(length, ratio) pairs by the legend's text, without single short sequences."""
    tokens = document["settings"]["tokens"]
    found: dict[str, list[tuple[int, dict]]] = {}
    for case in document["cases"]:
        if case["level"] != level or case["ratio"] is None:
            continue
        if case["batch"] != max(1, tokens // case["length"]):
            continue
        kind = "forward + backward" if case["training"] else "forward"
        name = f"{kind}, D = {case['head_dim']}, k = {case['top_k']}"
        found.setdefault(name, []).append((case["length"], case["ratio"]))
    return {name: sorted(points, key=lambda x: x[0]) for name, points in found.items()}


def draw(path: pathlib.Path, document: Mapping[str, Any]) -> None:
    """Writes the PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    levels = [level for level in PANELS if lines(document, level)] or ["op"]
    figure, grid = pyplot.subplots(
        1,
        len(levels),
        figsize=(5 * len(levels), 5),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    panels = grid[0]
    for axes, level in zip(panels, levels, strict=True):
        found = lines(document, level)
        lengths = sorted({length for points in found.values() for length, _ in points})
        for name, points in found.items():
            x, ratios = zip(*points, strict=True)
            middle = [ratio["median"] for ratio in ratios]
            errors = [
                [ratio["median"] - ratio["q1"] for ratio in ratios],
                [ratio["q3"] - ratio["median"] for ratio in ratios],
            ]
            style = "--" if "backward" in name else "-"
            axes.errorbar(x, middle, errors, fmt=style, marker="o", capsize=2, label=name)
        axes.axhline(BOUND, color="grey", linewidth=1, label="work left out: 16/9")
        axes.axhline(1, color="black", linewidth=0.5)
        if lengths and lengths[-1] >= PAPER_LONG[0]:
            start, low, high = PAPER_LONG
            axes.fill_between(
                [start, lengths[-1]], low, high, color="grey", alpha=0.2, label="the paper's figure"
            )
            axes.plot(*PAPER_SHORT, marker="x", color="grey", linestyle="none")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axes.set_title(PANELS[level])
        axes.set_xlabel("tokens")
        axes.legend(fontsize="small")
    panels[0].set_ylabel("time of dense GQA / time of GQE")
    figure.suptitle(f"{document['device']}, {document['settings']['dtype']}, causal")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    pyplot.close(figure)
    write(path, buffer.getvalue())
