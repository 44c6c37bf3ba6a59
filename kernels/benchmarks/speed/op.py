"""Contenders of the attention op, and the matrix product beside them."""

import contextlib
import functools
from collections.abc import Mapping

import jax.numpy as jnp

from gqe_kernels import routed_attention
from kernels.benchmarks.speed import work
from kernels.benchmarks.speed.arrays import contender, normal, selection, with_gradients
from kernels.benchmarks.speed.cases import Case, Scale
from kernels.benchmarks.speed.peers import implementations, peers
from kernels.benchmarks.speed.timing import Contender

# Those that fit into shared memory, without registers spilled.
BLOCKS = {
    64: tuple(
        ("pallas_gpu", {"kv": kv, "stages": stages}) for kv, stages in ((128, 4), (128, 2), (64, 4))
    ),
    128: tuple(("pallas_gpu", {"kv": kv, "stages": 2}) for kv in (128, 64)),
}
COMPARED = 4096  # tokens, up to which results are held against one another


def matmul(size: int, dtype: jnp.dtype) -> Contender:
    """The yardstick: a square matrix product."""
    a, b = (normal(i, (size, size), dtype) for i in (0, 1))
    return contender("matmul", "matmul", lambda a, b: a @ b, (a, b), 2 * size**3)


def _blocks(options: Mapping[str, int]) -> contextlib.AbstractContextManager:
    if not options:
        return contextlib.nullcontext()
    from gqe_kernels import pallas_gpu

    return pallas_gpu.use_block_sizes(pallas_gpu.BlockSizes(**options))


def attention(case: Case, scale: Scale, platform: str) -> list[Contender]:
    """GQE's op by this project's implementations, the dense one by all peers; at the level "blocks"
    GQE's alone, with several block sizes."""
    config = case.model(scale, "gqe").attention
    dtype, head_dim = jnp.dtype(scale.model.dtype), case.head_dim
    heads, groups = config.num_query_experts, config.num_kv_heads
    tokens = (case.batch, case.length)
    query = normal(0, (*tokens, heads, head_dim), dtype)
    key, value = (normal(i, (*tokens, groups, head_dim), dtype) for i in (1, 2))
    shared_query = normal(3, (*tokens, head_dim), dtype)
    weight = jnp.full((*tokens, groups, case.top_k), 1 / (groups * case.top_k), dtype)
    index = selection(case, groups, config.experts_per_group)
    flops = functools.partial(
        work.attention,
        head_dim=head_dim,
        length=case.length,
        batch=case.batch,
        training=case.training,
    )
    first = (lambda result: result[0]) if case.training else (lambda result: result)
    compared = case.length <= COMPARED
    found = []
    tuning = case.level == "blocks"
    own = BLOCKS[head_dim] if tuning else ((name, {}) for name in implementations(platform))
    for name, options in own:

        def routed(query, key, value, weight, shared_query, index, name=name):
            return routed_attention(
                query, key, value, index, weight, shared_query, implementation=name
            )

        def timed(*arguments, routed=routed):
            *floats, index = arguments
            function = with_gradients(lambda *floats: routed(*floats, index), case.training)
            return function(*floats)

        grouped = query.reshape(*tokens, groups, -1, head_dim)
        arguments = (grouped, key, value, weight, shared_query, index)
        if case.training:
            arguments = (normal(4, (*tokens, config.num_slots, head_dim), dtype), *arguments)
        needed = flops(config.num_active_heads)
        slots = first if compared else None
        around = functools.partial(_blocks, options)
        found.append(contender(name, "gqe", timed, arguments, needed, options, around, slots))
    for peer in () if tuning else peers(platform):
        prepared = peer.prepare(query, key, value)
        arguments = prepared
        if case.training:  # like the query in shape, whatever the layout
            arguments = (normal(4, prepared[0].shape, prepared[0].dtype), *prepared)
        for options in peer.options:
            function = with_gradients(functools.partial(peer.attend, **options), case.training)
            found.append(
                contender(
                    peer.name,
                    "dense",
                    function,
                    arguments,
                    flops(heads),
                    options,
                    slots=(lambda out, peer=peer: peer.finish(first(out))) if compared else None,
                )
            )
    return found
