"""The batch that a training or evaluation step reads."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Windows of the token stream: NumPy arrays of one process's rows, or arrays on the mesh."""

    inputs: Int[Array | np.ndarray, "batch length"]
    targets: Int[Array | np.ndarray, "batch length"]
    weights: Float[Array | np.ndarray, "batch length"]
    """1 for a target, 0 for padding and for what has no loss."""
    segment_ids: Int[Array | np.ndarray, "batch length"] | None = None
    """The document of each token, from 1; 0 for padding."""
