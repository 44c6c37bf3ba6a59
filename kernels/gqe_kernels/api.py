"""`routed_attention` and `dense_attention`, the functions people call, and the choice of kernel."""

import functools
import logging
from typing import get_args

import jax
from jaxtyping import Array, Float, Int

from gqe_kernels import cudnn, decode, pallas_tpu, reference, xla
from gqe_kernels.contract import (
    AnyArray,
    Attention,
    Implementation,
    ImplementationName,
    Mask,
    Routed,
    Slots,
    check,
    default_scale,
    make_mask,
    with_static_scale,
)
from gqe_kernels.guard import without_padding, without_unseen
from gqe_kernels.varying import free_axes

_logger = logging.getLogger(__name__)
# The number of keys up to which "pallas_gpu" is the faster prefill, by kernels/README.md's table.
_PALLAS_GPU_MOST_KEYS = 32_768


def routed_attention(
    query: Float[Array, "batch q_len group expert head_dim"],
    key: Float[Array, "batch kv_len group head_dim"],
    value: Float[Array, "batch kv_len group head_dim"],
    expert_index: Int[Array, "batch q_len group k"] | None,
    slot_weight: Float[Array, "batch q_len group k"] | None = None,
    shared_query: Float[Array, "batch q_len head_dim"] | None = None,
    shared_key: Float[Array, "batch kv_len head_dim"] | None = None,
    shared_value: Float[Array, "batch kv_len head_dim"] | None = None,
    *,
    scale: float | AnyArray | None = None,
    causal: bool = True,
    q_segment_ids: Int[AnyArray, "batch q_len"] | None = None,
    kv_segment_ids: Int[AnyArray, "batch kv_len"] | None = None,
    q_offset: int | Int[AnyArray, ""] | Int[AnyArray, "batch"] | Int[AnyArray, "batch piece"] = 0,
    implementation: Implementation | None = None,
) -> Float[Array, "batch q_len slot head_dim"]:
    """The slots of a GQE layer before W_O: attention of the query experts that each token selected.

    Source: Grouped Query Experts, arXiv 2606.20945; the hard, weighted and shared slots, in this
    order, `k * group + weighted + shared` of them.

    Args:
      query: the queries of all experts, after RoPE.
      key, value: one head for each group.
      expert_index: the experts that each token selected in each group, by rank; all of a token's
        indices in a group differ. None: every expert, as in `dense_attention`.
      slot_weight: the weight of each selected expert in the weighted slot; None: no such slot.
      shared_query: the query of the always-on head; None: no such slot.
      shared_key, shared_value: what the shared head attends to; None: the mean over the groups.
      scale: the factor of the logits, also a traced scalar; None: 1 / sqrt(head_dim).
      causal: query t sees the keys up to position t + q_offset.
      q_segment_ids, kv_segment_ids: tokens see only their own segment. Id 0 is padding: its rows
        are zero and get no gradient, and what stands there, or after the last query, reaches no
        other row, even if it is NaN. Both or neither.
      q_offset: the position of the first query among the keys, one or one for each row of the
        batch: chunked prefill and decoding. [batch, piece]: the queries are that many pieces of
        equal length, each at its own position, in ascending order: a part of a longer sequence.
      implementation: "reference" (float32, quadratic memory), "xla" (linear memory), "decode"
        (whole logits; reads keys and values once), "pallas_tpu" (a TPU kernel), "pallas_gpu" (a
        kernel for Hopper GPUs) or "cudnn" (the selected heads, through
        `jax.nn.dot_product_attention`); or a function of the contract (`gqe_kernels.contract`),
        such as `functools.partial(pallas_tpu.attention, blocks=...)`. None: "decode" for a single
        query; else, when lowered for TPU, "pallas_tpu", and for CUDA, "pallas_gpu" up to 32,768
        keys and "cudnn" beyond, or the other, where they take the arguments ("pallas_gpu" on
        several GPUs only within `jax.shard_map`); "xla" otherwise, which on a GPU logs the reasons.

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
    routed = Routed(
        query, key, value, expert_index, slot_weight, shared_query, shared_key, shared_value
    )
    check(routed)
    mask = make_mask(
        routed,
        causal=causal,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        q_offset=q_offset,
    )
    scale = default_scale(query.shape[-1]) if scale is None else scale
    routed, factor = with_static_scale(routed, scale)
    slots = get_attention(implementation)(without_unseen(routed, mask), mask, factor)
    return without_padding(slots, mask)


def dense_attention(
    query: Float[Array, "batch q_len group expert head_dim"],
    key: Float[Array, "batch kv_len group head_dim"],
    value: Float[Array, "batch kv_len group head_dim"],
    *,
    scale: float | AnyArray | None = None,
    causal: bool = True,
    q_segment_ids: Int[AnyArray, "batch q_len"] | None = None,
    kv_segment_ids: Int[AnyArray, "batch kv_len"] | None = None,
    q_offset: int | Int[AnyArray, ""] | Int[AnyArray, "batch"] | Int[AnyArray, "batch piece"] = 0,
    implementation: Implementation | None = None,
) -> Float[Array, "batch q_len slot head_dim"]:
    """Grouped-query attention of all heads: the baseline, on the best kernel of each platform.

    Args:
      query: the queries of every head, by group, after RoPE.
      key, value: one head for each group.
      scale, causal, q_segment_ids, kv_segment_ids, q_offset: as in `routed_attention`.
      implementation: as in `routed_attention`; every implementation takes all heads, too.

    Returns:
      One slot a head, group-major, in the dtype of `query`.

    Raises:
      ValueError: an argument's shape or dtype does not fit, or the implementation is unknown.
      NotImplementedError: the named implementation does not take an argument.
    """
    return routed_attention(
        query,
        key,
        value,
        None,
        scale=scale,
        causal=causal,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        q_offset=q_offset,
        implementation=implementation,
    )


def get_attention(implementation: Implementation | None = None) -> Attention:
    """The function of the contract that `implementation` names or is; None: `best_attention`.

    Raises:
      ValueError: there is no implementation of this name.
    """
    if implementation is None:
        return best_attention
    if callable(implementation):
        return implementation
    if implementation not in _IMPLEMENTATIONS:
        names = ", ".join(repr(name) for name in get_args(ImplementationName))
        raise ValueError(f"implementation is {implementation!r}; it must be one of None, {names}")
    return _IMPLEMENTATIONS[implementation]


def best_attention(routed: Routed, mask: Mask, scale: float) -> Slots:
    """The implementation that suits the arguments and the platform that is lowered for."""
    q_len, kv_len = routed.query.shape[1], routed.key.shape[1]
    if q_len == 1 or q_len * kv_len == 0:
        return decode.attention(routed, mask, scale)
    gpus = sum(device.platform == "gpu" for device in jax.devices())
    by_platform = {
        platform: functools.partial(lambda attention, routed: attention(routed, mask, scale), found)
        for platform, found in attention_by_platform(routed, mask, scale, gpus=gpus).items()
    }
    return jax.lax.platform_dependent(routed, **by_platform)


def attention_by_platform(
    routed: Routed, mask: Mask, scale: float, *, gpus: int
) -> dict[str, Attention]:
    """The implementation for each platform, and "default" for the others.

    Args:
      gpus: of all processes. Where there are any, the kernel asks for their generation while
        tracing, and JAX for cuDNN's version. Why a GPU does without both is logged, once for each
        pair of reasons. XLA can partition cuDNN's call over several, and the kernel's not.
    """
    found: dict[str, Attention] = {"default": xla.attention}
    if pallas_tpu.unsupported(routed, mask) is None:
        found["tpu"] = pallas_tpu.attention
    if gpus:
        from gqe_kernels import pallas_gpu  # imports Mosaic GPU

        reasons = {
            "pallas_gpu": _partitioned(gpus) or pallas_gpu.unsupported(routed, mask, scale),
            "cudnn": cudnn.unsupported(routed.query, mask),
        }
        takes = [name for name, reason in reasons.items() if reason is None]
        if takes:
            is_long = routed.key.shape[1] > _PALLAS_GPU_MOST_KEYS
            found["cuda"] = _IMPLEMENTATIONS[takes[-1] if is_long else takes[0]]
        else:
            why = "; ".join(f"{name!r} does not take {reason}" for name, reason in reasons.items())
            _warn_once(f"attention on a GPU uses 'xla', for {why}")
    return found


def _partitioned(gpus: int) -> str | None:
    """Why XLA may partition the call; None if it does not."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = free_axes(mesh)
    if axes or (mesh.empty and gpus > 1):
        over = f"the mesh axes {', '.join(axes)}" if axes else f"{gpus} GPUs"
        return f"a call that XLA may partition over {over}: only in a jax.shard_map over them"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)


def _pallas_gpu(routed: Routed, mask: Mask, scale: float) -> Slots:
    from gqe_kernels import pallas_gpu  # imports Mosaic GPU

    return pallas_gpu.attention(routed, mask, scale)


_IMPLEMENTATIONS: dict[str, Attention] = {
    "reference": reference.attention,
    "xla": xla.attention,
    "decode": decode.attention,
    "pallas_tpu": pallas_tpu.attention,
    "pallas_gpu": _pallas_gpu,
    "cudnn": cudnn.attention,
}
