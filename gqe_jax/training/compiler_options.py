"""Options of the compiler for TPUs, by the name of a set and the kind of chip."""

from jax.sharding import Mesh

from gqe_jax.config import LibtpuFlags
from gqe_kernels.chips import CHIPS

OVERLAP: dict[str, dict[str, str]] = {
    # The SparseCore runs the collectives while the TensorCore computes. The sets that are published
    # for v5e, v6e and between slices hide nothing more, or cost more than they hide: docs/pods.md.
    "v5p": {
        "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
        "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
        "xla_tpu_enable_all_gather_offload_tracing": "true",
        "xla_tpu_use_tc_device_shape_on_sc": "true",
        "xla_sc_disable_megacore_partitioning": "true",
    },
}


def compiler_options(flags: LibtpuFlags, mesh: Mesh) -> dict[str, str]:
    """The options with which the steps on `mesh` are compiled; none where it has no TPUs."""
    devices = list(mesh.devices.flat)
    kind = devices[0].device_kind
    chip = next((name for name, each in CHIPS.items() if kind in each.device_kinds), None)
    if flags == "default" or chip is None or devices[0].platform != "tpu":
        return {}
    return OVERLAP.get(chip, {})
