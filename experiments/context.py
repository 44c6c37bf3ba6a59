"""Keys and values over the context axis: gathered, or passed around a ring. Compiled, not run.

    python -m experiments.context

One layer's attention, forward, on one sequence in zigzag order over 8 and over 64 chips of a v5p
that are not here. The ring sends what a shard holds to its neighbour while it attends to it, and
combines the parts by their logsumexp; both leave out the weighted slot, which is a sum of slots.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gqe_jax.compile_for import hlo
from gqe_jax.compile_for.collectives import collectives
from gqe_jax.compile_for.costs import count
from gqe_jax.compile_for.estimate import estimate, with_links
from gqe_jax.compile_for.topology import Topology, get_topology
from gqe_jax.config import MeshConfig
from gqe_jax.model.sharded_attention import sharded
from gqe_jax.sharding import make_mesh
from gqe_kernels.api import get_attention
from gqe_kernels.chips import GIB
from gqe_kernels.contract import Mask, Routed, Slots
from gqe_kernels.pallas_tpu.blocks import default_block_sizes
from gqe_kernels.pallas_tpu.forward import forward
from gqe_kernels.pallas_tpu.layout import Layout, flatten
from gqe_kernels.reference import mean_over_groups

LENGTH, GROUP, EXPERT, HEAD_DIM = 131_072, 8, 4, 128  # gqe_7b_128k
SCALE = HEAD_DIM**-0.5
TOPOLOGIES = {8: "v5p:2x2x2", 64: "v5p:4x4x4"}


def gathered(routed: Routed) -> Slots:
    """What the model does."""
    return sharded(get_attention(), zigzag=True)(routed, Mask(), SCALE)


def ring(routed: Routed) -> Slots:
    """The same by a ring of the context axis."""
    spec = PartitionSpec(None, "context")
    in_specs = (jax.tree.map(lambda _: spec, routed),)
    return jax.shard_map(_ring_of_a_shard, in_specs=in_specs, out_specs=spec, check_vma=False)(
        routed
    )


def _ring_of_a_shard(routed: Routed) -> Slots:
    shard, shards = jax.lax.axis_index("context"), jax.lax.axis_size("context")
    batch, length = routed.query.shape[:2]
    piece, heads = length // 2, routed.num_hard + 1
    layout = Layout.of(routed)
    itemsize = routed.query.dtype.itemsize
    blocks = default_block_sizes(layout, length, piece, itemsize, "v5p", pieces=2)
    keys = {
        "key": routed.key,
        "value": routed.value,
        "shared_key": mean_over_groups(routed.key),
        "shared_value": mean_over_groups(routed.value),
    }

    def positions(of):
        return jnp.stack([of, 2 * shards - 1 - of]) * piece

    def attend(held, half, from_shard):
        """Slots, and their logsumexp, of attention to the early or the late piece that is held."""
        part = {
            name: jax.lax.dynamic_slice_in_dim(x, half * piece, piece, 1)
            for name, x in held.items()
        }
        offset = positions(shard) - positions(from_shard)[half]
        slots, logsumexp = forward(
            flatten(layout, dataclasses.replace(routed, **part)),
            Mask(jnp.broadcast_to(offset, (batch, 2))),
            layout=layout,
            scale=SCALE,
            blocks=blocks,
        )
        slots = slots.reshape(batch, length, heads, HEAD_DIM).astype(jnp.float32)
        return slots, jnp.swapaxes(logsumexp[:, :heads, :length], 1, 2)

    def step(carry, number):
        held, slots, logsumexp = carry
        for half in (0, 1):
            more, of_more = attend(held, half, (shard - number) % shards)
            both = jnp.logaddexp2(logsumexp, of_more)
            slots *= jnp.exp2(logsumexp - both)[..., None]
            slots += jnp.exp2(of_more - both)[..., None] * more
            logsumexp = both
        following = [(i, (i + 1) % shards) for i in range(shards)]
        held = {name: jax.lax.ppermute(x, "context", following) for name, x in held.items()}
        return (held, slots, logsumexp), None

    shape = (batch, length, heads)
    start = jnp.zeros((*shape, HEAD_DIM), jnp.float32), jnp.full(shape, -1e30, jnp.float32)
    (_, slots, _), _ = jax.lax.scan(step, (keys, *start), jnp.arange(shards))
    return slots.astype(routed.query.dtype)


def row(name: str, function, topology: Topology) -> str:
    """A line of the table."""
    mesh = make_mesh(MeshConfig(data=1, context=-1), list(topology.devices))
    sharding = NamedSharding(mesh, PartitionSpec(None, "context"))
    like = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=sharding)
    heads = (1, LENGTH, GROUP)
    routed = Routed(
        query=like((*heads, EXPERT, HEAD_DIM)),
        key=like((*heads, HEAD_DIM)),
        value=like((*heads, HEAD_DIM)),
        expert_index=like((*heads, 1), dtype=jnp.int32),
        shared_query=like((1, LENGTH, HEAD_DIM)),
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(function, out_shardings=sharding).lower(routed).compile()
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
    print("| shards | | sent | temporaries | launches | compute | HBM | ICI | sum |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in TOPOLOGIES.values():
        topology = get_topology(name)
        for kind, function in (("gathered", gathered), ("ring", ring)):
            print(f"compiling {kind} for {name}", file=sys.stderr, flush=True)
            print(row(kind, function, topology), flush=True)


if __name__ == "__main__":
    main()
