"""Static cycles of a served layer on TPU: the engine's model function with its real kernel.

    python -m experiments.serving gqe_250m v6e:2x2
    python -m experiments.serving gqe_250m v5e:2x2 --variant gqe gqa

One layer of the served model is compiled ahead of time, for one chip of the slice; nothing runs. It
needs the extra `serve`. The engine's kernel is counted from its schedule: its loops run over the
requests, the blocks of their queries and the blocks of their keys, so one program gives both the
prefill of a prompt and a step of decoding. Time in which the kernel waits for HBM is not in it.
"""

import dataclasses
import json
import pathlib
import re
import sys
import types
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqe_jax.commands import parse, run_command
from gqe_jax.compile_for import hlo
from gqe_jax.compile_for.cycles import cycles
from gqe_jax.compile_for.kernel_cycles import clear_dump, dump_directory
from gqe_jax.compile_for.topology import Topology, get_topology
from gqe_jax.config import ModelConfig
from gqe_jax.config_json import to_dict
from gqe_jax.errors import UserError
from gqe_jax.runs import find_config
from gqe_jax.serving.model import GroupedQueryExpertsForCausalLM
from gqe_jax.serving.paged import cache_heads
from gqe_kernels.cycles.bundles import Program, Region, read_kernel, regions


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """What is compiled."""

    config: tyro.conf.Positional[str]
    """A configuration's name or a run's directory."""
    slice: tyro.conf.Positional[str]
    """A TPU slice, such as v6e:2x2."""
    variant: tuple[Literal["gqa", "gqe", "hard_concat", "weighted_concat"], ...] = ("gqa", "gqe")
    """Variants; the first is the baseline of the ratios."""
    top_k: tuple[int, ...] = (1, 2)
    """Selected heads of a group, of the routed variants."""
    tokens: int = 8192
    """Tokens of the prompt that is prefilled in one step, and of the context in decoding."""
    requests: int = 64
    """Requests of a step of decoding."""
    page: int = 256
    """Tokens of a page."""
    json: pathlib.Path | None = None
    """A file for the figures."""


@dataclasses.dataclass(frozen=True)
class Served:
    """Cycles of one layer, and the bytes of its cache.

    Attributes:
      prefill, decode: cycles of the kernel for the prompt, and for a step of all requests.
      around: cycles of XLA's instructions in the attention, for the prompt.
      layer: cycles of all XLA's instructions, for the prompt.
      token_bytes: of the cache, for one token.
    """

    name: str
    prefill: int
    decode: int
    around: int
    layer: int
    token_bytes: int


