"""What a TPU or GPU can do: the one table of chips that compilers, kernels and reports read.

Google Cloud's pages on v5e, v5p, v6e and TPU7x (docs.cloud.google.com/tpu/docs/v5p and so on, read
in 2026) give HBM in GiB, bfloat16 peaks, and the ICI and DCN bandwidth of a chip. The issue periods
of libtpu's static profile give the matrix units: 8 float32 rows take 8 cycles on v5e and v5p, and 4
on v6e and tpu7x. At the published clock that is the published peak: 197 TFLOP/s for v5e at 1.5 GHz,
918 for v6e at 1.75. Vendors' data sheets, without sparsity, give the peaks of all other devices.
"""

import dataclasses

import jax

MIB, GIB = 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX calls one device: a chip, or half a chip of TPU7x. Rates are per second.

    Attributes:
      topology: the smallest slice that `jax.experimental.topologies` describes.
      device_kinds: JAX's names of the device.
      peak_flops: bfloat16 multiply-adds, 2 each.
      link_bandwidth: bytes in one direction over one of the `links` to neighbours: the chip's
        bidirectional ICI bandwidth over twice its number of links.
      dcn_bandwidth: bytes in one direction over the data-center network, the host's shared out.
      wraps: along a dimension of this many chips or a multiple, the last is linked to the first.
      vmem_bytes: vector memory of one core.
      bfloat16_exp: whether the vector unit has exponentials of bfloat16.
      mxus: matrix units in one core.
      mxu_size: rows and columns of one matrix unit.
      rows_per_cycle: left-hand rows that one matrix unit takes in a cycle.
      delay_slots: bundles after a branch that run whether or not it is taken.
      cores: TensorCores that one program is split over by dimensions marked "parallel".
    """

    topology: str
    device_kinds: tuple[str, ...]
    hbm_bytes: int
    peak_flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    links: int
    dcn_bandwidth: float
    wraps: int
    vmem_bytes: int
    bfloat16_exp: bool
    mxus: int
    mxu_size: int
    rows_per_cycle: int
    delay_slots: int = 4
    cores: int = 1

    @property
    def peak_macs(self) -> int:
        """Multiply-adds of bfloat16 in one cycle of one core."""
        return self.mxus * self.mxu_size**2 * self.rows_per_cycle

    @property
    def clock(self) -> float:
        """Cycles in a second, at which the published peak is that of the matrix units."""
        return self.peak_flops / (2 * self.peak_macs * self.cores)


_128_WIDE = {"bfloat16_exp": False, "mxus": 4, "mxu_size": 128, "rows_per_cycle": 1}
_256_WIDE = {"bfloat16_exp": True, "mxus": 2, "mxu_size": 256, "rows_per_cycle": 2}
CHIPS = {
    "v5e": Chip(
        topology="v5e:2x2",
        device_kinds=("TPU v5 lite", "TPU v5e"),
        hbm_bytes=16 * GIB,
        peak_flops=197e12,
        hbm_bandwidth=819e9,
        link_bandwidth=50e9,
        links=4,
        dcn_bandwidth=25e9 / 8,
        wraps=16,
        vmem_bytes=128 * MIB,
        **_128_WIDE,
    ),
    "v5p": Chip(
        topology="v5p:2x2x1",
        device_kinds=("TPU v5", "TPU v5p"),
        hbm_bytes=95 * GIB,
        peak_flops=459e12,
        hbm_bandwidth=2765e9,
        link_bandwidth=100e9,
        links=6,
        dcn_bandwidth=50e9 / 8,
        wraps=4,
        vmem_bytes=64 * MIB,
        cores=2,
        **_128_WIDE,
    ),
    "v6e": Chip(
        topology="v6e:2x2",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        hbm_bytes=32 * GIB,
        peak_flops=918e12,
        hbm_bandwidth=1638e9,
        link_bandwidth=100e9,
        links=4,
        dcn_bandwidth=100e9 / 8,
        wraps=16,
        vmem_bytes=128 * MIB,
        **_256_WIDE,
    ),
    "tpu7x": Chip(  # each rate is half the chip's
        topology="tpu7x:2x2x1",
        device_kinds=("TPU7x",),
        hbm_bytes=96 * GIB,
        peak_flops=2307e12 / 2,
        hbm_bandwidth=7380e9 / 2,
        link_bandwidth=100e9 / 2,
        links=6,
        dcn_bandwidth=100e9 / 8 / 2,
        wraps=4,
        vmem_bytes=64 * MIB,
        delay_slots=6,
        **_256_WIDE,
    ),
}
# Devices of which nothing else is needed, by the start of JAX's name.
_OTHER_PEAKS = {
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
H200_MULTIPROCESSORS = 132
# What XLA needs to know of an H200 to compile for one that is not here.
H200_TARGET = f"""
gpu_device_info {{
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 fpus_per_core: 128
  core_count: {H200_MULTIPROCESSORS}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150754820096 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA H200"
"""


def chip(name: str) -> Chip:
    """The chip of this name.

    Raises:
      ValueError: there is no such chip.
    """
    if name not in CHIPS:
        raise ValueError(f"chip is {name!r}; it must be one of {', '.join(map(repr, CHIPS))}")
    return CHIPS[name]


def chip_name(device_kind: str) -> str | None:
    """The key of `CHIPS` for JAX's name of a device; None if it is none of them."""
    return next((name for name, each in CHIPS.items() if device_kind in each.device_kinds), None)


def peak_flops(device: jax.Device) -> float | None:
    """Peak bfloat16 FLOP/s of a device; None where it is not known."""
    if (name := chip_name(device.device_kind)) is not None:
        return CHIPS[name].peak_flops
    peaks = (peak for kind, peak in _OTHER_PEAKS.items() if device.device_kind.startswith(kind))
    return next(peaks, None)
