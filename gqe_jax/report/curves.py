"""Plots of a run's metrics: losses, the optimizer, expert load and router entropy."""

import contextlib
import dataclasses
import io
import math
import os
from collections.abc import Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.rcsetup
import numpy as np
from jaxtyping import Float

from gqe_jax.errors import DataError, UserError
from gqe_jax.storage import Location, location, write_whole
from gqe_jax.training import goodput
from gqe_jax.training.telemetry import METRICS_FILE, read_metrics

DIRECTORY = "report"
# Okabe and Ito's palette, safe for colour-blind readers; page.css uses the same.
_TRAINING = ("step", "loss", "learning_rate", "grad_norm", "clipped_grad_norm")
_EVALUATIONS = ("step", "eval_loss", "eval_bits_per_byte")
_ROUTED = {"expert_load": 3, "router_entropy": 2}
"""Metrics that only routed variants have, and the numbers of their axes."""
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c8c", "#f0e442")
_STYLE = {
    "axes.grid": True,
    "axes.prop_cycle": matplotlib.rcsetup.cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.2,
}
styled = matplotlib.rc_context(_STYLE)
"""Decorator that applies the style to a plotting function."""


class NoMetricsError(UserError, FileNotFoundError):
    """A run has no metrics of training steps."""


@dataclasses.dataclass(frozen=True)
class Curves:
    """A run's metrics, as arrays whose first axis is the logged step."""

    label: str
    training: dict[str, np.ndarray]
    evaluations: dict[str, np.ndarray]
    """Empty before the first evaluation."""
    goodput: dict[str, Any] | None = None
    """The last record of what the run's time was spent on."""

    @classmethod
    def read(cls, run_dir: str | os.PathLike, label: str = "") -> "Curves":
        """Reads the metrics from a run's directory.

        Raises:
          NoMetricsError: the directory has no metrics of training steps.
          DataError: they are damaged.
        """
        lines = read_metrics(run_dir)
        training = [line for line in lines if "loss" in line]
        if not training:
            raise NoMetricsError(
                f"{run_dir} has no metrics of training steps; name the run directory of train.py"
            )
        evaluations = [line for line in lines if "eval_loss" in line]
        routed = [name for name in _ROUTED if any(name in line for line in training)]
        columns = [
            _columns(run_dir, training, [*_TRAINING, *routed]),
            _columns(run_dir, evaluations, _EVALUATIONS if evaluations else []),
        ]
        return cls(label, *columns, goodput=goodput.latest(lines))

    @property
    def expert_load(self) -> Float[np.ndarray, "step layer group expert"] | None:
        """Fraction of tokens routed to each expert; None for the dense baseline."""
        return self.training.get("expert_load")


def draw(run_dir: str | os.PathLike) -> list[Location]:
    """Plots a run's metrics to PNG files in its `report/`.

    Returns:
      The files: loss, learning rate and gradient norms; for a routed variant also expert load and
      router entropy per layer and group.

    Raises:
      NoMetricsError: the run has no metrics.
      DataError: they are damaged.
    """
    curves = Curves.read(run_dir)
    images = {"loss.png": loss([curves]), "optimizer.png": optimizer(curves)}
    if curves.expert_load is not None:
        images["expert_load.png"] = expert_load(curves)
        images["router_entropy.png"] = router_entropy(curves)
    directory = location(run_dir) / DIRECTORY
    for name, image in images.items():
        write_whole(directory / name, image)
    return [directory / name for name in images]


