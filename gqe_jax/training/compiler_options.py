"""Options of the compiler for TPUs, by the name of a set and the kind of chip."""

from typing import Any

from jax.sharding import Mesh

from gqe_jax.config import LibtpuFlags
from gqe_kernels.chips import CHIPS

OVERLAP: dict[str, str] = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}
"""Gathers in several steps, each fused with a product that runs meanwhile."""
BETWEEN_SLICES: dict[str, str] = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
"""Sums of gradients over the network between slices, begun as the backward pass makes them."""


def compiler_options(flags: LibtpuFlags, mesh: Mesh) -> dict[str, Any]:
    """The options with which the steps on `mesh` are compiled; none where it has no TPUs."""
    devices = list(mesh.devices.flat)
    kinds = {kind for chip in CHIPS.values() for kind in chip.device_kinds}
    if flags == "default" or devices[0].device_kind not in kinds or devices[0].platform != "tpu":
        return {}
    slices = {getattr(device, "slice_index", None) for device in devices}
    return OVERLAP | (BETWEEN_SLICES if len(slices) > 1 else {})
