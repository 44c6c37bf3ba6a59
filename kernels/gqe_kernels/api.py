"""`routed_attention` and `dense_attention`: the functions people call."""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gqe_kernels import cudnn, decode, pallas_tpu, reference, xla
from gqe_kernels.pieces import by_pieces

Implementation = Literal["reference", "xla", "decode", "pallas_tpu", "pallas_gpu", "cudnn"]

_logger = logging.getLogger(__name__)


def _on_hopper(name: str) -> Callable[..., Array]:
    """A function of `gqe_kernels.pallas_gpu`, which imports Mosaic GPU when it is first called."""

    def call(*operands: Array | None, **masking: Any) -> Array:
        from gqe_kernels import pallas_gpu

        return getattr(pallas_gpu, name)(*operands, **masking)

    return by_pieces(call)


_ROUTED = {
    "reference": by_pieces(reference.routed_attention),
    "xla": by_pieces(xla.routed_attention),
    "decode": by_pieces(decode.routed_attention),
    "pallas_tpu": pallas_tpu.routed_attention,
    "pallas_gpu": _on_hopper("routed_attention"),
    "cudnn": cudnn.routed_attention,
}
_DENSE = {
    "reference": by_pieces(reference.dense_attention),
    "xla": by_pieces(xla.dense_attention),
    "decode": by_pieces(decode.dense_attention),
    "pallas_tpu": pallas_tpu.dense_attention,
    "pallas_gpu": _on_hopper("dense_attention"),
    "cudnn": cudnn.dense_attention,
}


