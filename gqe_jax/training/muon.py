"""Muon for the matrices of the model (arXiv 2502.16982), made of Optax's parts.

A kernel is one or several matrices from its reduction axes to its output axes; all other axes, such
as that of the layers, count matrices. Keys, values and the output projection are one matrix each. A
query head is a matrix of its own, because a token computes only those that it selects. Embeddings,
the router and the scales of norms are no matrices of this kind.
"""

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

MATRICES = {
    "query": MuonDimensionNumbers(-4, -1),  # [..., embed, group, expert, head_dim]
    "key": MuonDimensionNumbers(-3, (-2, -1)),  # [..., embed, group, head_dim]
    "value": MuonDimensionNumbers(-3, (-2, -1)),
    "out": MuonDimensionNumbers((-3, -2), -1),  # [..., slot, head_dim, embed]
    "shared_query": MuonDimensionNumbers(-2, -1),  # [..., embed, head_dim]
    "shared_key": MuonDimensionNumbers(-2, -1),
    "shared_value": MuonDimensionNumbers(-2, -1),
    "gate": MuonDimensionNumbers(-2, -1),
    "up": MuonDimensionNumbers(-2, -1),
    "down": MuonDimensionNumbers(-2, -1),
}
_RMS = 0.2  # of an update's elements, which is that of AdamW: both take the same learning rate


def muon(
    others: optax.GradientTransformation, *, momentum_dtype: str
) -> optax.GradientTransformation:
    """Muon for the kernels in `MATRICES`, before decay and learning rate; `others` for the rest.

    Args:
      others: what scales the updates of all other parameters.
      momentum_dtype: dtype in which the mean of gradients is stored.
    """
    matrices = optax.chain(
        scale_by_muon(mu_dtype=momentum_dtype, weight_dimension_numbers=_dimensions),
        optax.stateless(lambda updates, params: jax.tree.map(_rescale, updates, _sizes(updates))),
    )
    return optax.partition({"muon": matrices, "others": others}, _labels)


def names_of(path: tuple) -> list[str]:
    """The names of modules and of the parameter on a path in a tree of parameters."""
    return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]


def _matrix(path: tuple) -> MuonDimensionNumbers | None:
    names = names_of(path)
    return MATRICES.get(names[-2]) if names[-1:] == ["kernel"] else None


def _labels(params: optax.Params) -> optax.Params:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "others" if _matrix(path) is None else "muon", params
    )


def _dimensions(params: optax.Params) -> optax.Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: _matrix(path), params)


def _sizes(params: optax.Params) -> optax.Params:
    """The larger side of each kernel's matrices."""

    def of(path, x):
        sides = _matrix(path)
        assert sides is not None, path
        return max(_product(x.shape, sides.reduction_axis), _product(x.shape, sides.output_axis))

    return jax.tree_util.tree_map_with_path(of, params)


def _product(shape: tuple[int, ...], axes) -> int:
    product = 1
    for axis in (axes,) if isinstance(axes, int) else axes:
        product *= shape[axis]
    return product


def _rescale(update, size: int):
    """An orthogonal matrix whose larger side is `size` has the mean square 1 / size."""
    return _RMS * size**0.5 * update
