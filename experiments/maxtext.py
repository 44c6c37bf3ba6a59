"""Static cycles on TPU of MaxText's dense train step at the geometry of one of our configurations.

    PYTHONPATH=DIR python -m experiments.maxtext gqa_250m v5e:4x4 --batch-size 128 --mesh.data 16

DIR has MaxText, without the packages that its step does not need: the command prints how to install
it. The step is compiled ahead of time; nothing runs. It is counted as `experiments.cycles` counts
ours: XLA's estimate of each instruction, and the static schedule of each Pallas kernel.
`--ours True` compiles the configuration's own step, too, and prints the ratio.

The step is the one that MaxText's `train_compile` compiles, with these choices:

- The configuration's geometry with all query heads in Llama 2's decoder block: RMSNorm before each
  half, SwiGLU, rotary embedding, logits from the embedding if ours are, a scan over layers, no
  dropout. Logits are bfloat16, cast to float32, as is MaxText's default.
- Float32 weights and optimizer state; AdamW, and the gradient clipped by its norm.
- `data`, `fsdp` and `tensor` of the configuration's mesh, on one slice.
- JAX's splash attention. MaxText always gives it segment ids, which do not change the blocks that
  it visits. Blocks are MaxText's default, 512, with a kernel of its own for dQ; or those of
  `--splash-blocks`, with one kernel for the backward pass and 96 MiB of scoped VMEM.
- `--remat` is its `remat_policy`: `full` is our `keep_nothing`, `minimal` near `keep_dots` without
  the attention's output, which `minimal_with_context` keeps, as `keep_dots` does.

Its parts have other names than ours, so cycles are shown by pass.
"""

import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Annotated, Any, Literal
from unittest import mock

import jax
import tyro

from experiments.cycles import Counted, text
from experiments.plain import MORE_VMEM, blocks_of, check_blocks, runs_of_splash
from gqe_jax.commands import parse, run_command
from gqe_jax.compile_for import hlo
from gqe_jax.compile_for.costs import count
from gqe_jax.compile_for.cycles import OTHER, Cycles, PartCycles, cycles
from gqe_jax.compile_for.kernel_cycles import Runs, clear_dump, kernel_cycles
from gqe_jax.compile_for.program import DoesNotFitError, compile_step
from gqe_jax.compile_for.topology import Topology, get_topology
from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.errors import UserError
from gqe_jax.runs import find_config, named_configs
from gqe_jax.sharding import check_divides, make_mesh
from gqe_kernels.chips import GIB

INSTALL = (
    "pip install --no-deps --target DIR maxtext==0.2.5 aqtp qwix && "
    "pip install --target DIR jinja2 omegaconf psutil pydantic"
)
# MaxText imports these for tokenizers, checkpoints and kernels that its dense step does not use.
UNUSED = {"drjax", "pathwaysutils", "sentencepiece", "sympy", "tiktoken", "tokamax", "transformers"}
Remat = Literal[
    *("full", "minimal", "minimal_with_context", "minimal_offloaded", "save_out_proj", "none"),
    *("save_dot_except_mlp", "save_dot_except_mlpwi", "save_dot_with_context_except_mlp"),
    *("save_qkv_proj", "qkv_proj_offloaded"),
]


@dataclasses.dataclass(frozen=True)
class MaxTextOptions:
    """How MaxText's step is compiled."""

    remat: Remat = "minimal"
    """MaxText's remat_policy."""
    splash_blocks: tuple[int, ...] = ()
    """Six block sizes of splash attention: q, kv and kv_compute of the forward pass, and of the
    backward pass in one kernel. Without: 512, and a kernel of its own for dQ."""
    ours: bool = False
    """Compile the configuration's own step, too."""

    def __post_init__(self) -> None:
        check_blocks(self.splash_blocks)

    def blocks(self, length: int) -> dict[str, int]:
        """The block sizes of splash attention, cut to the length as MaxText does.

        Raises:
          ConfigError: one does not divide the length.
        """
        return blocks_of(self.splash_blocks, length)