def routed_attention(
    query: Float[Array, "batch q_len group expert head_dim"],
    key: Float[Array, "batch kv_len group head_dim"],
    value: Float[Array, "batch kv_len group head_dim"],
    expert_index: Int[Array, "batch q_len group k"],
    slot_weight: Float[Array, "batch q_len group k"] | None = None,
    shared_query: Float[Array, "batch q_len head_dim"] | None = None,
    shared_key: Float[Array, "batch kv_len head_dim"] | None = None,
    shared_value: Float[Array, "batch kv_len head_dim"] | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    q_segment_ids: Int[Array, "batch q_len"] | None = None,
    kv_segment_ids: Int[Array, "batch kv_len"] | None = None,
    q_offset: int | Int[Array, ""] | Int[Array, "batch"] | Int[Array, "batch piece"] = 0,
    implementation: Implementation | None = None,
) -> Float[Array, "batch q_len slot head_dim"]:
    """Attention of the selected query experts: the slots of a GQE layer, before W_O.

    Source: Grouped Query Experts, arXiv 2606.20945; the hard, weighted and shared slots, in this
    order, `k * group + weighted + shared` of them.

    Args:
      query: the queries of all experts, rotary embedding applied.
      key, value: one head for each group.
      expert_index: the experts that each token selected in each group, by rank; all of a token's
        indices in a group differ.
      slot_weight: the factor of each selected expert in the weighted slot; None: no such slot.
      shared_query: the query of the always-on head; None: no such slot.
      shared_key, shared_value: what the shared head reads; None: the mean over the groups.
      scale: the factor of the logits; None: 1 / sqrt(head_dim).
      causal: query t sees the keys up to position t + q_offset.
      q_segment_ids, kv_segment_ids: tokens see only their own segment. Id 0 is padding: its rows
        are zero and get no gradient. Both or neither.
      q_offset: the position of the first query among the keys, one or one for each row of the
        batch: chunked prefill and decoding. [batch, piece]: the queries are so many pieces of one
        length, each at its own position, in ascending order: a part of a longer sequence.
      implementation: "reference" (float32, quadratic memory), "xla" (linear memory), "decode"
        (whole logits; keys and values are read once), "pallas_tpu" (a TPU kernel), "pallas_gpu" (a
        kernel for Hopper GPUs, by name only: no GPU has run it yet) or "cudnn" (the heads that are
        selected, through `jax.nn.dot_product_attention`). None: "decode" for a single query; else,
        when lowered for TPU, "pallas_tpu", and for CUDA, "cudnn", where they take the arguments;
        "xla" otherwise, which on a GPU is logged, once for each reason.

    Returns:
      The slots in the dtype of `query`: hard slots group-major, within a group by rank.

    Raises:
      ValueError: an argument's shape or dtype does not fit, or the implementation is unknown.
      NotImplementedError: the named implementation does not take an argument.

    >>> import jax, jax.numpy as jnp
    >>> from gqe_kernels import routed_attention
    >>> query = jax.random.normal(jax.random.key(0), (1, 6, 4, 2, 8))  # 4 groups of 2 experts
    >>> key = value = jnp.ones((1, 6, 4, 8))
    >>> expert_index = jnp.zeros((1, 6, 4, 1), jnp.int32)  # every token takes expert 0
    >>> routed_attention(query, key, value, expert_index).shape
    (1, 6, 4, 8)
    """
    batch, q_len, group, _, head_dim = _check_qkv(query, key, value)
    kv_len = key.shape[1]
    if expert_index.ndim != 4 or expert_index.shape[:3] != (batch, q_len, group):
        raise ValueError(
            f"expert_index has shape {expert_index.shape}; query {query.shape} needs "
            f"[{batch}, {q_len}, {group}, k]"
        )
    if not jnp.issubdtype(expert_index.dtype, jnp.integer):
        raise ValueError(f"expert_index has dtype {expert_index.dtype}; it must be an integer type")
    if not 1 <= expert_index.shape[3] <= query.shape[3]:
        raise ValueError(
            f"expert_index selects k = {expert_index.shape[3]} experts of the {query.shape[3]} "
            "in a group; k must be between 1 and the number of experts"
        )
    if slot_weight is not None:
        _check_shape("slot_weight", slot_weight, expert_index.shape)
    if (shared_key is None) != (shared_value is None):
        raise ValueError("shared_key and shared_value must be given together")
    if shared_query is not None:
        _check_shape("shared_query", shared_query, (batch, q_len, head_dim))
    elif shared_key is not None:
        raise ValueError("shared_key and shared_value were given without a shared_query")
    if shared_key is not None:
        _check_shape("shared_key", shared_key, (batch, kv_len, head_dim))
        _check_shape("shared_value", shared_value, (batch, kv_len, head_dim))
    masking = _check_masking(query, key, scale, causal, q_segment_ids, kv_segment_ids, q_offset)
    operands = (
        query,
        key,
        value,
        expert_index,
        slot_weight,
        shared_query,
        shared_key,
        shared_value,
    )
    if implementation is None and q_len == 1:
        implementation = "decode"
    if implementation is not None:
        _check_implementation(implementation, Implementation)
        return _ROUTED[implementation](*operands, **masking)
    by_platform = {"default": _ROUTED["xla"]}
    reason = pallas_tpu.unsupported(
        query, key, expert_index, slot_weight, shared_query, q_offset=q_offset
    )
    if reason is None:
        by_platform["tpu"] = pallas_tpu.routed_attention
    if _by_cudnn("routed_attention", query, key, masking):
        by_platform["cuda"] = cudnn.routed_attention
    bound = {name: functools.partial(f, **masking) for name, f in by_platform.items()}
    return jax.lax.platform_dependent(*operands, **bound)


