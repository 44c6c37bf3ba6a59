"""Compiles for several mesh shapes and ranks them by estimated time."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator

from gqe_jax.compile_for.program import Compiled, DoesNotFitError, Step, compile_step
from gqe_jax.compile_for.topology import Topology
from gqe_jax.config import ConfigError, MeshConfig, RunConfig
from gqe_jax.model.transformer import count_parameters
from gqe_jax.sharding import check_divides

# Bytes per parameter: parameter, gradient and two Adam moments, in float32.
_STATE_BYTES = 16


def shapes(config: RunConfig, topology: Topology) -> Iterator[MeshConfig]:
    """Yields the meshes that divide the configuration and hold its state, least sharded first.

    The order is that of the communication: data parallelism exchanges gradients, FSDP also weights,
    context parallelism also keys and values, and tensor parallelism activations.
    """
    devices = len(topology.devices)
    num_parameters = count_parameters(config.model)
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for tensor, context, fsdp in itertools.product(divisors, repeat=3):
        shards = tensor * context * fsdp
        if devices % shards or devices // shards % topology.num_slices:
            continue
        if num_parameters * _STATE_BYTES > topology.chip.hbm_bytes * shards:
            continue
        mesh = MeshConfig(data=devices // shards, fsdp=fsdp, context=context, tensor=tensor)
        try:
            check_divides(config, mesh.sizes)
        except ConfigError:
            continue
        yield mesh


def sweep(
    config: RunConfig, topology: Topology, step: Step, most: int
) -> list[tuple[MeshConfig, Compiled | None]]:
    """Compiles for up to `most` meshes; returns the fastest first, with None if it does not fit."""
    tried = []
    for mesh, _ in zip(shapes(config, topology), range(most), strict=False):
        print(f"compiling for {mesh.sizes}", file=sys.stderr, flush=True)
        try:
            compiled = compile_step(dataclasses.replace(config, mesh=mesh), topology, step)
        except DoesNotFitError:
            compiled = None
        tried.append((mesh, compiled))
    return sorted(tried, key=lambda one: one[1].estimate.seconds if one[1] else float("inf"))


def table(tried: list[tuple[MeshConfig, Compiled | None]]) -> str:
    """The ranking as a text table."""
    lines = [
        f"{'mesh':<40}{'peak HBM':>12}{'at best':>10}{'MFU':>8}"
        f"{'scheduled':>12}{'MFU':>8}  bound by"
    ]
    for mesh, compiled in tried:
        name = ", ".join(f"{axis} {size}" for axis, size in mesh.sizes.items())
        if compiled is None:
            lines.append(f"{name:<40}{'does not fit':>12}")
            continue
        guess, scheduled = compiled.estimate, compiled.scheduled
        lines.append(
            f"{name:<40}{compiled.memory.peak / 2**30:8.2f} GiB{guess.seconds:8.3f} s"
            f"{guess.model_flop_utilisation:8.1%}{scheduled.seconds:10.3f} s"
            f"{scheduled.model_flop_utilisation:8.1%}  {guess.bound_by}"
        )
    return "\n".join(lines)
