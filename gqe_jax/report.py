"""Draws a run's metrics: `python -m gqe_jax.report RUN_DIR`."""

import os
import pathlib
import sys
from typing import Any

import matplotlib.figure
import numpy as np

from gqe_jax.telemetry import read_metrics

DIRECTORY = "report"


def draw(run_dir: str | os.PathLike) -> list[pathlib.Path]:
    """Writes the PNG files of a run to its `report/`; those that it has metrics for.

    Returns:
      The files: loss, learning rate and gradient norms, expert load by layer and group.

    Raises:
      FileNotFoundError: the run has no metrics.
    """
    lines = read_metrics(run_dir)
    training = [line for line in lines if "loss" in line]
    if not training:
        raise FileNotFoundError(f"{run_dir} has no metrics of training steps")
    directory = pathlib.Path(run_dir) / DIRECTORY
    directory.mkdir(exist_ok=True)
    figures = {
        "loss.png": _loss(training, [line for line in lines if "eval_loss" in line]),
        "optimizer.png": _optimizer(training),
    }
    if "expert_load" in training[0]:
        figures["expert_load.png"] = _expert_load(training)
    paths = []
    for name, figure in figures.items():
        paths.append(directory / name)
        figure.savefig(paths[-1], dpi=120)
    return paths


def _series(lines: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([line[name] for line in lines])


def _figure(rows: int, columns: int, width: float, height: float, **kwargs):
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _loss(training, evaluations) -> matplotlib.figure.Figure:
    figure, ((axes,),) = _figure(1, 1, 7, 4)
    axes.plot(_series(training, "step"), _series(training, "loss"), linewidth=1, label="training")
    if evaluations:
        axes.plot(
            _series(evaluations, "step"), _series(evaluations, "eval_loss"), "o-", label="held-out"
        )
    axes.set(xlabel="step", ylabel="cross-entropy, nats per token", title="Loss")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def _optimizer(training) -> matplotlib.figure.Figure:
    figure, ((rate,), (norm,)) = _figure(2, 1, 7, 5, sharex=True)
    steps = _series(training, "step")
    rate.plot(steps, _series(training, "learning_rate"))
    rate.set(ylabel="learning rate", ylim=(0, None))
    norm.plot(steps, _series(training, "grad_norm"), linewidth=1, label="gradient norm")
    norm.plot(steps, _series(training, "clipped_grad_norm"), linewidth=1, label="after clipping")
    norm.set(xlabel="step", ylabel="global norm", yscale="log")
    norm.legend()
    for axes in (rate, norm):
        axes.grid(alpha=0.3)
    return figure


def _expert_load(training) -> matplotlib.figure.Figure:
    """A panel a layer and group: the share of tokens that took each expert."""
    steps, load = _series(training, "step"), _series(training, "expert_load")
    _, layers, groups, experts = load.shape
    figure, panels = _figure(
        layers, groups, 1.6 * groups + 1, 1.2 * layers + 1, sharex=True, sharey=True
    )
    for layer, group in np.ndindex(layers, groups):
        axes = panels[layer, group]
        axes.plot(steps, load[:, layer, group], linewidth=1)
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
        if layer == 0:
            axes.set_title(f"group {group}", fontsize=9)
        if group == 0:
            axes.set_ylabel(f"layer {layer}", fontsize=9)
    figure.suptitle("Share of tokens that took each expert")
    figure.supxlabel("step")
    names = [f"expert {expert}" for expert in range(experts)]
    if experts <= 8:
        figure.legend(names, loc="outside lower right", ncols=experts, fontsize=8)
    return figure


def main() -> None:
    """The command line."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m gqe_jax.report RUN_DIR")
    try:
        print("\n".join(map(str, draw(sys.argv[1]))))
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
