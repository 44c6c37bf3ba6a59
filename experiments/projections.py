"""One product for queries, keys and values, or one each: compiled for chips, not run.

    python -m experiments.projections --chip v5e v6e
    python -m experiments.projections --chip h200      # needs pip install '.[cuda]'

On a GPU XLA merges such products itself, up to a size that a flag sets: a fourth form.

The attention layer of `gqe_250m` as it is; with the weights of each group concatenated to [embed,
group, experts + 2, head_dim], which still shards over groups; and with all weights, the shared
query's too, in one matrix. The router stays apart in all three: it is a float32 product at the
highest precision, and in one bfloat16 product with the others it would select other experts.
"""

import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from configs import CONFIGS
from gqe_jax.commands import parse
from gqe_jax.compile_for import hlo
from gqe_jax.compile_for.costs import count
from gqe_jax.model import attention
from gqe_jax.model.transformer import Transformer
from gqe_kernels.chips import CHIPS, H200_TARGET

Projected = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ProjectionsConfig:
    """Compile each form of the projections."""

    chip: tuple[Literal["v5e", "v5p", "v6e", "tpu7x", "h200"], ...] = ("v5e",)
    """What to compile for."""
    batch: int = 16
    """Sequences."""
    length: int = 2048
    """Tokens of each."""


def by_group(layer: attention.GroupedQueryExperts, x: jax.Array) -> Projected:
    """One product for what belongs to a group, another for the shared query."""
    dtype, experts = layer.query.dtype, layer.config.experts_per_group
    query, key, value = (getattr(layer, name).kernel[...] for name in ("query", "key", "value"))
    kernels = [query, key[:, :, None], value[:, :, None]]
    kernel = jnp.concatenate([kernel.astype(dtype) for kernel in kernels], axis=2)
    heads = jnp.einsum("ble,egmd->blgmd", x.astype(dtype), kernel)
    return {
        "query": heads[..., :experts, :],
        "key": heads[..., experts, :],
        "value": heads[..., experts + 1, :],
        "shared_query": layer.shared_query(x),
    }


def all_in_one(layer: attention.GroupedQueryExperts, x: jax.Array) -> Projected:
    """One product for everything but the router."""
    dtype, names = layer.query.dtype, ("query", "key", "value", "shared_query")
    kernels = [getattr(layer, name).kernel[...] for name in names]
    flat = [kernel.astype(dtype).reshape(kernel.shape[0], -1) for kernel in kernels]
    out = jnp.einsum("ble,ec->blc", x.astype(dtype), jnp.concatenate(flat, axis=1))
    found, start = {}, 0
    for name, kernel in zip(names, kernels, strict=True):
        stop = start + kernel.size // kernel.shape[0]
        found[name] = out[..., start:stop].reshape(*x.shape[:2], *kernel.shape[1:])
        start = stop
    return found


FORMS = {"one each": None, "by group": by_group, "all in one": all_in_one}
MERGED_BY_XLA = {"xla_gpu_dot_merger_threshold_mb": 512}


def use_projections(module: nnx.Module, project: Callable[..., Projected] | None) -> None:
    """Makes the routed layers in `module` take their projections from `project`."""

    class ProjectedExperts(attention.GroupedQueryExperts):
        def __call__(self, x, **given):
            for name, found in project(self, x).items():
                setattr(self, name, lambda _, found=found: found)
            return super().__call__(x, **given)

    for _, layer in nnx.iter_modules(module):
        if project is not None and isinstance(layer, attention.GroupedQueryExperts):
            layer.__class__ = ProjectedExperts


def device(chip: str) -> jax.Device:
    """A device to compile for, which need not be here."""
    if chip == "h200":
        topology = topologies.get_topology_desc(
            topology_name="", topology="1x1x1", platform="cuda", target_config=H200_TARGET
        )
    else:
        topology = topologies.get_topology_desc(topology_name=CHIPS[chip].topology, platform="tpu")
    return topology.devices[0]


