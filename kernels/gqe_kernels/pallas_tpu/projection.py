"""The projection on TPU: its operands laid flat for the kernels, forward and backward."""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gqe_kernels.contract import Routed
from gqe_kernels.pallas_tpu.blocks import claim, lowered_chip, tuned
from gqe_kernels.pallas_tpu.layout import LANES, Layout, takes
from gqe_kernels.pallas_tpu.project import Columns, Outputs, Weights, project
from gqe_kernels.pallas_tpu.project_backward import unproject
from gqe_kernels.projection import Projected, Projection, router_parts


class Blocks(NamedTuple):
    """How the kernels divide their work: tokens of a grid step, and parts of the groups."""

    block: int
    chunks: int
    vmem_bytes: int


def unsupported(x: Array, projection: Projection) -> str | None:
    """The argument that the kernels cannot take, with the reason; None if they take them all."""
    embed, group, _, head_dim = projection.query.shape
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x: dtype {x.dtype}, where bfloat16 or float32 is needed"
    if x.size == 0:
        return f"x: shape {x.shape}, which is empty"
    if embed % LANES:
        return f"x: embed {embed}, where a multiple of {LANES} is needed"
    if not takes(group, head_dim):
        return (
            f"projection: {group} groups of head_dim {head_dim}, where a multiple of {LANES}, or "
            f"{LANES // 2} with an even number of groups, is needed"
        )
    if projection.router is not None and projection.top_k * -(-group // 8) * 8 > LANES:
        return f"projection: top_k {projection.top_k} of {group} groups, more than {LANES} columns"
    if default_blocks(projection, x) is None:
        return f"projection: weights of shape {projection.query.shape}, which do not fit in VMEM"
    return None


def _layout(projection: Projection) -> Layout:
    _, group, expert, head_dim = projection.query.shape
    k = expert if projection.router is None else projection.top_k
    has_shared = projection.shared_query is not None
    return Layout(group, expert, k, head_dim, weighted=False, shared=has_shared)


def _columns(projection: Projection, parts: int) -> Columns:
    """Of the narrow product: the shared query's, and the router's in so many parts."""
    _, group, expert, head_dim = projection.query.shape
    if projection.router is None:
        group = expert = 0
    return Columns(head_dim if projection.shared_query is not None else 0, group, expert, parts)


def default_blocks(projection: Projection, x: Array, chip: str | None = None) -> Blocks | None:
    """The least parts of the weights that leave room for a block of tokens; None if none does.

    Weights in parts are read for every block again, so blocks are longer then.

    Args:
      chip: a key of `CHIPS`; None: the chip that is lowered for.
    """
    layout, narrow = _layout(projection), _columns(projection, 3).lanes
    _, length, embed = x.shape
    itemsize = x.dtype.itemsize
    vmem_bytes = tuned(chip or lowered_chip(), layout.head_dim, length).vmem_bytes
    rows = layout.group * layout.expert // layout.groups_per_unit + 2 * layout.units
    for chunks in range(1, layout.units + 1):
        if layout.units % chunks:
            continue
        for most in (512, 256) if chunks == 1 else (1024, 512, 256):
            block = min(most, -(-length // LANES) * LANES)
            columns = rows // chunks * layout.row
            weights = (columns * min(chunks, 2) + narrow) * embed * itemsize
            moved = 2 * block * itemsize * (embed + columns + 3 * layout.row)
            angles = 4 * block * max(layout.row, LANES) * 4
            # Float32 rows of heads that wait to be written, and what the compiler spills.
            temporaries = 4 * block * (16 * layout.row + 2 * narrow)
            needed = weights + moved + angles + temporaries
            if needed <= vmem_bytes:
                return Blocks(block, chunks, claim(needed, vmem_bytes))
    return None


def _backward_block(layout: Layout, length: int, itemsize: int, vmem_bytes: int) -> int:
    rows = layout.group * layout.expert // layout.groups_per_unit + 2 * layout.units + 2
    for most in (512, 256, LANES):
        block = min(most, -(-length // LANES) * LANES)
        if 2 * itemsize * block * 2 * rows * layout.row + 2**22 <= vmem_bytes:
            break
    return block


def _weights(projection: Projection, router_parts: list[Array]) -> Weights:
    """The weights as the kernels read them.

    Args:
      router_parts: of the router's weight [embed, group, expert], for the narrow product's columns.
    """
    layout, columns = _layout(projection), _columns(projection, len(router_parts))
    beyond = columns.padded_groups - columns.group
    shared, narrow = projection.shared_query, []
    embed, dtype = len(projection.query), projection.query.dtype

    def flat(weight: Array) -> Array:
        return weight.reshape(embed, -1)

    def scale(x: Array | None) -> Array | None:
        return None if x is None else jnp.tile(x.astype(jnp.float32), layout.groups_per_unit)[None]

    if shared is not None:
        narrow.append(shared)
    for part in router_parts:
        by_expert = jnp.moveaxis(part.astype(dtype), 1, 2)
        narrow.append(flat(jnp.pad(by_expert, ((0, 0), (0, 0), (0, beyond)))))
    bias = projection.selection_bias
    if bias is not None:  # a column for each expert, which the tokens in the lanes share
        bias = jnp.pad(bias.astype(jnp.float32).T, ((0, 0), (0, beyond)))
        bias = jnp.broadcast_to(bias[:, :, None], (*bias.shape, LANES))
    if narrow:
        used = sum(x.shape[1] for x in narrow)
        narrow.append(jnp.zeros((embed, columns.lanes - used), dtype))
    return Weights(
        query=flat(projection.query),
        key=flat(projection.key),
        value=flat(projection.value),
        narrow=jnp.concatenate(narrow, axis=1) if narrow else None,
        selection_bias=bias,
        query_scale=scale(projection.query_scale),
        key_scale=scale(projection.key_scale),
    )


def _angles(layout: Layout, projection: Projection) -> tuple[Array, Array]:
    """Cosines and sines for each lane of a row; the sines with the sign of their half."""
    cos, sin = projection.cos, projection.sin
    per_row = layout.groups_per_unit
    return (
        jnp.concatenate([cos, cos] * per_row, axis=2),
        jnp.concatenate([-sin, sin] * per_row, axis=2),
    )


def _by_token(x: Array | None) -> Any:
    """[batch, n, group, length] as [batch, length, group, n]; its own inverse."""
    return None if x is None else jnp.swapaxes(x, 1, 3)


@jax.enable_x64(False)  # Mosaic has no 64-bit integers
def forward(
    x: Float[Array, "batch length embed"], projection: Projection, *, blocks: Blocks | None = None
) -> Projected:
    """As `gqe_kernels.projection.reference`, by the kernel.

    Args:
      blocks: None: `default_blocks`.
    """
    layout = _layout(projection)
    blocks = blocks or default_blocks(projection, x)
    assert blocks is not None  # or the shape would be unsupported
    parts = router_parts(projection.router, projection.query.dtype, backward=False)
    out = project(
        x,
        _weights(projection, parts),
        *_angles(layout, projection),
        layout=layout,
        columns=_columns(projection, len(parts)),
        means=projection.means,
        epsilon=projection.epsilon,
        **blocks._asdict(),
    )
    keys = (*x.shape[:2], layout.group, layout.head_dim)
    routed = Routed(
        query=out.query.reshape(*x.shape[:2], layout.group, layout.k, layout.head_dim),
        key=out.key.reshape(keys),
        value=out.value.reshape(keys),
        shared_query=out.shared_query,
        shared_key=out.shared_key,
        shared_value=out.shared_value,
    )
    return Projected(routed, _by_token(out.logits), _by_token(out.expert_index))


@jax.enable_x64(False)
def backward(
    x: Float[Array, "batch length embed"],
    projection: Projection,
    expert_index: Int[Array, "batch length group k"] | None,
    d_routed: Routed,
    d_logits: Float[Array, "batch length group expert"] | None,
) -> tuple[Float[Array, "batch length embed"], Projection]:
    """Gradients of the tokens and of the weights, from those of the outputs.

    Both products take the gradients of all columns at once: each is summed in float32 and rounded
    once.
    """
    layout, (batch, length, _) = _layout(projection), x.shape
    vmem_bytes = tuned(lowered_chip(), layout.head_dim, length).vmem_bytes
    parts = router_parts(projection.router, projection.query.dtype, backward=True)
    columns, weights = _columns(projection, len(parts)), _weights(projection, parts)

    def flat(y: Array) -> Array:
        return y.reshape(batch, length, -1)

    d_columns = unproject(
        Outputs(
            flat(d_routed.query),
            flat(d_routed.key),
            flat(d_routed.value),
            d_routed.shared_query,
            d_routed.shared_key,
            d_routed.shared_value,
            _by_token(d_logits),
        ),
        _by_token(expert_index),
        *_angles(layout, projection),
        layout=layout,
        columns=columns,
        block=_backward_block(layout, length, x.dtype.itemsize, vmem_bytes),
        vmem_bytes=vmem_bytes,
    )
    matrices = [weights.query, weights.key, weights.value]
    matrices += [] if weights.narrow is None else [weights.narrow]
    precision: Any = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    of_all = jnp.concatenate(matrices, axis=1)
    d_x = jnp.einsum("blc,ec->ble", d_columns, of_all, precision=precision)
    d_weights = jnp.einsum(
        "ble,blc->ec", x, d_columns, precision=precision, preferred_element_type=jnp.float32
    )
    ends = list(itertools.accumulate(w.shape[1] for w in matrices[:3]))
    query, key, value, narrow = jnp.split(d_weights, ends, axis=1)
    router = shared_query = None
    if projection.shared_query is not None:
        shared_query = narrow[:, : layout.head_dim].astype(x.dtype)
    if projection.router is not None:
        exact = 3 if len(parts) > 1 else 1
        rows = (exact, columns.expert, columns.padded_groups)
        first, last = columns.first(0, 0), columns.first(exact, 0)
        router = narrow[:, first:last].reshape(-1, *rows).sum(axis=1)[:, :, : columns.group]
        router = jnp.swapaxes(router, 1, 2)
    bias = projection.selection_bias
    return d_x, dataclasses.replace(
        projection,
        selection_bias=None if bias is None else jnp.zeros_like(bias),
        query=query.astype(x.dtype).reshape(projection.query.shape),
        key=key.astype(x.dtype).reshape(projection.key.shape),
        value=value.astype(x.dtype).reshape(projection.value.shape),
        router=router,
        shared_query=shared_query,
        cos=jnp.zeros_like(projection.cos),
        sin=jnp.zeros_like(projection.sin),
    )
