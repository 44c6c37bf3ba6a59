"""What ptxas says of the GPU kernels, compiled for an H200 that is not here.

    python -m kernels.benchmarks.gpu_compile

Needs the extra `cuda`, and no GPU.
"""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from gqe_kernels import routed_attention

H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150754820096 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""
LENGTH, GROUP, EXPERT = 1024, 8, 2


def compile_case(head_dim: int, segments: bool) -> None:
    """Compiles forward and backward; ptxas writes its report to the error stream."""
    topology = topologies.get_topology_desc(
        topology_name="", topology="1x1x1", platform="cuda", target_config=H200
    )
    sharding = SingleDeviceSharding(topology.devices[0])

    def like(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, LENGTH, *shape), dtype, sharding=sharding)

    def loss(query, key, value, shared_query, weight, index, ids):
        slots = routed_attention(
            query,
            key,
            value,
            index,
            weight,
            shared_query,
            q_segment_ids=ids,
            kv_segment_ids=ids,
            implementation="pallas_gpu",
        )
        return jnp.sum(slots.astype(jnp.float32) ** 2)

    heads = like(GROUP, head_dim)
    arguments = (
        like(GROUP, EXPERT, head_dim),
        heads,
        heads,
        like(head_dim),
        like(GROUP, 1),
        like(GROUP, 1, dtype=jnp.int32),
        like(dtype=jnp.int32) if segments else None,
    )
    jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))).lower(*arguments).compile()


def main() -> None:
    """Prints the table; each case in a process of its own, whose error stream is read."""
    if len(sys.argv) == 3:
        compile_case(int(sys.argv[1]), sys.argv[2] == "yes")
        return
    print("| kernel | head_dim | segments | registers at launch | bytes spilled | serialised |")
    print("|---|---|---|---|---|---|")
    for head_dim in (64, 128):
        for segments in ("no", "yes"):
            found = subprocess.run(
                [sys.executable, "-m", "kernels.benchmarks.gpu_compile", str(head_dim), segments],
                env=os.environ | {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1"},
                capture_output=True,
                check=False,
            )
            text = (found.stdout + found.stderr).replace(b"\0", b"").decode(errors="replace")
            if found.returncode:
                sys.exit(text)
            serialised = "yes" if re.search("serializ", text, re.IGNORECASE) else "no"
            kernels = re.findall(
                r"entry function '(gqe_\w+?)_mosaic_gpu_kernel'.*?(\d+) bytes spill stores"
                r".*?Used (\d+) registers",
                text,
                re.DOTALL,
            )
            for name, spilled, registers in kernels:
                print(
                    f"| {name} | {head_dim} | {segments} | {registers} | {spilled} | {serialised} |"
                )


if __name__ == "__main__":
    main()
