"""Contenders of the attention op, and the matrix product beside them."""

import functools
from collections.abc import Mapping

import jax.numpy as jnp

from gqe_kernels import routed_attention
from gqe_kernels.contract import Attention
from kernels.benchmarks.speed.arrays import normal, selection, with_gradients
from kernels.benchmarks.speed.cases import Scale, SpeedCase
from kernels.benchmarks.speed.peers import implementations, peers
from kernels.benchmarks.speed.timing import Contender

# Block sizes of this project's GPU kernel, those that fit into shared memory without spilling.
BLOCKS = {
    64: tuple({"kv": kv, "stages": stages} for kv, stages in ((128, 4), (128, 2), (64, 4))),
    128: tuple({"kv": kv, "stages": 2} for kv in (128, 64)),
}
COMPARED = 4096  # tokens, up to which results are compared with those of `xla`


def attention_flops(heads: int, head_dim: int, length: int, batch: int, *, training: bool) -> int:
    """Floating-point operations that causal attention needs; a multiply and an add are two.

    Two products for each pair of a query and a key that it sees; backward five more: the logits
    again, however often a kernel computes them, dV, dP, dQ and dK.
    """
    pairs = length * (length + 1) // 2
    return 2 * (7 if training else 2) * head_dim * pairs * heads * batch


def matmul(size: int, dtype: jnp.dtype) -> Contender:
    """A square matrix product, whose rate is what the device can reach."""
    a, b = (normal(i, (size, size), dtype) for i in (0, 1))
    return Contender("matmul", "matmul", lambda a, b: a @ b, (a, b), 2 * size**3)


def _with_blocks(sizes: Mapping[str, int]) -> Attention:
    from gqe_kernels import pallas_gpu

    return functools.partial(pallas_gpu.attention, blocks=pallas_gpu.BlockSizes(**sizes))


def op(case: SpeedCase, scale: Scale, platform: str) -> list[Contender]:
    """GQE's op by this project's implementations, the dense one by all peers; at the level "blocks"
    GQE's alone, with several block sizes."""
    dtype, head_dim, heads = jnp.dtype(scale.dtype), case.head_dim, scale.heads
    groups = scale.groups // case.top_k
    selected = groups * case.top_k
    tokens = (case.batch, case.length)
    query = normal(0, (*tokens, heads, head_dim), dtype)
    key, value = (normal(i, (*tokens, groups, head_dim), dtype) for i in (1, 2))
    flops = functools.partial(
        attention_flops,
        head_dim=head_dim,
        length=case.length,
        batch=case.batch,
        training=case.training,
    )
    first = (lambda result: result[0]) if case.training else (lambda result: result)
    compared = case.length <= COMPARED
    tuning = case.level == "blocks"

    grouped = query.reshape(*tokens, groups, -1, head_dim)
    weight = jnp.full((*tokens, groups, case.top_k), 1 / selected, dtype)
    shared_query = normal(3, (*tokens, head_dim), dtype)
    index = selection(case, groups, heads // groups)
    arguments = (grouped, key, value, weight, shared_query, index)
    if case.training:  # slots of the selected experts, the weighted one and the shared one
        arguments = (normal(4, (*tokens, selected + 2, head_dim), dtype), *arguments)
    found = []
    own = [(name, {}, name) for name in implementations(platform)]
    if tuning:
        own = [("pallas_gpu", sizes, _with_blocks(sizes)) for sizes in BLOCKS[head_dim]]
    for name, options, implementation in own:

        def timed(*arguments, implementation=implementation):
            *floats, index = arguments

            def routed(query, key, value, weight, shared_query):
                given = (query, key, value, index, weight, shared_query)
                return routed_attention(*given, implementation=implementation)

            return with_gradients(routed, case.training)(*floats)

        slots = first if compared else None
        needed = flops(selected + 1)  # the shared head, too
        found.append(Contender(name, "gqe", timed, arguments, needed, options, slots=slots))
    for peer in () if tuning else peers(platform):
        arguments = peer.prepare(query, key, value)
        if case.training:  # like the query in shape, whatever the layout
            arguments = (normal(4, arguments[0].shape, arguments[0].dtype), *arguments)
        for options in peer.options:
            function = with_gradients(functools.partial(peer.attend, **options), case.training)
            slots = (lambda out, peer=peer: peer.finish(first(out))) if compared else None
            given = (peer.name, "dense", function, arguments, flops(heads), options)
            found.append(Contender(*given, slots=slots))
    return found