def block_loops(name: str, config: ServingConfig, *, decode: bool) -> tuple[list[int], int]:
    """How often the nested loops of the engine's kernel run, and the pages of a block of keys.

    The outermost loop is over the requests.

    Args:
      name: the kernel's, which has its block sizes.
    """
    tokens = config.tokens
    if (found := re.search(r"HD_64-bq_(\d+)-bkvp_(\d+)-p_(\d+)", name)) is not None:
        query, pages, page = map(int, found.groups())
        blocks = -(-tokens // (pages * page))  # the kernel for 64 features skips no block
        if decode:
            return [config.requests, config.requests, config.requests * blocks], pages
        return [1, -(-tokens // query), -(-tokens // query) * blocks], pages
    found = re.search(r"bq_(\d+)_\d+-bkv_(\d+)_(\d+)", name)
    assert found is not None, name
    query, fetched, computed = map(int, found.groups())
    ends = [tokens] if decode else [min(tokens, i + query) for i in range(0, tokens, query)]
    outer = sum(-(-end // fetched) for end in ends)
    inner = sum(
        -(-min(end - start, fetched) // computed)
        for end in ends
        for start in range(0, end, fetched)
    )
    times = config.requests if decode else 1
    return [times, times * len(ends), times * outer, times * inner], fetched // config.page


def count(program: Program, tree: Region, runs: Sequence[int], pages: int, *, decode: bool) -> int:
    """Cycles of a kernel whose loops around products run so often.

    Of several bodies with such loops, the first is that of decoding and the last that of prefill.
    What may be jumped over always counts.

    Args:
      pages: how often loops without products run, which copy pages.
    """
    mxu = program.units.index("MXU")
    total = 0

    def loops(region: Region) -> int:
        if not any(program.bundles[i].slots[mxu] for i in range(region.start, region.stop)):
            return 0
        return (region.kind == "loop") + max(map(loops, region.children), default=0)

    def visit(region: Region, times: int, following: Sequence[int]) -> None:
        nonlocal total
        if region.kind == "loop" and loops(region):
            times, following = following[0], following[1:]
        elif region.kind == "loop":
            times *= pages
        total += len(region.own()) * times
        bodies = [child for child in region.children if loops(child)]
        taken = bodies[0 if decode else -1] if bodies else None
        if decode and taken is not None and len(following) > loops(taken):
            following = following[len(following) - loops(taken) :]  # one block of queries: no loop
        for child in region.children:
            if child is taken or child not in bodies:
                visit(child, times, following)

    visit(tree, 1, runs)
    return total


def compile_served(
    model: ModelConfig, config: ServingConfig, topology: Topology
) -> tuple[str, tuple[int, ...]]:
    """The compiled program of a step of the engine's model, and the shape of a layer's cache.

    Raises:
      UserError: the engine is not installed.
    """
    try:
        from tpu_inference.layers.common.attention_interface import (
            get_kv_cache_shape,
            get_kv_cache_shape_hd64,
        )
        from tpu_inference.layers.common.attention_metadata import AttentionMetadata
    except ImportError as error:
        raise UserError(f"the engine is needed: pip install -e '.[serve]' ({error})") from error
    mesh = Mesh(np.array(topology.devices[:1]).reshape(1, 1), ("data", "model"))
    whole = NamedSharding(mesh, PartitionSpec())

    def array(shape: Sequence[int], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=whole)

    engine: Any = types.SimpleNamespace(
        model_config=types.SimpleNamespace(
            model="", dtype=jnp.bfloat16, hf_config=types.SimpleNamespace(model=to_dict(model))
        ),
        cache_config=types.SimpleNamespace(cache_dtype="auto"),
        parallel_config=types.SimpleNamespace(
            pipeline_parallel_size=1, decode_context_parallel_size=1
        ),
    )
    heads, width = cache_heads(model.attention, 1)
    shape_of = get_kv_cache_shape_hd64 if width == 64 else get_kv_cache_shape
    pages = config.tokens // config.page
    cache = array(shape_of(pages, config.page, heads, width, jnp.bfloat16), jnp.bfloat16)
    step = AttentionMetadata(
        input_positions=array([config.tokens]),
        block_tables=array([config.requests * pages]),
        seq_lens=array([config.requests]),
        query_start_loc=array([config.requests + 1]),
        request_distribution=array([3]),
    )
    # The engine asks which chip it has, to choose its blocks.
    here = mock.patch.object(jax, "devices", return_value=list(topology.devices))
    with here, jax.set_mesh(mesh):
        served = nnx.eval_shape(
            lambda: GroupedQueryExpertsForCausalLM(engine, jax.random.key(0), mesh),
            graph_updates=False,
        )
        graphdef, state = nnx.split(served)
        abstract = jax.tree.map(lambda x: array(x.shape, x.dtype), state)
        run = jax.jit(lambda state, *rest: nnx.merge(graphdef, state)(*rest), donate_argnums=1)
        lowered = run.lower(abstract, [cache] * model.num_layers, array([config.tokens]), step)
    text = lowered.compile().as_text()
    assert text is not None  # the compiler for TPUs gives it
    return text, cache.shape


def measure(model: ModelConfig, config: ServingConfig, topology: Topology) -> Served:
    """Compiles a layer and counts it."""
    clear_dump()
    text, cache = compile_served(model, config, topology)
    program = hlo.parse(text)
    xla, kernels = cycles(program), {"prefill": 0, "decode": 0}
    directory = dump_directory()
    assert directory is not None, "LIBTPU_INIT_ARGS names a dump"
    for computation, _ in program.runs():
        for x in computation.values():
            if x.text("custom_call_target") != '"tpu_custom_call"':
                continue
            schedule = read_kernel(directory, [x.name])
            tree = regions(schedule, topology.chip.delay_slots)
            for kind in kernels:
                decode = kind == "decode"
                if x.name.startswith("RPAm" if decode else "RPAd"):
                    continue
                loops = block_loops(x.name, config, decode=decode)
                kernels[kind] += count(schedule, tree, *loops, decode=decode)
    token_bytes = int(np.prod(cache[2:])) * 2
    around = sum(part.cycles for (name, _), part in xla.parts.items() if name == "attention")
    attention = model.attention
    name = "gqa" if attention.variant == "gqa" else f"{attention.variant}, k = {attention.top_k}"
    return Served(name, **kernels, around=around, layer=xla.total.cycles, token_bytes=token_bytes)


def table(rows: Sequence[Served], config: ServingConfig) -> str:
    """The figures in Markdown."""
    lines = [
        f"| {config.slice.partition(':')[0]} | prefill: kernel | XLA in the attention | ratio "
        "| XLA in the layer | decode: kernel | ratio | cache bytes a token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = rows[0]
    for row in rows:
        prefill = (row.prefill + row.around) / (base.prefill + base.around)
        lines.append(
            f"| {row.name} | {row.prefill:,} | {row.around:,} | {prefill:.2f} | {row.layer:,} | "
            f"{row.decode:,} | {row.decode / base.decode:.2f} | {row.token_bytes:,} |"
        )
    return "\n".join(lines)


def models(config: ServingConfig) -> Iterator[ModelConfig]:
    """What is compared, each with one layer."""
    model = find_config(config.config).model
    for variant in config.variant:
        for k in config.top_k if variant != "gqa" else (1,):
            attention = dataclasses.replace(model.attention, variant=variant, top_k=k)
            yield dataclasses.replace(
                model, attention=attention, num_layers=1, dtype="bfloat16", remat="keep_everything"
            )


def run(config: ServingConfig) -> list[Served]:
    """Compiles all variants, and prints their table."""
    topology, rows = get_topology(config.slice), []
    for model in models(config):
        rows.append(measure(model, config, topology))
        print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows, config))
    return rows


def main() -> None:
    """The command line."""
    command = "python -m experiments.serving"
    config = parse(ServingConfig, sys.argv[1:], prog=command, description=__doc__)
    rows = run_command(lambda: run(config))
    if config.json is not None:
        names = ("jax", "libtpu", "tpu-inference")
        document = {
            "command": f"{command} {' '.join(sys.argv[1:])}",
            "versions": {name: metadata.version(name) for name in names},
            "layers": [dataclasses.asdict(row) for row in rows],
        }
        config.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
