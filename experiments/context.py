"""Keys and values over the context axis: gathered, or passed around a ring. Compiled, not run.

    python -m experiments.context

One layer's attention, forward, on one sequence in zigzag order over 8 and over 64 chips of a v5p
that are not here. The ring sends what a shard holds to its neighbour while it attends to it, and
combines the parts by their logsumexp; both leave out the weighted slot, which is a sum of slots.
"""

import functools
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gqe_jax.compile_for import hlo
from gqe_jax.compile_for.chips import GIB, Topology, get_topology
from gqe_jax.compile_for.collectives import collectives
from gqe_jax.compile_for.costs import count
from gqe_jax.compile_for.estimate import estimate, with_links
from gqe_jax.config import MeshConfig
from gqe_jax.model.sharded_attention import sharded_routed_attention
from gqe_jax.sharding import make_mesh
from gqe_kernels.pallas_tpu.blocks import default_block_sizes
from gqe_kernels.pallas_tpu.forward import forward
from gqe_kernels.pallas_tpu.layout import Layout
from gqe_kernels.pallas_tpu.schedule import Masking

LENGTH, GROUP, EXPERT, HEAD_DIM = 131_072, 8, 4, 128  # gqe_7b_128k
TOPOLOGIES = {8: "v5p:2x2x2", 64: "v5p:4x4x4"}


def gathered(query, key, value, expert_index, shared_query):
    """What the model does."""
    return sharded_routed_attention(
        query=query,
        key=key,
        value=value,
        expert_index=expert_index,
        slot_weight=None,
        shared_query=shared_query,
        shared_key=None,
        shared_value=None,
        implementation=None,
        zigzag=True,
    )


def ring(query, key, value, expert_index, shared_query):
    """The same by a ring of the context axis."""
    spec = PartitionSpec(None, "context")
    return jax.shard_map(_ring_of_a_shard, in_specs=(spec,) * 5, out_specs=spec, check_vma=False)(
        query, key, value, expert_index, shared_query
    )


def _ring_of_a_shard(query, key, value, expert_index, shared_query):
    shard, shards = jax.lax.axis_index("context"), jax.lax.axis_size("context")
    batch, length = query.shape[:2]
    piece = length // 2
    layout = Layout(GROUP, EXPERT, 1, HEAD_DIM, weighted=False, shared=True)
    blocks = default_block_sizes(layout, length, piece, query.dtype.itemsize, "v5p", pieces=2)

    def positions(of):
        return jnp.stack([of, 2 * shards - 1 - of]) * piece

    def flat(x):
        return x.reshape(*x.shape[:2], -1)

    def attend(held, half, from_shard):
        """To the early or the late piece of what is held: slots, and their logsumexp."""
        own = [flat(jax.lax.dynamic_slice_in_dim(x, half * piece, piece, 1)) for x in held]
        offset = positions(shard) - positions(from_shard)[half]
        slots, logsumexp = forward(
            flat(query),
            *own[:2],
            flat(expert_index),
            None,
            shared_query,
            *own[2:],
            Masking(jnp.broadcast_to(offset, (batch, 2)), None, None),
            layout=layout,
            causal=True,
            static_offset=None,
            scale=HEAD_DIM**-0.5,
            blocks=blocks,
        )
        slots = slots.reshape(batch, length, layout.heads, HEAD_DIM).astype(jnp.float32)
        return slots, jnp.swapaxes(logsumexp[:, : layout.heads, :length], 1, 2)

    def step(carry, number):
        held, slots, logsumexp = carry
        for half in (0, 1):
            more, of_more = attend(held, half, (shard - number) % shards)
            both = jnp.logaddexp2(logsumexp, of_more)
            slots *= jnp.exp2(logsumexp - both)[..., None]
            slots += jnp.exp2(of_more - both)[..., None] * more
            logsumexp = both
        following = [(i, (i + 1) % shards) for i in range(shards)]
        held = [jax.lax.ppermute(x, "context", following) for x in held]
        return (held, slots, logsumexp), None

    means = [jnp.mean(x.astype(jnp.float32), axis=2).astype(x.dtype) for x in (key, value)]
    shape = (batch, length, layout.heads)
    start = jnp.zeros((*shape, HEAD_DIM), jnp.float32), jnp.full(shape, -1e30, jnp.float32)
    (_, slots, _), _ = jax.lax.scan(step, ([key, value, *means], *start), jnp.arange(shards))
    return slots.astype(query.dtype)


def row(name: str, function, topology: Topology) -> str:
    """A line of the table."""
    mesh = make_mesh(MeshConfig(data=1, context=-1), list(topology.devices))
    sharding = NamedSharding(mesh, PartitionSpec(None, "context"))
    like = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=sharding)
    heads = (1, LENGTH, GROUP)
    arguments = (
        like((*heads, EXPERT, HEAD_DIM)),
        like((*heads, HEAD_DIM)),
        like((*heads, HEAD_DIM)),
        jax.ShapeDtypeStruct((*heads, 1), jnp.int32, sharding=sharding),
        like((1, LENGTH, HEAD_DIM)),
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(function, out_shardings=sharding).lower(*arguments).compile()
    program = hlo.parse(compiled.as_text())
    costs, crossing = count(program), collectives(program, mesh.shape)
    guess = estimate(
        costs,
        with_links(crossing, topology, mesh),
        topology.chip,
        devices=mesh.size,
        tokens=LENGTH,
        model_flops=costs.flops,
    )
    sent = sum(each.bytes * each.times for each in crossing)
    launches = sum(
        times
        for computation, times in program.runs()
        for x in computation.values()
        if x.text("custom_call_target") == '"tpu_custom_call"'
    )
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    times = " | ".join(
        f"{1e3 * x:.2f} ms" for x in (guess.compute, guess.hbm, guess.ici, guess.serial)
    )
    return (
        f"| {mesh.size} | {name} | {sent / 1e6:.0f} MB | {temporaries / GIB:.2f} GiB | {launches} "
        f"| {times} |"
    )


def main() -> None:
    """Prints the table."""
    print("| shards | | sent | temporaries | launches | compute | HBM | ICI | in turn |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in TOPOLOGIES.values():
        topology = get_topology(name)
        for kind, function in (("gathered", gathered), ("ring", ring)):
            print(f"compiling {kind} for {name}", file=sys.stderr, flush=True)
            print(row(kind, function, topology), flush=True)


if __name__ == "__main__":
    main()
