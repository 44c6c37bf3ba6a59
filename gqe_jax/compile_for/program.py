"""Compiles a run's step for a TPU slice that need not be attached, and measures the program."""

import dataclasses
import math
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax

from gqe_jax.compile_for import hlo
from gqe_jax.compile_for.collectives import Collective, collectives
from gqe_jax.compile_for.costs import Costs, count
from gqe_jax.compile_for.cycles import Cycles, cycles
from gqe_jax.compile_for.estimate import (
    Estimate,
    Scheduled,
    as_scheduled,
    estimate,
    with_links,
)
from gqe_jax.compile_for.kernel_cycles import KernelCycles, clear_dump, kernel_cycles
from gqe_jax.compile_for.topology import Topology
from gqe_jax.config import RunConfig
from gqe_jax.errors import UserError
from gqe_jax.model.flops import matmul_flops_per_token
from gqe_jax.sharding import check_divides, make_mesh
from gqe_jax.training import executable
from gqe_jax.training.steps import abstract_batch, make_steps
from gqe_kernels.chips import GIB

Step = Literal["train", "eval"]


class DoesNotFitError(UserError, RuntimeError):
    """The compiled step needs more HBM than the chip has."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one device.

    Attributes:
      temporaries: buffers that live only within the step: activations, gradients, gathered weights.
      peak: the state, the batch, the temporaries and the code together.
      largest: the largest arrays of the program, with their bytes, in descending order.
    """

    parameters: int
    optimizer: int
    temporaries: int
    peak: int
    largest: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The figures of a compiled step, of one device but for the estimate's tokens."""

    config: RunConfig
    topology: Topology
    mesh: dict[str, int]
    step: Step
    num_parameters: int
    memory: Memory
    costs: Costs
    collectives: tuple[Collective, ...]
    estimate: Estimate
    cycles: Cycles
    kernels: tuple[KernelCycles, ...]
    scheduled: Scheduled
    compile_seconds: float


def compile_step(
    config: RunConfig, topology: Topology, step: Step = "train", *, save: pathlib.Path | None = None
) -> Compiled:
    """Compiles the step that `train` or `evaluate` runs, for devices that need not be attached.

    Args:
      config: the run.
      topology: the devices.
      step: which step.
      save: a file for the executable of a train step (`executable.py`).

    Raises:
      ConfigError: the configuration does not fit the number of devices.
      DoesNotFitError: the compiler finds that it takes more memory than there is; the message names
        the largest arrays, and what to change.
    """
    if step == "eval":
        config = dataclasses.replace(config, accumulation_steps=1)  # as `evaluate_run` has it
    mesh = make_mesh(config.mesh, list(topology.devices))
    check_divides(config, dict(mesh.shape))
    steps = make_steps(config, mesh, implementation=config.attention_kernel)
    abstract, batch = steps.layout.abstract, abstract_batch(config, mesh)
    function, arguments = {
        "train": (steps.train_step, (abstract, batch)),
        "eval": (steps.eval_step, (abstract.params, batch)),
    }[step]
    begun = time.perf_counter()
    traced = function.trace(*arguments)
    clear_dump()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sized = re.search(r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", str(error))
        lack = f"it takes {sized[1]} of {sized[2]}" if sized else str(error).splitlines()[0]
        within = _arrays_of_jaxpr(traced.jaxpr.jaxpr, mesh.size).items()
        todo = remedies(config, dict(mesh.shape), step)
        raise DoesNotFitError(_refusal(topology, lack, _shards(arguments), within, todo)) from error
    seconds = time.perf_counter() - begun
    text, stats = compiled.as_text(), compiled.memory_analysis()
    assert text is not None  # the compiler for TPUs gives both
    assert stats is not None
    program = hlo.parse(text)
    peak = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak += stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    if peak > topology.chip.hbm_bytes:  # the compiler accepts programs slightly above the limit
        lack = f"it takes {peak / GIB:.1f} GiB of {topology.chip.hbm_bytes / GIB:.0f} GiB"
        within = _largest_of_program(program)
        todo = remedies(config, dict(mesh.shape), step)
        raise DoesNotFitError(_refusal(topology, lack, _shards(arguments), within, todo))
    if save is not None:
        executable.save(save, compiled, config, mesh)
    kept = abstract.opt_state, abstract.average
    memory = Memory(
        parameters=sum(size for _, size in _shards(abstract.params)),
        optimizer=sum(size for _, size in _shards(kept)) if step == "train" else 0,
        temporaries=stats.temp_size_in_bytes,
        peak=peak,
        largest=tuple(_largest_of_program(program)),
    )
    costs = count(program)
    crossing = tuple(collectives(program, mesh.shape, topology.num_slices))
    tokens = config.batch_size * config.sequence_length
    passes = 3 if step == "train" else 1
    needed = passes * matmul_flops_per_token(config.model, config.sequence_length)
    totals = {"devices": mesh.size, "tokens": tokens, "model_flops": needed * tokens}
    crossings = with_links(crossing, topology, mesh)
    static, kernels = cycles(program), tuple(kernel_cycles(program, topology.chip))
    return Compiled(
        config=config,
        topology=topology,
        mesh=dict(mesh.shape),
        step=step,
        num_parameters=sum(x.size for x in jax.tree.leaves(abstract.params)),
        memory=memory,
        costs=costs,
        collectives=crossing,
        estimate=estimate(costs, crossings, topology.chip, **totals),
        cycles=static,
        kernels=kernels,
        scheduled=as_scheduled(static, kernels, crossings, topology.chip, **totals),
        compile_seconds=seconds,
    )


def _shards(tree: Any) -> list[tuple[str, int]]:
    """Returns each array's name and the bytes of its shard on one device."""
    named = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct)
    )[0]
    sizes = []
    for path, x in named:
        shape = x.sharding.shard_shape(x.shape)
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        sizes.append((f"{name} {x.dtype}{list(shape)}", math.prod(shape) * x.dtype.itemsize))
    return sizes


