"""The backward kernel of the projection: gradients of its products, side by side.

The gradients of the selected queries go to their experts' columns, those of the means to all
groups; queries and keys are rotated back. The router's, float32, become three parts, so that its
weight's gradient is as exact as a float32 product; the first part comes once more, for the second
part of the weight in the tokens' gradient. What is left are two products, which XLA computes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from gqe_kernels.pallas_tpu.layout import (
    LANES,
    Layout,
    expand_query,
    for_row_chunks,
    half_mask,
    result_shape,
    swap_halves,
    widen,
)
from gqe_kernels.pallas_tpu.project import Columns, Outputs, rotate
from gqe_kernels.projection import split_float32


def _kernel(
    gradients: Any,  # Outputs, of references
    index_ref,
    cos_ref,
    sin_ref,
    out_ref,
    *,
    layout: Layout,
    columns: Columns,
):
    row, per_row = layout.row, layout.groups_per_unit

    def write_rows(rows, first):
        del first
        cos, sin = cos_ref[rows], -sin_ref[rows]

        def read(ref, n):
            return ref[rows, n * row : (n + 1) * row].astype(jnp.float32)

        def write(n, x):
            out_ref[rows, n * row : n * row + x.shape[1]] = x.astype(out_ref.dtype)

        @functools.cache
        def query(n):
            return rotate(layout, read(gradients.query, n), cos, sin)

        @functools.cache
        def head(h):
            """The gradient of a head's query; where a row holds two heads, in both halves."""
            x = query(h // per_row)
            return x if per_row == 1 else jnp.where(half_mask(x.shape, h % 2), x, swap_halves(x))

        index: Any = None
        if index_ref is not None:
            by_token = _by_token([index_ref[j, :, rows] for j in range(layout.k)], columns)

            def index(h):
                group, rank = divmod(h, layout.k)
                column = rank * columns.padded_groups + group
                return by_token[:, column : column + 1]

        expand_query(layout, head, index, write)
        first_row = layout.group * layout.expert // per_row
        for ref, mean_ref, turned in (
            (gradients.key, gradients.shared_key, True),
            (gradients.value, gradients.shared_value, False),
        ):
            mean: Any = None
            if mean_ref is not None:
                mean = widen(layout, mean_ref[rows].astype(jnp.float32)) / layout.group
                mean = mean if per_row == 1 else mean + swap_halves(mean)
            for u in range(layout.units):
                x = read(ref, u) if mean is None else read(ref, u) + mean
                write(first_row + u, rotate(layout, x, cos, sin) if turned else x)
            first_row += layout.units
        narrow: Any = None
        if gradients.logits is not None:
            d_logits = [gradients.logits[m, :, rows] for m in range(columns.expert)]
            narrow = _router_columns(d_logits, columns)
        if gradients.shared_query is not None:
            x = widen(layout, gradients.shared_query[rows].astype(jnp.float32))
            x = _padded(rotate(layout, x, cos, sin), columns.lanes, axis=1)
            narrow = x if narrow is None else x + narrow
        if narrow is not None:
            write(first_row, narrow)

    for_row_chunks(out_ref.shape[0], "unproject", write_rows)


def _by_token(arrays: list[jax.Array], columns: Columns) -> jax.Array:
    """Arrays [group, token], one below the other, as [token, lanes]."""
    stacked = jnp.concatenate([_padded(x, columns.padded_groups) for x in arrays], axis=0)
    return _padded(stacked, -(-len(stacked) // LANES) * LANES).T


def _padded(x: jax.Array, size: int, axis: int = 0) -> jax.Array:
    missing = list(x.shape)
    missing[axis] = size - x.shape[axis]
    return jnp.concatenate([x, jnp.zeros(missing, x.dtype)], axis) if missing[axis] else x


def _router_columns(gradients: list[jax.Array], columns: Columns) -> jax.Array:
    """The router's columns [token, lanes] of the narrow product's gradient; zero elsewhere."""
    parts = [split_float32(x, 3) if columns.parts > 1 else [x] for x in gradients]
    ordered = [of_expert[p] for p in range(len(parts[0])) for of_expert in parts]
    ordered += ordered[: len(parts)] if columns.parts > 1 else []
    rows = [_padded(x, columns.padded_groups) for x in ordered]
    if columns.head_dim:
        rows = [jnp.zeros((columns.head_dim, rows[0].shape[1]), jnp.float32), *rows]
    return _padded(jnp.concatenate(rows, axis=0), columns.lanes).T


def unproject(
    gradients: Outputs,
    index: Int[Array, "batch k group length"] | None,
    cos: Float[Array, "#batch length row"],
    sin: Float[Array, "#batch length row"],
    *,
    layout: Layout,
    columns: Columns,
    block: int,
    vmem_bytes: int,
) -> Float[Array, "batch length columns"]:
    """Gradients of the products with the weights of query, key, value, and the narrow one.

    Args:
      gradients: of the outputs of `project`.
      columns: of the narrow product, with the parts of a gradient.
      block: tokens of a grid step; a multiple of 128.
    """
    batch, length, _ = gradients.key.shape
    rows = layout.group * layout.expert // layout.groups_per_unit + 2 * layout.units
    lanes = rows * layout.row + columns.lanes

    def tokens(x):
        if x.ndim == 4:  # tokens in the lanes
            return pl.BlockSpec((None, *x.shape[1:3], block), lambda b, i: (b, 0, 0, i))
        return pl.BlockSpec((None, block, x.shape[2]), lambda b, i: (b, i, 0))

    def angles(a):
        return pl.BlockSpec(
            (None, block, a.shape[2]), lambda b, i: (b if a.shape[0] > 1 else 0, i, 0)
        )

    out = result_shape(gradients.key, (batch, length, lanes), gradients.key.dtype)
    moved = jax.tree.leaves((gradients, index, cos, sin, out))
    return pl.pallas_call(
        functools.partial(_kernel, layout=layout, columns=columns),
        grid=(batch, -(-length // block)),
        in_specs=[
            jax.tree.map(tokens, gradients),
            None if index is None else tokens(index),
            angles(cos),
            angles(sin),
        ],
        out_specs=tokens(out),
        out_shape=out,
        cost_estimate=pl.CostEstimate(
            flops=0,
            bytes_accessed=sum(y.size * y.dtype.itemsize for y in moved),
            transcendentals=0,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem_bytes
        ),
        name="gqe_unproject",
    )(gradients, index, cos, sin)