@dataclasses.dataclass(frozen=True)
class MaxTextCommand:
    """The command line."""

    config: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CONFIG")]]
    """A configuration's name or a run's directory, which gives the defaults of the fields."""
    slice: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SLICE")]]
    """A TPU slice, such as v5e:4x4."""
    options: Annotated[MaxTextOptions, tyro.conf.arg(name="")]
    run: Annotated[RunConfig, tyro.conf.arg(name="")]


def fields(run: RunConfig, mesh: Mapping[str, int], options: MaxTextOptions) -> list[str]:
    """MaxText's configuration of the step, as its command line.

    Raises:
      ConfigError: MaxText's block has no such geometry or mesh.
    """
    model, attention = run.model, run.model.attention
    found = mesh["context"], attention.qk_norm, attention.rope_scaling.kind
    if found != (1, False, "none"):
        raise ConfigError(
            f"mesh.context, qk_norm and rope_scaling.kind are {found}; beside MaxText's block they "
            "must be (1, False, 'none')"
        )
    devices = mesh["data"] * mesh["fsdp"] * mesh["tensor"]
    # Such blocks need more vector memory than libtpu lets a kernel have by default.
    ((option, value),) = MORE_VMEM.items()
    vmem = f"compile_xla_flags=--{option}={value}"
    vmem = vmem if options.splash_blocks else ""
    blocks = " ".join(
        f"sa_{name}={size}" for name, size in options.blocks(run.sequence_length).items()
    )
    return f"""
        base_emb_dim={model.embed_dim} base_mlp_dim={model.mlp_dim} vocab_size={model.vocab_size}
        base_num_decoder_layers={model.num_layers} base_num_kv_heads={attention.num_kv_heads}
        base_num_query_heads={attention.num_query_experts} head_dim={attention.resolved_head_dim}
        rope_max_timescale={int(attention.rope_theta)} enable_dropout=false scan_layers=true
        normalization_layer_epsilon={model.norm_epsilon} normalize_embedding_logits=false
        logits_via_embedding={model.tied_embedding} dtype={model.dtype} weight_dtype=float32
        remat_policy={options.remat} opt_type=adamw steps={run.steps}
        attention=flash sa_use_fused_bwd_kernel={bool(options.splash_blocks)} {blocks}
        gradient_accumulation_steps={run.accumulation_steps}
        per_device_batch_size={run.batch_size / run.accumulation_steps / devices}
        max_target_length={run.sequence_length} ici_data_parallelism={mesh["data"]}
        ici_fsdp_parallelism={mesh["fsdp"]} ici_tensor_parallelism={mesh["tensor"]}
        internal_compile=true internal_compile_num_devices={devices} compile_topology_num_slices=1
        {vmem} dataset_type=synthetic enable_checkpointing=false
        skip_jax_distributed_system=true log_config=false run_name=compiled
    """.split()


class _Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages in `UNUSED` that are not installed: modules that have every name."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] in UNUSED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return mock.MagicMock(name=spec.name, __path__=[], __version__="0")

    def exec_module(self, module: Any) -> None:
        """Leaves the module as it is."""


