"""Slices of TPU chips that need not be there, and the links between their chips."""

import dataclasses
import os

import jax
import numpy as np

from gqe_jax.compile_for.kernel_cycles import dumping
from gqe_jax.config import ConfigError
from gqe_kernels.chips import CHIPS, Chip

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
        with dumping():
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
