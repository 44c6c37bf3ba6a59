"""A heat map of how often a token selects both of two experts."""

import numpy as np
from jaxtyping import Float

from gqe_jax.report.curves import panels, png, styled


@styled
def pairs(shares: Float[np.ndarray, "layer n n"], experts: int, same_group_possible: bool) -> bytes:
    """A PNG with one heat map per layer: the fraction of tokens routed to both of two experts.

    Args:
      shares: from `measures.pair_shares`.
      experts: experts per group.
      same_group_possible: whether k > 1; otherwise pairs within a group are left blank.
    """
    layers, count, _ = shares.shape
    group = np.arange(count) // experts
    blank = np.eye(count, dtype=bool)
    if not same_group_possible:
        blank |= group[:, None] == group
    shown = np.ma.array(shares, mask=np.broadcast_to(blank, shares.shape))
    columns = min(layers, 4)
    rows = -(-layers // columns)
    width = min(8.5, 3 * columns + 1)
    figure, grid = panels(rows, columns, width, (width / columns + 0.3) * rows + 0.6)
    names = [f"{n // experts}·{n % experts}" for n in range(count)]
    ticks = np.arange(0, count, 1 if count <= 16 else experts)
    images = []
    for layer, axes in enumerate(grid.flat):
        axes.set_visible(layer < layers)
        if layer >= layers:
            continue
        scale = {"cmap": "cividis", "vmin": 0, "vmax": max(shown.max(), 1e-6)}
        images.append(axes.imshow(shown[layer], **scale))
        axes.set_title(f"layer {layer}")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_xticks(
            ticks, [names[n] for n in ticks], fontsize=6 if count > 8 else 7, rotation=90
        )
        axes.set_yticks(ticks, [names[n] for n in ticks], fontsize=6 if count > 8 else 7)
        axes.tick_params(length=0)
    label = "fraction of tokens routed to both"
    bar = figure.colorbar(images[-1], ax=grid, location="top", shrink=0.5, aspect=40, label=label)
    bar.outline.set_visible(False)
    return png(figure)