def panels(rows: int, columns: int, width: float, height: float, **kwargs: Any):
    """A figure of this size in inches, and its axes [rows, columns]."""
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def png(figure: matplotlib.figure.Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    return buffer.getvalue()


@styled
def loss(runs: Sequence[Curves]) -> bytes:
    """Training and held-out loss of all runs in one plot."""
    figure, ((axes,),) = panels(1, 1, 8, 4)
    for number, run in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        name = f"{run.label}, " if len(runs) > 1 else ""
        axes.plot(
            run.training["step"],
            run.training["loss"],
            color=colour,
            alpha=0.55,
            label=_plain(f"{name}training"),
        )
        if run.evaluations:
            axes.plot(
                run.evaluations["step"],
                run.evaluations["eval_loss"],
                "o-",
                color=colour,
                markeredgecolor="white",
                label=_plain(f"{name}held-out"),
            )
    axes.set(xlabel="step", ylabel="cross-entropy, nats per token")
    axes.legend()
    return png(figure)


@styled
def optimizer(run: Curves) -> bytes:
    """Learning rate, and gradient norms before and after clipping."""
    figure, ((rate,), (norm,)) = panels(2, 1, 8, 5, sharex=True)
    steps = run.training["step"]
    rate.plot(steps, run.training["learning_rate"])
    rate.set(ylabel="learning rate", ylim=(0, None))
    norm.plot(steps, run.training["grad_norm"], label="gradient norm")
    norm.plot(steps, run.training["clipped_grad_norm"], label="after clipping")
    norm.set(xlabel="step", ylabel="global norm", yscale="log")
    norm.legend()
    return png(figure)


@styled
def expert_load(run: Curves) -> bytes:
    """Fraction of tokens routed to each expert over the steps; one panel per layer and group."""
    steps, load = run.training["step"], run.training["expert_load"]
    _, layers, groups, experts = load.shape
    figure, grid = panels(
        layers, groups, 1.6 * groups + 1, 1.2 * layers + 1, sharex=True, sharey=True
    )
    for layer, group in np.ndindex(layers, groups):
        axes = grid[layer, group]
        axes.plot(steps, load[:, layer, group])
        axes.set_ylim(0, 1)
        if layer == 0:
            axes.set_title(f"group {group}")
        if group == 0:
            axes.set_ylabel(f"layer {layer}")
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("fraction of tokens", fontsize=9)
    if experts <= len(COLOURS):
        names = [f"expert {expert}" for expert in range(experts)]
        figure.legend(names, loc="outside upper right", ncols=min(experts, 4))
    return png(figure)


@styled
def router_entropy(run: Curves) -> bytes:
    """Mean router entropy over log M, its maximum; one panel per layer, one line per group."""
    steps, entropy = run.training["step"], run.training["router_entropy"]
    _, layers, groups = entropy.shape
    uniform = math.log(run.training["expert_load"].shape[-1]) or 1.0  # M = 1: both entropies are 0
    columns = min(layers, 4)
    rows = -(-layers // columns)
    figure, grid = panels(rows, columns, 8.5, 1.8 * rows + 0.8, sharex=True, sharey=True)
    for layer, axes in enumerate(grid.flat):
        axes.set_visible(layer < layers)
        if layer < layers:
            axes.plot(steps, entropy[:, layer] / uniform)
            axes.set(title=f"layer {layer}", ylim=(0, 1.05))
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("entropy / log M", fontsize=9)
    if groups <= len(COLOURS):
        names = [f"group {group}" for group in range(groups)]
        figure.legend(names, loc="outside upper right", ncols=min(groups, 4))
    return png(figure)


def _columns(
    run_dir: str | os.PathLike, lines: list[dict[str, Any]], required: Sequence[str]
) -> dict[str, np.ndarray]:
    """One array per metric that every line has, in numbers of one shape."""
    names = set.intersection(*(set(line) for line in lines)) if lines else set()
    columns = {}
    for name in names:
        with contextlib.suppress(ValueError, OverflowError):  # not all have one shape
            column = np.array([line[name] for line in lines])
            if column.dtype.kind in "iuf" and column.ndim == 1 + _ROUTED.get(name, 0):
                columns[name] = column
    for name in required:
        if name not in columns or not columns[name].size:
            raise DataError(
                f"{location(run_dir) / METRICS_FILE}: {name} is not in every record, or not "
                "everywhere a number or array of one shape; delete the damaged lines"
            )
    return columns


def _plain(text: str) -> str:
    """Text escaped for a legend: matplotlib parses "$" and hides labels that begin with "_"."""
    return "\N{ZERO WIDTH SPACE}" * text.startswith("_") + text.replace("$", r"\$")