def dense_attention(
    query: Float[Array, "batch q_len group expert head_dim"],
    key: Float[Array, "batch kv_len group head_dim"],
    value: Float[Array, "batch kv_len group head_dim"],
    *,
    scale: float | None = None,
    causal: bool = True,
    q_segment_ids: Int[Array, "batch q_len"] | None = None,
    kv_segment_ids: Int[Array, "batch kv_len"] | None = None,
    q_offset: int | Int[Array, ""] | Int[Array, "batch"] | Int[Array, "batch piece"] = 0,
    implementation: Implementation | None = None,
) -> Float[Array, "batch q_len slot head_dim"]:
    """Grouped-query attention of all heads: the baseline, on the best kernel of each platform.

    Args:
      query: the queries of every head, by group, rotary embedding applied.
      key, value: one head for each group.
      scale, causal, q_segment_ids, kv_segment_ids, q_offset: as in `routed_attention`.
      implementation: "reference", "xla" (linear memory), "decode" (whole logits), "pallas_tpu" (the
        routed kernel with every expert chosen), "pallas_gpu" (as for `routed_attention`) or "cudnn"
        (through `jax.nn.dot_product_attention`). None: as for `routed_attention`.

    Returns:
      One slot a head, group-major, in the dtype of `query`.

    Raises:
      ValueError: an argument's shape or dtype does not fit, or the implementation is unknown.
      NotImplementedError: the named implementation does not take an argument.
    """
    _check_qkv(query, key, value)
    masking = _check_masking(query, key, scale, causal, q_segment_ids, kv_segment_ids, q_offset)
    if implementation is None and query.shape[1] == 1:
        implementation = "decode"
    if implementation is not None:
        _check_implementation(implementation, Implementation)
        return _DENSE[implementation](query, key, value, **masking)
    by_platform = {"default": _DENSE["xla"]}
    if pallas_tpu.dense_unsupported(query, key, q_offset=q_offset) is None:
        by_platform["tpu"] = pallas_tpu.dense_attention
    if _by_cudnn("dense_attention", query, key, masking):
        by_platform["cuda"] = cudnn.dense_attention
    bound = {name: functools.partial(f, **masking) for name, f in by_platform.items()}
    return jax.lax.platform_dependent(query, key, value, **bound)


def _by_cudnn(name: str, query, key, masking) -> bool:
    """Whether cuDNN can be called; on a GPU, why not is said."""
    if not cudnn.available():
        return False
    reason = cudnn.unsupported(query, key, **masking)
    if reason is not None:
        _say_once(f"{name} on a GPU is by implementation='xla': 'cudnn' does not take {reason}")
    return reason is None


@functools.cache
def _say_once(message: str) -> None:
    _logger.warning(message)


def _check_qkv(query, key, value) -> tuple[int, ...]:
    if query.ndim != 5:
        raise ValueError(
            f"query has shape {query.shape}; it must be [batch, q_len, group, expert, head_dim]"
        )
    batch, _, group, _, head_dim = query.shape
    if key.ndim != 4 or (key.shape[0], *key.shape[2:]) != (batch, group, head_dim):
        raise ValueError(
            f"key has shape {key.shape}; query {query.shape} needs "
            f"[{batch}, kv_len, {group}, {head_dim}]"
        )
    _check_shape("value", value, key.shape)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {x.dtype}; it must be a floating type")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value have dtypes {query.dtype}, {key.dtype} and {value.dtype}; "
            "they must be one"
        )
    return query.shape


def _check_masking(query, key, scale, causal, q_segment_ids, kv_segment_ids, q_offset) -> dict:
    batch, q_len = query.shape[:2]
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("q_segment_ids and kv_segment_ids must be given together")
    if q_segment_ids is not None:
        _check_shape("q_segment_ids", q_segment_ids, (batch, q_len))
        _check_shape("kv_segment_ids", kv_segment_ids, (batch, key.shape[1]))
    shape = jnp.shape(q_offset)
    pieces = shape[1] if len(shape) == 2 else 1
    if shape not in ((), (batch,), (batch, pieces)) or pieces < 1 or q_len % pieces:
        raise ValueError(
            f"q_offset has shape {shape}; it must be a scalar, [{batch}], or [{batch}, piece] with "
            f"pieces into which the {q_len} queries divide"
        )
    return {
        "scale": 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale,
        "causal": causal,
        "q_segment_ids": q_segment_ids,
        "kv_segment_ids": kv_segment_ids,
        "q_offset": q_offset,
    }


def _check_shape(name: str, x: Array, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} has shape {x.shape}; it must be {shape}")


def _check_implementation(implementation: str, known) -> None:
    if implementation not in get_args(known):
        names = ", ".join(repr(name) for name in get_args(known))
        raise ValueError(f"implementation is {implementation!r}; it must be one of None, {names}")
