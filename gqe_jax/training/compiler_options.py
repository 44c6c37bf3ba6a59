"""Options of the compiler for TPUs, by the name of a set and the kind of chip."""

from jax.sharding import Mesh

from gqe_jax.config import LibtpuFlags
from gqe_kernels.chips import CHIPS

OVERLAP: dict[str, dict[str, str]] = {
    # Gathers and sums in several steps, each fused with a product that runs meanwhile. The compiler
    # refuses these options for the other chips.
    "v5e": {
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
        "xla_enable_async_all_gather": "true",
        "xla_enable_async_all_reduce": "true",
    },
}
BETWEEN_SLICES: dict[str, str] = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
"""Published for sums of gradients over the network between slices."""


def compiler_options(flags: LibtpuFlags, mesh: Mesh) -> dict[str, str]:
    """The options with which the steps on `mesh` are compiled; none where it has no TPUs."""
    devices = list(mesh.devices.flat)
    kind = devices[0].device_kind
    chip = next((name for name, each in CHIPS.items() if kind in each.device_kinds), None)
    if flags == "default" or chip is None or devices[0].platform != "tpu":
        return {}
    slices = {getattr(device, "slice_index", None) for device in devices}
    return OVERLAP.get(chip, {}) | (BETWEEN_SLICES if len(slices) > 1 else {})
