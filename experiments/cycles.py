"""Static cycles on TPU of an attention layer or of a whole step, by part of the model.

    python -m experiments.cycles gqe_250m v5e:4x4 --batch-size 128 --mesh.data 16
    python -m experiments.cycles gqe_250m v5e:2x2 --layer True
    python -m experiments.cycles gqe_250m v6e:2x2 --layer True --backward True
    python -m experiments.cycles gqe_250m v5e:2x2 --layer True \\
        --splash-blocks 1024 1024 512 1024 1024 1024

The program is compiled ahead of time; nothing runs. XLA's instructions carry the compiler's own
estimate, and a Pallas kernel its static schedule: a model that compares programs on one chip, and
no measurement. A layer is the configuration's attention on one chip of the slice, beside the dense
one of the same heads. With `--splash-blocks`, a dense layer that a user of Flax would write stands
beside them: projections and rotary embedding in plain JAX, and JAX's splash attention.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from experiments.plain import MORE_VMEM, PlainAttention, blocks_of, check_blocks, runs_of_splash
from gqe_jax.commands import parse, run_command
from gqe_jax.compile_for import hlo
from gqe_jax.compile_for.cycle_table import as_json, table
from gqe_jax.compile_for.cycles import Cycles, cycles
from gqe_jax.compile_for.kernel_cycles import KernelCycles, Runs, clear_dump, kernel_cycles
from gqe_jax.compile_for.program import compile_step
from gqe_jax.compile_for.topology import Topology, get_topology
from gqe_jax.config import AttentionConfig, ConfigError, MeshConfig, RunConfig
from gqe_jax.model.attention import make_attention
from gqe_jax.runs import find_config, named_configs
from gqe_jax.sharding import OnMesh, make_mesh
from gqe_kernels.chips import Chip
from gqe_kernels.cycles.runs import scheduled_runs


@dataclasses.dataclass(frozen=True)
class CyclesOptions:
    """What is compiled, and where its cycles are written."""

    layer: bool = False
    """The attention layer alone, beside the dense one; not the train step."""
    length: tuple[int, ...] = (2048,)
    """Tokens of one sequence; of a layer."""
    tokens: int = 32_768
    """Tokens of all sequences; of a layer."""
    backward: bool = False
    """Forward and backward pass of the layer, not the forward pass alone."""
    splash_blocks: tuple[int, ...] = ()
    """Six block sizes of splash attention: q, kv and kv_compute of the forward pass, and of the
    backward pass in one kernel. With them a layer of plain Flax is counted, too."""
    json: pathlib.Path | None = None
    """A file for the figures."""

    def __post_init__(self) -> None:
        check_blocks(self.splash_blocks)
        for length in self.length:
            if length < 1 or self.tokens % length:
                raise ConfigError(f"length is {length}; it must divide tokens, {self.tokens}")
            if self.splash_blocks:
                blocks_of(self.splash_blocks, length)


@dataclasses.dataclass(frozen=True)
class CyclesCommand:
    """The command line."""

    config: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CONFIG")]]
    """A configuration's name or a run's directory, which gives the defaults of the fields."""
    slice: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SLICE")]]
    """A TPU slice, such as v5e:4x4."""
    options: Annotated[CyclesOptions, tyro.conf.arg(name="")]
    run: Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True)
class Counted:
    """The cycles of one compiled program."""

    name: str
    xla: Cycles
    kernels: Sequence[KernelCycles]

    @property
    def total(self) -> float:
        """All cycles but those of kernels that cannot be counted, and of collectives."""
        return self.xla.total.cycles + sum(each.total for each in self.kernels)


def count_layer(
    config: AttentionConfig, topology: Topology, batch: int, length: int, *, backward: bool
) -> Counted:
    """The cycles of one layer on one chip, in bfloat16 with float32 parameters."""
    layer = nnx.eval_shape(lambda: make_attention(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))

    def call(layer: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, aux, _ = layer(x)
        return y, aux

    name = f"{config.variant} layer, {batch} x {length:,}"
    x = (batch, length, config.embed_dim)
    return _count_module(name, layer, call, x, topology, backward=backward)


def count_plain(
    config: AttentionConfig,
    topology: Topology,
    batch: int,
    length: int,
    splash_blocks: Sequence[int],
    *,
    backward: bool,
) -> Counted:
    """The same of a dense layer in plain Flax with splash attention at these block sizes.

    Raises:
      ConfigError: a block size does not divide the length.
    """
    blocks = blocks_of(splash_blocks, length)
    layer = nnx.eval_shape(
        lambda: PlainAttention(config, blocks, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    heads = config.num_query_experts, config.num_kv_heads
    return _count_module(
        f"plain Flax and splash, {batch} x {length:,}",
        layer,
        lambda layer, x: (layer(x), None),
        (batch, length, config.embed_dim),
        topology,
        backward=backward,
        runs=runs_of_splash(batch, length, *heads, blocks),
        compiler_options=MORE_VMEM,
    )


def _count_module(
    name: str,
    layer: nnx.Module,
    call: Callable[[Any, jax.Array], tuple[jax.Array, Any]],
    shape: tuple[int, ...],
    topology: Topology,
    *,
    backward: bool,
    runs: Runs = scheduled_runs,
    compiler_options: Mapping[str, str] | None = None,
) -> Counted:
    graphdef, params = nnx.split(layer)

    def forward(params: nnx.State, x: jax.Array) -> tuple[jax.Array, Any]:
        return call(nnx.merge(graphdef, params), x)

    def both(params: nnx.State, x: jax.Array, dy: jax.Array) -> Any:
        y, pullback, aux = jax.vjp(forward, params, x, has_aux=True)
        return y, aux, pullback(dy)

    # On a mesh of the chip, the kernels take its block sizes.
    mesh = make_mesh(MeshConfig(), list(topology.devices[:1]))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), params
    )
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
    function, arguments = (both, (abstract, x, x)) if backward else (forward, (abstract, x))
    lowered = OnMesh(mesh, jax.jit(function)).lower(*arguments)
    clear_dump()
    text = lowered.compile(compiler_options).as_text()
    assert text is not None  # the compiler for TPUs gives it
    program = hlo.parse(text)
    return Counted(name, cycles(program), kernel_cycles(program, topology.chip, runs))


def count(command: CyclesCommand, say: Callable[[str], None] = print) -> list[Counted]:
    """Compiles what the command asks for, and prints a table for each program.

    Raises:
      ConfigError: the slice is unknown, or the configuration does not divide over it.
      DoesNotFitError: the step takes more memory than the chip has.
    """
    topology, options, counted = get_topology(command.slice), command.options, []
    if not options.layer:
        step = compile_step(command.run, topology)
        counted.append(Counted(command.config, step.cycles, step.kernels))
        say(text(counted[-1], topology.chip))
        return counted
    routed = command.run.model.attention
    for length in options.length:
        batch, backward = options.tokens // length, options.backward

        def add(layer: Counted) -> Counted:
            counted.append(layer)
            say(text(layer, topology.chip) + "\n")
            return layer

        dense = dataclasses.replace(routed, variant="gqa")
        ours, *others = (
            add(count_layer(config, topology, batch, length, backward=backward))
            for config in (routed, dense)
        )
        if blocks := options.splash_blocks:
            plain = count_plain(dense, topology, batch, length, blocks, backward=backward)
            others.append(add(plain))
        for other in others:
            all_counted = all(x.cycles is not None for each in (ours, other) for x in each.kernels)
            ratio = f"{other.total / ours.total:.3f}" if all_counted else "unknown"
            say(f"{command.slice}: {other.name} / {routed.variant} {ratio}")
    return counted


def text(counted: Counted, chip: Chip) -> str:
    """The heading and the table of one program."""
    kernels = sum(each.total for each in counted.kernels)
    xla = counted.xla.total.cycles
    heading = f"{counted.name}: {xla / 1e6:.2f}M of XLA + {kernels / 1e6:.2f}M of kernels"
    return f"{heading}, {counted.total / chip.clock * 1e3:.2f} ms\n" + table(
        counted.xla, counted.kernels, chip
    )


def read_command(arguments: Sequence[str]) -> CyclesCommand:
    """Parses the command line."""
    named = bool(arguments) and not arguments[0].startswith("-")
    run = run_command(lambda: find_config(arguments[0])) if named else RunConfig()
    return parse(
        CyclesCommand(tyro.MISSING, tyro.MISSING, CyclesOptions(), run),
        arguments,
        prog="python -m experiments.cycles",
        description=f"{__doc__} Configurations: {', '.join(named_configs())}.",
    )


def main() -> None:
    """The command line."""
    command = read_command(sys.argv[1:])
    counted = run_command(lambda: count(command))
    if command.options.json is None:
        return
    chip = get_topology(command.slice).chip
    document = {
        "command": f"python -m experiments.cycles {' '.join(sys.argv[1:])}",
        "versions": {name: metadata.version(name) for name in ("jax", "libtpu")},
        "programs": [
            {"name": each.name, **as_json(each.xla, each.kernels, chip)} for each in counted
        ],
    }
    command.options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