def _largest_of_program(program: hlo.Program, most: int = 6) -> Iterator[tuple[str, int]]:
    sizes = {
        f"{array.dtype}{list(array.shape)}": array.bytes
        for computation, _ in program.runs()
        for x in computation.values()
        for array in x.arrays
        if array.in_hbm
    }
    yield from sorted(sizes.items(), key=lambda item: -item[1])[:most]


def _arrays_of_jaxpr(jaxpr: Any, parts: int) -> dict[str, float]:
    """Returns every array that a program computes, with its bytes on each of `parts` devices.

    The compiler may shard an array less than over all devices, which a trace does not tell. Inside
    `shard_map` arrays are shards already.
    """
    sizes = {}
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            aval = variable.aval
            if hasattr(aval, "shape") and hasattr(aval.dtype, "itemsize"):
                name = f"{equation.primitive.name} {aval.dtype}{list(aval.shape)}"
                name += ", if sharded over all chips" if parts > 1 else ""
                sizes[name] = math.prod(aval.shape) * aval.dtype.itemsize / parts
        within = 1 if equation.primitive.name == "shard_map" else parts
        for value in jax.tree.leaves(tuple(equation.params.values())):
            inner = getattr(value, "jaxpr", value)  # closed, or open
            if hasattr(inner, "eqns"):
                sizes |= _arrays_of_jaxpr(inner, within)
    return sizes


def _refusal(topology: Topology, lack: str, state, within, todo: list[str]) -> str:
    lines = [f"does not fit {topology.name}: {lack} on each chip. The largest arrays:"]
    for title, arrays in (("arguments", state), ("intermediate arrays", within)):
        lines.append(f"  {title}:")
        for name, size in sorted(arrays, key=lambda item: -item[1])[:4]:
            lines.append(f"    {size / GIB:8.2f} GiB  {name}")
    return "\n".join([*lines, f"To make it fit: {'; '.join(todo)}"])


def remedies(config: RunConfig, mesh: dict[str, int], step: Step) -> list[str]:
    """Returns changes that lower the memory of a step, the cheapest first."""
    copies = mesh["data"] * mesh["fsdp"]
    rows = config.batch_size // config.accumulation_steps // copies
    found = []
    if rows > 1:
        fewer = {
            "train": f"--accumulation-steps {config.accumulation_steps * rows}",
            "eval": f"--batch-size {copies}",
        }[step]
        found.append(f"{fewer} (one sequence per chip at a time, now {rows})")
    if step == "train" and config.model.remat != "keep_nothing":
        found.append(f"--model.remat keep_nothing (now {config.model.remat})")
    if mesh["data"] > 1:
        found.append(f"a larger --mesh.fsdp (now {mesh['fsdp']}, with {mesh['data']} copies)")
    if config.sequence_length % (4 * mesh["context"]) == 0:
        found.append(f"a larger --mesh.context (now {mesh['context']})")
    if mesh["tensor"] < config.model.attention.num_kv_heads:
        found.append(f"a larger --mesh.tensor (now {mesh['tensor']})")
    return [*found, f"a shorter --sequence-length (now {config.sequence_length})", "more chips"]
