"""The projection kernel: router, queries, keys, values and means in one pass over the tokens.

The router's product is float32: x in bfloat16 is exact, and the weight is the sum of three bfloat16
parts. They lie beside the shared query's, in columns that the matrix unit has anyway; logits and
selection are computed transposed, [group, token], where they fill the lanes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from gqe_kernels.pallas_tpu.layout import LANES, Layout, half_mask, result_shape, swap_halves
from gqe_kernels.pallas_tpu.tile import NN, dot


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where the shared query's and the router's columns lie in the narrow product.

    Attributes:
      head_dim: columns of the shared query; 0 where there is none.
      group, expert: of the router; 0 where there is none.
      parts: of each weight of the router, or of each of its gradients.
    """

    head_dim: int
    group: int
    expert: int
    parts: int

    @property
    def padded_groups(self) -> int:
        return -(-self.group // 8) * 8

    def first(self, part: int, expert: int) -> int:
        """The column of group 0."""
        return self.head_dim + (part * self.expert + expert) * self.padded_groups

    @property
    def lanes(self) -> int:
        return -(-self.first(self.parts, 0) // LANES) * LANES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """The projections' weights, the bias of the selection, and one row's scale of the norms, as the
    kernel reads them."""

    __no_type_check__ = True

    query: Float[Array, "embed experts_lanes"]
    key: Float[Array, "embed kv_lanes"]
    value: Float[Array, "embed kv_lanes"]
    narrow: Float[Array, "embed lanes"] | None
    selection_bias: Float[Array, "expert padded_groups lanes"] | None = None
    query_scale: Float[Array, "1 row"] | None = None
    key_scale: Float[Array, "1 row"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """The selected queries, keys, values and means, heads side by side in the lanes; the router's
    logits and the selected experts, tokens in the lanes."""

    __no_type_check__ = True

    query: Float[Array, "batch length hard_lanes"]
    key: Float[Array, "batch length kv_lanes"]
    value: Float[Array, "batch length kv_lanes"]
    shared_query: Float[Array, "batch length head_dim"] | None
    shared_key: Float[Array, "batch length head_dim"] | None
    shared_value: Float[Array, "batch length head_dim"] | None
    logits: Float[Array, "batch expert group length"] | None = None
    expert_index: Int[Array, "batch k group length"] | None = None


def rotate(layout: Layout, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rows [q, row] of one head or two, rotated; `sin` has the sign of each half."""
    row, half = layout.row, layout.head_dim // 2
    if row == layout.head_dim:
        return x * cos + pltpu.roll(x, half, 1) * sin
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    first = (lane & half) == 0
    other = jnp.where(first, pltpu.roll(x, row - half, 1), pltpu.roll(x, half, 1))
    return x * cos + other * sin


def norm(layout: Layout, x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Rows [q, row] of one head or two, each head normed."""
    squares = jnp.square(x)
    total = jnp.sum(squares, axis=1, keepdims=True)
    if layout.groups_per_unit == 2:
        lower = half_mask(x.shape, 0)
        first = jnp.sum(jnp.where(lower, squares, 0.0), axis=1, keepdims=True)
        total = jnp.where(lower, first, total - first)
    return x * lax.rsqrt(total / layout.head_dim + epsilon) * scale


def _kernel(
    x_ref,
    weights: Any,  # Weights, of references
    cos_ref,
    sin_ref,
    outputs: Any,  # Outputs, of references
    index_scr,
    sums_scr,
    *,
    layout: Layout,
    columns: Columns,
    chunks: int,
    epsilon: float,
):
    row, chunk = layout.row, pl.program_id(2)
    cos, sin = cos_ref[...], sin_ref[...]
    x = x_ref[...]

    def rows(ref) -> Iterator[jax.Array]:
        """The product's rows of heads, float32; two at a time, where the MXU takes 256 columns."""
        lanes = ref.shape[1]
        width = max(row, 2 * LANES) if lanes % max(row, 2 * LANES) == 0 else row
        for start in range(0, lanes, width):
            y = dot(x, ref[:, start : start + width], NN)
            yield from (y[:, s : s + row] for s in range(0, width, row))

    def finished(y, scale_ref):
        if scale_ref is not None:
            y = norm(layout, y, scale_ref[...], epsilon)
        return rotate(layout, y, cos, sin)

    def write_narrow():
        """The shared query; the logits, and the selected experts as columns [token, head]."""
        y = dot(x, weights.narrow[...], NN)
        if outputs.shared_query is not None:
            shared = finished(y[:, :row], weights.query_scale)[:, : layout.head_dim]
            outputs.shared_query[...] = shared.astype(outputs.shared_query.dtype)
        if outputs.logits is not None:
            logits = _sum_parts(columns, y.T)
            for m, of_expert in enumerate(logits):
                outputs.logits[m] = of_expert[: columns.group]
            if weights.selection_bias is not None:
                logits = [y + weights.selection_bias[m, :, :1] for m, y in enumerate(logits)]
            index = largest(logits, outputs.expert_index.shape[0])
            for j, of_rank in enumerate(index):
                outputs.expert_index[j] = of_rank[: columns.group]
            missing = LANES - len(index) * columns.padded_groups
            if missing:
                index.append(jnp.zeros((missing, x.shape[0]), jnp.int32))
            index_scr[...] = jnp.concatenate(index, axis=0).T

    if weights.narrow is not None:
        write_narrow() if chunks == 1 else pl.when(chunk == 0)(write_narrow)

    def write_query(n, y):
        lanes = slice(n * row, (n + 1) * row)
        y = finished(y, weights.query_scale)
        outputs.query[:, lanes] = y.astype(outputs.query.dtype)

    if index_scr is None:
        for n, y in enumerate(rows(weights.query)):
            write_query(n, y)
    else:
        index = index_scr[...]
        if chunks > 1:  # this part's groups come first
            index = pltpu.roll(index, (LANES - chunk * layout.group) % LANES, 1)

        def chosen(head):
            group, rank = divmod(head, layout.k)
            column = rank * columns.padded_groups + group
            return index[:, column : column + 1]

        _select(layout, rows(weights.query), chosen, write_query)

    sums = []
    for ref, out, scale, turns in (
        (weights.key, outputs.key, weights.key_scale, True),
        (weights.value, outputs.value, None, False),
    ):
        total: Any = None
        for u, y in enumerate(rows(ref)):
            y = finished(y, scale) if turns else y
            total = y if total is None else total + y
            out[:, u * row : (u + 1) * row] = y.astype(out.dtype)
        sums.append(total)

    def write_means(sums):
        for total, out in zip(sums, (outputs.shared_key, outputs.shared_value), strict=True):
            if layout.groups_per_unit == 2:
                total = total + swap_halves(total)
            mean = total * (1.0 / (layout.group * chunks))
            out[...] = mean[:, : layout.head_dim].astype(out.dtype)

    if outputs.shared_key is None:
        return
    if chunks == 1:
        write_means(sums)
        return

    @pl.when(chunk == 0)
    def start_sums():
        for n, total in enumerate(sums):
            sums_scr[n] = total

    @pl.when(chunk > 0)
    def add_sums():
        for n, total in enumerate(sums):
            sums_scr[n] += total

    @pl.when(chunk == chunks - 1)
    def finish_sums():
        write_means([sums_scr[0], sums_scr[1]])


def _sum_parts(columns: Columns, y: jax.Array) -> list[jax.Array]:
    """Each expert's logits [padded_groups, token] from the transposed product."""

    def part(p, m):
        first = columns.first(p, m)
        return y[first : first + columns.padded_groups]

    logits = []
    for m in range(columns.expert):
        total = part(columns.parts - 1, m)  # small parts first
        for p in range(columns.parts - 2, -1, -1):
            total = part(p, m) + total
        logits.append(total)
    return logits


def largest(logits: list[jax.Array], k: int) -> list[jax.Array]:
    """Indices of the k largest of the arrays, elementwise, by rank; ties go to the lower index."""
    logits, found = list(logits), []
    for _ in range(k):
        best, index = logits[0], jnp.zeros(logits[0].shape, jnp.int32)
        for m, of_expert in enumerate(logits[1:], 1):
            larger = of_expert > best
            best, index = jnp.where(larger, of_expert, best), jnp.where(larger, m, index)
        found.append(index)
        if len(found) < k:
            logits = [jnp.where(index == m, -jnp.inf, x) for m, x in enumerate(logits)]
    return found


def _select(
    layout: Layout,
    rows: Iterator[jax.Array],
    index: Callable[[int], jax.Array],
    write: Callable[[int, jax.Array], None],
) -> None:
    """Writes rows of the selected queries.

    Args:
      rows: the queries of all experts.
      index: function of a hard head to the chosen experts [q, 1] within its group.
      write: function of a row's number and its [q, row].
    """
    per_row, taken = layout.groups_per_unit, {}
    waiting: Any = None

    def take(n):
        while n not in taken:
            taken[len(taken)] = next(rows)
        return taken[n]

    for head in range(layout.hard):
        first, own = head // layout.k * layout.expert, index(head)
        chosen: Any = None
        if per_row == 1:
            for m in range(layout.expert):
                y = take(first + m)
                chosen = y if chosen is None else jnp.where(own == m, y, chosen)
            write(head, chosen)
            continue
        for n in range(first // 2, (first + layout.expert - 1) // 2 + 1):
            y = take(n)
            here = own == 2 * n - first + half_mask(y.shape, 1).astype(jnp.int32)
            chosen = jnp.where(here, y, 0.0 if chosen is None else chosen)
        chosen += swap_halves(chosen)  # in both halves
        if head % 2:
            write(head // 2, jnp.where(half_mask(chosen.shape, 1), chosen, waiting))
        waiting = chosen


def project(
    x: Float[Array, "batch length embed"],
    weights: Weights,
    cos: Float[Array, "#batch length row"],
    sin: Float[Array, "#batch length row"],
    *,
    layout: Layout,
    columns: Columns,
    means: bool,
    epsilon: float,
    block: int,
    chunks: int,
    vmem_bytes: int,
) -> Outputs:
    """The projections of the tokens, selected, normed and rotated.

    Args:
      columns: of the narrow product.
      block: tokens of a grid step; a multiple of 128.
      chunks: parts of the groups, whose weights are in VMEM at a time.
    """
    batch, length, embed = x.shape
    routes = columns.expert > 0
    head_dim, row = layout.head_dim, layout.row

    def like_x(lanes) -> Any:
        return result_shape(x, (batch, length, lanes), x.dtype)

    def of_tokens(rows, dtype) -> Any:
        return result_shape(x, (batch, rows, layout.group, length), dtype)

    mean, keys = like_x(head_dim) if means else None, like_x(layout.units * row)
    shapes = Outputs(
        query=like_x(layout.hard * head_dim),
        key=keys,
        value=keys,
        shared_query=like_x(head_dim) if layout.shared else None,
        shared_key=mean,
        shared_value=mean,
        logits=of_tokens(layout.expert, jnp.float32) if routes else None,
        expert_index=of_tokens(layout.k, jnp.int32) if routes else None,
    )

    wide = ("query", "key", "value")  # arrays whose lanes are divided with the groups

    def tokens(y, lanes, chunked):
        if y.ndim == 4:  # tokens in the lanes
            return pl.BlockSpec((None, *y.shape[1:3], block), lambda b, i, c: (b, 0, 0, i))
        return pl.BlockSpec((None, block, lanes), lambda b, i, c: (b, i, c if chunked else 0))

    def of_output(path, y):
        chunked = path[0].name in wide
        return tokens(y, y.shape[2] // chunks if chunked else y.shape[2], chunked)

    def of_weight(path, w):
        if chunks > 1 and path[0].name in wide:
            return pl.BlockSpec((embed, w.shape[1] // chunks), lambda b, i, c: (0, c))
        # Fetched once, and in no need of a second buffer.
        return pl.BlockSpec(w.shape, lambda *_: (0,) * w.ndim, pipeline_mode=pl.Buffered(1))

    def angles(a):
        return pl.BlockSpec((None, block, row), lambda b, i, c: (b if a.shape[0] > 1 else 0, i, 0))

    matrices = [weights.query, weights.key, weights.value, weights.narrow]
    flops = 2 * batch * length * embed * sum(w.shape[1] for w in matrices if w is not None)
    moved = jax.tree.leaves((x, weights, cos, sin, shapes))
    in_part = dataclasses.replace(layout, group=layout.group // chunks)
    return pl.pallas_call(
        functools.partial(_kernel, layout=in_part, columns=columns, chunks=chunks, epsilon=epsilon),
        grid=(batch, -(-length // block), chunks),
        in_specs=[
            tokens(x, embed, False),
            jax.tree_util.tree_map_with_path(of_weight, weights),
            angles(cos),
            angles(sin),
        ],
        out_specs=jax.tree_util.tree_map_with_path(of_output, shapes),
        out_shape=shapes,
        scratch_shapes=[
            pltpu.VMEM((block, LANES), jnp.int32) if routes else None,
            pltpu.VMEM((2, block, row), jnp.float32) if means and chunks > 1 else None,
        ],
        cost_estimate=pl.CostEstimate(
            flops=flops,
            bytes_accessed=sum(y.size * y.dtype.itemsize for y in moved),
            transcendentals=0,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        name="gqe_project",
    )(x, weights, cos, sin)
