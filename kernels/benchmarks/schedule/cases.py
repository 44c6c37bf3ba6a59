"""The kernels whose schedules are compared, each with a count of how often its regions run.

libtpu's dump says how many bundles a region has, not how often a condition holds: that follows from
the grid and the mask, and is written here, beside the call that it describes. A region goes by the
name of the function under its `pl.when`, or of the first `jax.named_scope` inside it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from gqe_kernels import pallas_tpu, routed_attention
from gqe_kernels.cycles.runs import backward_runs, causal_tiles, forward_runs
from gqe_kernels.pallas_tpu.blocks import default_block_sizes
from gqe_kernels.pallas_tpu.layout import Layout


@dataclasses.dataclass(frozen=True)
class ScheduledCall:
    """One call of attention.

    Attributes:
      arguments: `jax.ShapeDtypeStruct`s of what `function` takes.
      executions: for each Pallas kernel, by the `name` of its `pallas_call`, how often each
        labelled region runs in the whole call; "grid" is the number of grid steps, "calls" that of
        launches where a loop around the kernel launches it more than once. None at all: the
        schedule is shown without a sum.
      pairs: query token × head × key token that attention must look at.
      macs: multiply-adds that it cannot do without.
    """

    function: Callable
    arguments: tuple
    executions: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    pairs: int = 0
    macs: int = 0


def splash(
    length: int, head_dim: int, heads: int = 16, kv_heads: int = 8, **blocks: int
) -> ScheduledCall:
    """JAX's splash attention, dense and causal: [heads, length, head_dim], bfloat16.

    Args:
      blocks: sizes of splash attention's `BlockSizes`; 512 forward if not given. With
        `block_q_dkv` and so on there is a backward pass, which has a kernel of its own for dQ if
        `block_q_dq` and `block_kv_dq` are given.
    """
    blocks = dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), 512) | blocks
    _check_blocks(length, **blocks)
    backward, fused = "block_q_dkv" in blocks, "block_q_dq" not in blocks

    def forward(query, key, value):
        return make_splash(heads, length, blocks)(query, key, value)

    query, key = (
        jax.ShapeDtypeStruct((h, length, head_dim), jnp.bfloat16) for h in (heads, kv_heads)
    )

    def runs(of: str, sums_of_keys: bool = False) -> dict[str, int]:
        sizes = blocks[f"block_q{of}"], blocks[f"block_kv{of}"]
        return splash_runs(length, heads, kv_heads, *sizes, sums_of_keys=sums_of_keys)

    if not backward:
        executions = {"splash_mha_fwd_no_residuals": runs("")}
        work = _work(length, head_dim, heads, products=2)
        return ScheduledCall(forward, (query, key, key), executions, *work)
    executions = {
        "splash_mha_fwd_residuals": runs(""),
        "splash_mha_dkv_no_residuals": runs("_dkv", sums_of_keys=True),
    }
    if not fused:
        executions["splash_mha_dq_no_residuals"] = runs("_dq")

    def with_gradients(query, key, value, d_out):
        out, vjp = jax.vjp(forward, query, key, value)
        return out, vjp(d_out)

    work = _work(length, head_dim, heads, products=7)
    return ScheduledCall(with_gradients, (query, key, key, query), executions, *work)


def make_splash(heads: int, length: int, blocks: Mapping[str, int]) -> Callable[..., jax.Array]:
    """Splash attention, dense and causal, of query, key and value [head, length, head_dim].

    Args:
      heads: of the queries.
      blocks: sizes of splash attention's `BlockSizes`; with those of the backward pass and none for
        dQ, that pass is one kernel.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    fused = "block_q_dkv" in blocks and "block_q_dq" not in blocks
    sizes = kernel.BlockSizes(**blocks, use_fused_bwd_kernel=fused)
    mask = masks.MultiHeadMask([masks.CausalMask((length, length)) for _ in range(heads)])
    return kernel.make_splash_mha_single_device(mask, block_sizes=sizes)