def programs(
    project: Callable[..., Projected] | None,
    batch: int,
    length: int,
    sharding: SingleDeviceSharding,
    flags: dict[str, int] | None = None,
    implementation: str | None = None,
) -> Iterator[tuple[str, jax.stages.Compiled]]:
    """The layer forward, the layer forward and backward, and the model's prefill, compiled."""
    config = CONFIGS["gqe_250m"].model
    dtype = jnp.dtype(config.dtype)

    def like(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def split(create):
        module = nnx.eval_shape(create)
        use_projections(module, project)
        return nnx.split(module)

    layer = functools.partial(attention.make_attention, config.attention, dtype=dtype)
    graphdef, params = split(lambda: layer(implementation=implementation, rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((batch, length, config.embed_dim), dtype, sharding=sharding)

    def forward(params, x):
        y, aux, _ = nnx.merge(graphdef, params)(x)
        return y, aux.load_balancing_loss

    def both(params, x, cotangent):
        out, vjp = jax.vjp(forward, params, x)
        return out, vjp((cotangent, jnp.ones(())))

    yield "layer, forward", jax.jit(forward).lower(like(params), x).compile(flags)
    yield "layer, both", jax.jit(both).lower(like(params), x, x).compile(flags)

    model = functools.partial(Transformer, config)
    model_def, params = split(lambda: model(implementation=implementation, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=sharding)
    prefill = jax.jit(lambda params, tokens: nnx.merge(model_def, params)(tokens)[0])
    yield "model, forward", prefill.lower(like(params), tokens).compile(flags)


def tpu_cells(compiled: jax.stages.Compiled) -> list[str]:
    """Estimated cycles of XLA's instructions, without the kernels; HBM traffic; temporaries."""
    program = hlo.parse(compiled.as_text())
    cycles = 0
    for computation, times in program.runs():
        for instruction in computation.values():
            found = re.search(r"estimated_cycles\W+(\d+)", instruction.attributes)
            cycles += times * int(found[1]) if found else 0
    memory = compiled.memory_analysis().temp_size_in_bytes
    return [
        f"{cycles / 1e6:.2f}M",
        f"{count(program).hbm_bytes / 1e9:.2f} GB",
        f"{memory / 1e6:.0f} MB",
    ]


def gpu_cells(compiled: jax.stages.Compiled, tokens: int) -> list[str]:
    """Columns of the products with a row for each token; launches; HBM traffic; temporaries."""
    found = re.findall(rf"%gemm\S* = (\w+)\[{tokens},(\d+)\]", compiled.as_text())
    program = hlo.parse(compiled.as_text())
    launches = sum(
        times * sum(x.opcode in ("fusion", "custom-call") for x in computation.values())
        for computation, times in program.runs()
    )
    memory = compiled.memory_analysis().temp_size_in_bytes
    return [
        ", ".join(columns if kind == "bf16" else f"{columns} ({kind})" for kind, columns in found),
        str(launches),
        f"{count(program).hbm_bytes / 1e9:.2f} GB",
        f"{memory / 1e6:.0f} MB",
    ]


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    given = sys.argv[1:] if arguments is None else arguments
    prog = "python -m experiments.projections"
    options = parse(ProjectionsConfig, given, prog=prog, description=__doc__)
    for chip in options.chip:
        gpu = chip == "h200"
        columns = ["columns of the products", "launches"] if gpu else ["cycles"]
        print(f"| {chip} | projections | {' | '.join(columns)} | HBM traffic | temporaries |")
        print("|" + "---|" * (4 + len(columns)))
        implementation = "pallas_gpu" if gpu else None
        sharding = SingleDeviceSharding(device(chip))
        forms = [(form, project, None) for form, project in FORMS.items()]
        if gpu:
            forms.append(("one each, merged by XLA", None, MERGED_BY_XLA))
        for form, project, flags in forms:
            print(f"compiling for {chip}: {form}", file=sys.stderr, flush=True)
            size = options.batch, options.length
            for name, compiled in programs(project, *size, sharding, flags, implementation):
                cells = gpu_cells(compiled, math.prod(size)) if gpu else tpu_cells(compiled)
                print(f"| {name} | {form} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
