"""Compiles the GPU kernels for an H200 that is not here, and tabulates what ptxas reports.

    python -m kernels.benchmarks.gpu_compile
    python -m kernels.benchmarks.gpu_compile --instructions

Needs the extra `cuda`, and no GPU; `--instructions`, which counts what a step of each loop issues,
also `pip install nvidia-cuda-nvdisasm`. jax's port of FlashAttention-3 is compiled for comparison.
"""

import dataclasses
import functools
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from gqe_kernels import routed_attention
from gqe_kernels.chips import H200_TARGET
from gqe_kernels.pallas_gpu.blocks import DEFAULTS
from kernels.benchmarks import sass

LENGTH, GROUP, EXPERT = 1024, 8, 2


def _compile(function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> None:
    topology = topologies.get_topology_desc(
        topology_name="", topology="1x1x1", platform="cuda", target_config=H200_TARGET
    )
    sharding = SingleDeviceSharding(topology.devices[0])
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    jax.jit(function).lower(*arguments).compile()


def _like(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, LENGTH, *shape), dtype)


def compile_gqe(head_dim: int, segments: bool) -> None:
    """Compiles this project's kernels, forward and backward."""

    def loss(query, key, value, shared_query, weight, index, ids):
        given = (query, key, value, index, weight, shared_query)
        segments = {"q_segment_ids": ids, "kv_segment_ids": ids}
        slots = routed_attention(*given, **segments, implementation="pallas_gpu")
        return jnp.sum(slots.astype(jnp.float32) ** 2)

    heads, weight = _like(GROUP, head_dim), _like(GROUP, 1)
    index, ids = _like(GROUP, 1, dtype=jnp.int32), _like(dtype=jnp.int32) if segments else None
    query, shared_query = _like(GROUP, EXPERT, head_dim), _like(head_dim)
    gradients = jax.grad(loss, argnums=(0, 1, 2, 3, 4))
    _compile(gradients, query, heads, heads, shared_query, weight, index, ids)


def compile_peer(head_dim: int) -> None:
    """Compiles jax's port of FlashAttention-3, forward, with as many blocks of keys in flight."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    # It asks the CUDA that is here for its version, where the one that compiles matters.
    attention_mgpu.cuda_versions = SimpleNamespace(cuda_runtime_get_version=lambda: 13_000)
    stages = DEFAULTS[head_dim].stages
    config = attention_mgpu.TuningConfig(
        block_q=64, block_kv=128, max_concurrent_steps=stages, causal=True
    )
    heads, groups = (
        _like(number, head_dim, dtype=jnp.float16) for number in (GROUP * EXPERT, GROUP)
    )
    _compile(lambda *x: attention_mgpu.attention(*x, config), heads, groups, groups)


CASES = {
    f"gqe{' with segments' if segments else ''}, {head_dim}": (
        functools.partial(compile_gqe, head_dim, segments)
    )
    for head_dim, segments in itertools.product((64, 128), (False, True))
} | {f"attention_mgpu, {d}": functools.partial(compile_peer, d) for d in (64, 128)}
NAMES = {"entry": "attention_mgpu"}  # for kernels whose own name says little


def _report(case: str, **dumps: str) -> str:
    """What the compilers print for a case; they write to the streams of the process."""
    found = subprocess.run(
        [sys.executable, "-m", "kernels.benchmarks.gpu_compile", "--case", case],
        env=os.environ | {"JAX_PLATFORMS": "cpu", **dumps},
        capture_output=True,
        check=False,
    )
    text = (found.stdout + found.stderr).replace(b"\0", b"").decode(errors="replace")
    if found.returncode:
        sys.exit(text)
    return text


def _named(kernel: str) -> str:
    name = kernel.removesuffix("_mosaic_gpu_kernel")
    return NAMES.get(name, name)


def _registers() -> Iterator[str]:
    yield "| kernel | case | registers at launch | bytes spilled | serialised |"
    yield "|---|---|---|---|---|"
    for case in CASES:
        text = _report(case, MOSAIC_GPU_DUMP_PTXAS="1")
        serialised = "yes" if re.search("serializ", text, re.IGNORECASE) else "no"
        kernels = re.findall(
            r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers",
            text,
            re.DOTALL,
        )
        for name, spilled, registers in kernels:
            yield f"| {_named(name)} | {case} | {registers} | {spilled} | {serialised} |"


def _instructions() -> Iterator[str]:
    yield (
        "| kernel | case | loop | instructions | cycles of tensor cores | of exponentials | "
        "share of the peak, at most |"
    )
    yield "|---|---|---|---|---|---|---|"
    for case in CASES:
        text = _report(case, MOSAIC_GPU_DUMP_SASS="1")
        loops = sass.loops(text)
        if not loops:
            sys.exit("no listing: pip install nvidia-cuda-nvdisasm\n" + text)
        for kernel, of_kernel in itertools.groupby(loops, lambda loop: loop.kernel):
            for which, loop in zip(("whole", "masked"), of_kernel, strict=True):
                yield (
                    f"| {_named(kernel)} | {case} | {which} | {loop.instructions} | "
                    f"{loop.tensor_cycles} | {loop.exponential_cycles} | {loop.most:.0%} |"
                )


@dataclasses.dataclass(frozen=True)
class GpuOptions:
    """Compile every case, and print a table."""

    instructions: bool = False
    """Count the instructions in a step of each loop."""
    case: str | None = None
    """Only compile this case."""

    def __post_init__(self) -> None:
        if self.case is not None and self.case not in CASES:
            raise ValueError(f"case is {self.case!r}; it must be one of {'; '.join(CASES)}")


def main() -> None:
    """The command line."""
    options = tyro.cli(GpuOptions, description=__doc__)
    if options.case:
        CASES[options.case]()
        return
    for line in _instructions() if options.instructions else _registers():
        print(line, flush=True)


if __name__ == "__main__":
    main()