def splash_runs(
    length: int, heads: int, kv_heads: int, block_q: int, block_kv: int, *, sums_of_keys: bool
) -> dict[str, int]:
    """Executions in one of splash attention's kernels, of one sequence.

    Args:
      sums_of_keys: it starts and ends a sum for each block of keys, not of queries.
    """
    ends = kv_heads * length // block_kv if sums_of_keys else heads * length // block_q
    return {
        "grid": heads * (length // block_q) * (length // block_kv),
        "init": ends,
        "run": heads * sum(causal_tiles(length, block_q, block_kv)),
        "end": ends,
    }


def gqe(
    length: int,
    head_dim: int,
    chip: str,
    groups: int = 8,
    experts: int = 2,
    k: int = 1,
    other_slots: bool = True,
    training: bool = False,
    **blocks,
) -> ScheduledCall:
    """This project's kernel: k experts of each group and the shared head, one sequence, bfloat16.

    Args:
      other_slots: the weighted and the shared slot.
      training: the forward and the backward pass, not the forward alone.
      blocks: fields of `pallas_tpu.BlockSizes` that differ from the chip's defaults.
    """
    layout = Layout(groups, experts, k, head_dim, weighted=other_slots, shared=other_slots)
    sizes = default_block_sizes(layout, length, length, 2, chip=chip)
    if sizes is None:
        raise ValueError(f"head_dim is {head_dim}; the kernel has no block sizes that fit in VMEM")
    sizes = dataclasses.replace(sizes, **blocks)
    _check_blocks(length, q=sizes.q, kv=sizes.kv)
    query, key, shared = (
        jax.ShapeDtypeStruct((1, length, *shape, head_dim), jnp.bfloat16)
        for shape in ((groups, experts), (groups,), ())
    )
    index = jax.ShapeDtypeStruct((1, length, groups, k), jnp.int32)
    weight = jax.ShapeDtypeStruct((1, length, groups, k), jnp.bfloat16)
    if not other_slots:
        weight = shared = None

    attention = functools.partial(pallas_tpu.attention, blocks=sizes)
    call = functools.partial(routed_attention, implementation=attention)
    executions = {"gqe_forward": forward_runs(length, sizes.q, sizes.kv)}
    arguments = (query, key, key, index, weight, shared)
    heads = layout.heads
    if not training:
        return ScheduledCall(
            call, arguments, executions, *_work(length, head_dim, heads, products=2)
        )

    def with_gradients(query, key, value, index, weight, shared, d_slots):
        def slots(query, key, value, weight, shared):
            return call(query, key, value, index, weight, shared)

        out, vjp = jax.vjp(slots, query, key, value, weight, shared)
        return out, vjp(d_slots)

    d_slots = jax.ShapeDtypeStruct((1, length, layout.slots, head_dim), jnp.bfloat16)
    executions |= _gqe_backward(length, layout, sizes)
    work = _work(length, head_dim, heads, products=7)
    return ScheduledCall(with_gradients, (*arguments, d_slots), executions, *work)


def dense(length: int, head_dim: int, chip: str, experts: int = 2, **options) -> ScheduledCall:
    """This project's kernel with all experts chosen, and their slots alone: grouped-query attention
    as `dense_attention` computes it on TPU. The options are those of `gqe`."""
    chosen = {"experts": experts, "k": experts, "other_slots": False}
    return gqe(length, head_dim, chip, **chosen, **options)


def _gqe_backward(length: int, layout: Layout, sizes) -> dict[str, dict[str, int]]:
    q, kv = sizes.backward_q, sizes.backward_kv
    _check_blocks(length, backward_q=q, backward_kv=kv)
    launches, blocks = sizes.backward_launches(layout, length // q)
    backward = backward_runs(length, q, kv, launches=launches, blocks=blocks)
    return {"gqe_backward_prepare": {"grid": length // q}, "gqe_backward": backward}


def _work(length: int, head_dim: int, heads: int, products: int) -> tuple[int, int]:
    """Pairs and multiply-adds: QK and PV forward; backward QK again, and one for each of dP, dV,
    dK and dQ."""
    pairs = heads * length * (length + 1) // 2
    return pairs, products * head_dim * pairs


def _check_blocks(length: int, **blocks: int) -> None:
    for name, block in blocks.items():
        if block <= 0 or length % block:
            raise ValueError(f"{name} is {block}; it must divide the length, {length}")
