"""What a TPU chip can do, by what JAX calls one device, and the slices that are compiled for.

Source: Google Cloud's pages on v5e, v5p, v6e and TPU7x (docs.cloud.google.com/tpu/docs/v5p and so
on), read in 2026: HBM in GiB, bfloat16 peaks, and the ICI and DCN bandwidth of a chip. A link's
bandwidth is the chip's bidirectional ICI bandwidth over twice its number of links. The chip's own
figures are halved for TPU7x, of which JAX sees each chip as two devices.
"""

import dataclasses
import os

import jax
import numpy as np

from gqe_jax.config import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device; a second is the unit of all rates.

    Attributes:
      peak_flops: bfloat16 multiply-adds, 2 each.
      link_bandwidth: bytes in one direction over one of the `links` to neighbours.
      dcn_bandwidth: bytes in one direction over the data-center network, the host's shared out.
      wraps: along a dimension of this many chips or a multiple, the last is linked to the first.
    """

    hbm_bytes: int
    peak_flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    links: int
    dcn_bandwidth: float
    wraps: int


CHIPS = {
    "v5e": Chip(16 * GIB, 197e12, 819e9, 50e9, 4, 25e9 / 8, wraps=16),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 100e9, 6, 50e9 / 8, wraps=4),
    "v6e": Chip(32 * GIB, 918e12, 1638e9, 100e9, 4, 100e9 / 8, wraps=16),
    "tpu7x": Chip(96 * GIB, 2307e12 / 2, 7380e9 / 2, 100e9 / 2, 6, 100e9 / 8 / 2, wraps=4),
}
EXAMPLES = ("v5e:16x16", "v5p:4x4x8", "v6e:16x16", "tpu7x:4x4x4")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of chips that need not be there."""

    name: str
    num_slices: int
    chip: Chip
    devices: tuple[jax.Device, ...]

    def links(self, group: list[jax.Device]) -> int:
        """Links over which a chip of a ring over `group` receives, 0 across slices.

        A dimension that the group fills, and that closes, gives two; one that it fills in part, or
        that does not close, gives one.
        """
        if len({_slice(device) for device in group}) > 1:
            return 0
        total = 0
        for whole, part in zip(_extents(self.devices), _extents(group), strict=True):
            if part > 1:
                closes = part == whole and whole % self.chip.wraps == 0
                total += 2 if closes else 1
        return max(1, total)


def _slice(device: jax.Device) -> int:
    return getattr(device, "slice_index", None) or 0


def _extents(devices) -> list[int]:
    coordinates = np.array([device.coords for device in devices])
    return [len(set(column)) for column in coordinates.T]


def get_topology(name: str, num_slices: int = 1) -> Topology:
    """The slices of this name, by libtpu, on a machine that has none of them.

    Args:
      name: a chip and the shape of a slice, such as "v5p:4x4x8".
      num_slices: equal slices, joined by the data-center network.

    Raises:
      ConfigError: there is no such chip or shape, or libtpu is not installed.
    """
    kind = name.partition(":")[0]
    remedy = f"it must be a chip ({', '.join(CHIPS)}) and a shape, such as {', '.join(EXAMPLES)}"
    if kind not in CHIPS or ":" not in name:
        raise ConfigError(f"compile_for is {name!r}; {remedy}")
    if num_slices < 1:
        raise ConfigError(f"num_slices is {num_slices}; it must be positive")
    _load_libtpu_without_a_tpu(kind)
    from jax.experimental import topologies

    slices = {"num_slices": num_slices} if num_slices > 1 else {}
    try:
        found = topologies.get_topology_desc(topology_name=name, platform="tpu", **slices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if "libtpu" in str(error) or "plugin" in str(error).lower():
            raise ConfigError(
                f"compile_for is {name!r}, which needs libtpu: pip install -e '.[tpu]' ({error})"
            ) from error
        raise ConfigError(f"compile_for is {name!r}; {remedy}. libtpu says: {error}") from error
    return Topology(name, num_slices, CHIPS[kind], tuple(found.devices))


def _load_libtpu_without_a_tpu(kind: str) -> None:
    """libtpu looks for the machine that it is on; told that it is one, it says nothing."""
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": f"{kind}-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    for variable, value in settings.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