def compile_maxtext(
    run: RunConfig, mesh: Mapping[str, int], topology: Topology, options: MaxTextOptions
) -> jax.stages.Compiled:
    """Compiles MaxText's train step for a slice, as its `train_compile` does.

    Raises:
      ConfigError: MaxText has no such geometry, mesh or remat policy.
      DoesNotFitError: the step takes more memory than the chip has.
      UserError: MaxText is not installed.
    """
    chosen = fields(run, mesh, options)
    if importlib.util.find_spec("maxtext") is None:
        raise UserError(
            f"maxtext is not installed. Install it into a folder of its own, {INSTALL}, and give "
            "that to the command: PYTHONPATH=DIR"
        )
    os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
    with mock.patch.object(sys, "meta_path", [*sys.meta_path, _Unused()]):
        from maxtext.configs import pyconfig
        from maxtext.trainers.pre_train import train, train_compile
        from maxtext.utils import maxtext_utils, sharding

        base = pathlib.Path(pyconfig.__file__).with_name("base.yml")
        given = ["", str(base), f"compile_topology={topology.name}", *chosen]
        try:
            config = pyconfig.initialize(given)
        except ValueError as error:
            raise ConfigError(f"MaxText does not take the configuration: {error}") from error
        devices = train_compile.get_topology_mesh(config)
        arguments, named, state, _, model = train_compile.get_shaped_inputs(devices, config)
        params, state = sharding.maybe_update_params_sharding_with_opt(config, state)
        state = sharding.build_zero1_input_state_mesh_shardings(config, state, params)
        data = sharding.get_input_data_sharding(config, devices)
        function, *signature = maxtext_utils.get_functional_train_with_signature(
            train.train_step, data, state, model, config, params
        )
        rules = train_compile.axis_rules(config.logical_axis_rules)
        clear_dump()
        try:
            return train_compile.jit_and_compile(
                function, arguments, named, devices, *signature, config, rules
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise DoesNotFitError(
                f"MaxText's step does not fit {topology.name}: {str(error).splitlines()[0]} To "
                "make it fit: --remat full, a smaller --batch-size, or a larger --mesh.fsdp"
            ) from error


def splash_runs_of(run: RunConfig, mesh: Mapping[str, int], options: MaxTextOptions) -> Runs:
    """How often the regions of MaxText's splash attention run on one chip, by kernel."""
    attention, length = run.model.attention, run.sequence_length
    rows = run.batch_size // run.accumulation_steps // (mesh["data"] * mesh["fsdp"])
    heads = [n // mesh["tensor"] for n in (attention.num_query_experts, attention.num_kv_heads)]
    return runs_of_splash(rows, length, *heads, options.blocks(length))


def by_pass(counted: Cycles) -> Cycles:
    """The cycles without their parts."""
    passes = {}
    for (_, pass_), own in counted.parts.items():
        passes[OTHER, pass_] = passes.get((OTHER, pass_), PartCycles()) + own
    return Cycles(passes)


def compare(command: MaxTextCommand, say: Callable[[str], None] = print) -> list[Counted]:
    """Compiles MaxText's step, and before it ours if asked to, and prints a table for each."""
    topology, options, counted = get_topology(command.slice), command.options, []

    def add(name: str, xla: Cycles, kernels: Sequence, temporaries: int, flops: int) -> None:
        counted.append(Counted(name, xla, kernels))
        memory = f"temporaries {temporaries / GIB:.2f} GiB, products {flops / 1e12:.2f} TFLOP"
        say(f"{text(counted[-1], topology.chip)}\n  {memory}\n")

    mesh = make_mesh(command.run.mesh, list(topology.devices)).shape
    check_divides(command.run, dict(mesh))
    if options.ours:
        own = compile_step(command.run, topology)
        sizes = own.memory.temporaries, own.costs.product_flops
        add(command.config, own.cycles, own.kernels, *sizes)
    compiled = compile_maxtext(command.run, mesh, topology, options)
    program = hlo.parse(compiled.as_text())
    kernels = kernel_cycles(program, topology.chip, splash_runs_of(command.run, mesh, options))
    kernels = [dataclasses.replace(kernel, part=OTHER) for kernel in kernels]
    name = f"MaxText {metadata.version('maxtext')}, {options.remat}"
    sizes = compiled.memory_analysis().temp_size_in_bytes, count(program).product_flops
    add(name, by_pass(cycles(program)), kernels, *sizes)
    if options.ours and all(x.cycles is not None for each in counted for x in each.kernels):
        ours, theirs = (each.total for each in counted)
        say(f"MaxText / {command.config} {theirs / ours:.3f}")
    return counted


def read_command(arguments: Sequence[str]) -> MaxTextCommand:
    """Parses the command line."""
    named = bool(arguments) and not arguments[0].startswith("-")
    run = run_command(lambda: find_config(arguments[0])) if named else RunConfig()
    return parse(
        MaxTextCommand(tyro.MISSING, tyro.MISSING, MaxTextOptions(), run),
        arguments,
        prog="python -m experiments.maxtext",
        description=f"{__doc__} Configurations: {', '.join(named_configs())}.",
    )


if __name__ == "__main__":
    command = read_command(sys.argv[1:])
    run_command(lambda: compare(command))
