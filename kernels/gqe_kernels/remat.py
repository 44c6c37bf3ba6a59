"""Names by which policies of `jax.checkpoint` know what to keep."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

PROJECTION = "projection"
"""The router's logits, and the experts that they select."""
ATTENTION_OPERANDS = "attention_operands"
"""The operands that an implementation's backward pass reads again, in the layout it reads them in.

Only the residuals have the name, not what the forward pass reads: `jax.checkpoint` rounds, in a
pass of its own, what it keeps if the forward pass reads it, too.
"""
ATTENTION_OUTPUT = "attention_output"
"""What an implementation's forward pass computes for its backward pass."""


def kept[Tree](tree: Tree, name: str) -> Tree:
    """The same arrays, under this name; for a forward rule, since it passes on no derivative.

    Where a policy keeps them, what made them does not run again in the backward pass. Of floats
    the bits are named: `jax.checkpoint` rounds the numbers that it keeps to the type that they
    have, to undo what XLA may have made of them, and on TPU that is a pass over the array, of which
    a kernel's result has no need.
    """

    def keep(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return checkpoint_name(x, name)
        bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        return lax.bitcast_convert_type(checkpoint_name(bits, name), x.dtype)

    return jax.tree.map(keep, tree)
