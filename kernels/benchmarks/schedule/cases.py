"""The kernels whose schedules are compared, each with a count of how often its regions run.

libtpu's dump says how many bundles a region has, not how often a condition holds: that follows from
the grid and the mask, and is written here, beside the call that it describes. A region goes by the
name of the function under its `pl.when`, or of the first `jax.named_scope` inside it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from gqe_kernels import pallas_tpu


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of attention.

    Attributes:
      arguments: `jax.ShapeDtypeStruct`s of what `function` takes.
      executions: for each Pallas kernel, by the start of its name, how often each labelled region
        runs in the whole call; "grid" is the number of grid steps. None at all: the schedule is
        shown without a sum.
      pairs: query token × head × key token that attention must look at.
      macs: multiply-adds that it cannot do without.
    """

    function: Callable
    arguments: tuple
    executions: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    pairs: int = 0
    macs: int = 0


def splash(
    length: int,
    head_dim: int,
    heads: int = 16,
    kv_heads: int = 8,
    block_q: int = 512,
    block_kv: int = 512,
    block_kv_compute: int = 512,
) -> Case:
    """JAX's splash attention, dense and causal: [heads, length, head_dim], bfloat16."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _check_blocks(length, block_q=block_q, block_kv=block_kv)
    mask = masks.MultiHeadMask([masks.CausalMask((length, length)) for _ in range(heads)])
    sizes = kernel.BlockSizes(block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv_compute)
    query, key = (
        jax.ShapeDtypeStruct((h, length, head_dim), jnp.bfloat16) for h in (heads, kv_heads)
    )
    interior, masked = causal_tiles(length, block_q, block_kv)
    rows = heads * length // block_q
    return Case(
        kernel.make_splash_mha_single_device(mask, block_sizes=sizes),
        (query, key, key),
        {
            "splash_mha_fwd": {
                "grid": rows * (length // block_kv),
                "init": rows,
                "run": heads * (interior + masked),
                "end": rows,
            }
        },
        *_work(length, head_dim, heads),
    )


def gqe(
    length: int,
    head_dim: int,
    groups: int = 8,
    experts: int = 2,
    k: int = 1,
    **blocks,
) -> Case:
    """This project's kernel: k experts of each group and the shared head, one sequence, bfloat16.

    Args:
      blocks: fields of `pallas_tpu.BlockSizes`.
    """
    sizes = pallas_tpu.BlockSizes(**blocks)
    _check_blocks(length, q=sizes.q, kv=sizes.kv)
    query, key, shared = (
        jax.ShapeDtypeStruct((1, length, *shape, head_dim), jnp.bfloat16)
        for shape in ((groups, experts), (groups,), ())
    )
    index = jax.ShapeDtypeStruct((1, length, groups, k), jnp.int32)
    weight = jax.ShapeDtypeStruct((1, length, groups, k), jnp.bfloat16)

    def call(query, key, value, index, weight, shared):
        return pallas_tpu.routed_attention(
            query,
            key,
            value,
            index,
            weight,
            shared,
            None,
            None,
            scale=1 / math.sqrt(head_dim),
            causal=True,
            q_segment_ids=None,
            kv_segment_ids=None,
            q_offset=0,
            block_sizes=sizes,
        )

    interior, masked = causal_tiles(length, sizes.q, sizes.kv)
    rows = length // sizes.q
    runs = {
        "grid": rows * (length // sizes.kv),
        "start": rows,
        "interior": interior,
        "masked": masked,
        "finish": rows,
    }
    return Case(
        call,
        (query, key, key, index, weight, shared),
        {"gqe_forward": runs},
        *_work(length, head_dim, k * groups + 1),
    )


def causal_tiles(length: int, block_q: int, block_kv: int) -> tuple[int, int]:
    """Tiles below the diagonal, and tiles that it crosses."""
    starts = range(0, length, block_q)
    interior = sum((start + 1) // block_kv for start in starts)
    seen = sum(-(-(start + block_q) // block_kv) for start in starts)
    return interior, seen - interior


def _work(length: int, head_dim: int, heads: int) -> tuple[int, int]:
    pairs = heads * length * (length + 1) // 2
    return pairs, 2 * head_dim * pairs


def _check_blocks(length: int, **blocks: int) -> None:
    for name, block in blocks.items():
        if block <= 0 or length % block:
            raise ValueError(f"{name} is {block}; it must divide the length, {length}")
