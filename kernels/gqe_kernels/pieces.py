"""Queries that stand in several pieces of the sequence, for implementations that know of one."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

# Of the operands of `routed_attention`, and of `dense_attention`: those with a row for each query.
_OF_QUERIES = (0, 3, 4, 5)


def by_pieces(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function`, called for each piece of the queries where `q_offset` is [batch, piece]."""

    @functools.wraps(function)
    def call(*operands: Array | None, q_offset: Any, q_segment_ids: Any, **masking: Any) -> Array:
        if jnp.ndim(q_offset) < 2:
            return function(*operands, q_offset=q_offset, q_segment_ids=q_segment_ids, **masking)
        pieces = q_offset.shape[1]

        def rows(x, piece):
            return None if x is None else jnp.split(x, pieces, axis=1)[piece]

        slots = [
            function(
                *(rows(x, piece) if n in _OF_QUERIES else x for n, x in enumerate(operands)),
                q_offset=q_offset[:, piece],
                q_segment_ids=rows(q_segment_ids, piece),
                **masking,
            )
            for piece in range(pieces)
        ]
        return jnp.concatenate(slots, axis=1)

    return call
