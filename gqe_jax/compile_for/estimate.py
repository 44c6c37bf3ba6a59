"""A step's time from its compiled costs and the chip's published peaks: an estimate, not a measure.

Assumed: matrix units, HBM and links each run at their peak, and all at once, so that the slowest of
them alone sets the pace; ring collectives, over the links that `Topology.links` counts. No chip
reaches that. If nothing ran at once, the times would add up: `in_turn`.
"""

import dataclasses
import math
from collections.abc import Sequence

from jax.sharding import Mesh

from gqe_jax.compile_for.collectives import Collective
from gqe_jax.compile_for.costs import Costs
from gqe_jax.compile_for.topology import Topology
from gqe_kernels.chips import Chip


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step by what they are spent on, and what follows from the longest.

    Attributes:
      model_flop_utilisation: of the peak, what the model needs, causal attention halved and nothing
        computed twice.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float
    tokens_per_second: float
    model_flop_utilisation: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.hbm, self.ici, self.dcn)

    @property
    def in_turn(self) -> float:
        return self.compute + self.hbm + self.ici + self.dcn

    @property
    def bound_by(self) -> str:
        times = {"compute": self.compute, "HBM": self.hbm, "ICI": self.ici, "DCN": self.dcn}
        return max(times, key=times.get)


def estimate(
    costs: Costs,
    crossings: Sequence[tuple[Collective, int]],
    chip: Chip,
    *,
    devices: int,
    tokens: int,
    model_flops: float,
) -> Estimate:
    """The estimate of one step.

    Args:
      costs: of one device.
      crossings: the collectives, each with the links over which a device sends.
      tokens, model_flops: of the whole step, over all devices.
    """
    ici = dcn = 0.0
    for collective, links in crossings:
        sent = collective.bytes * collective.times
        if collective.between_slices:
            dcn += sent / chip.dcn_bandwidth
        else:
            ici += sent / (links * chip.link_bandwidth)
    times = {
        "compute": costs.flops / chip.peak_flops,
        "hbm": costs.hbm_bytes / chip.hbm_bandwidth,
        "ici": ici,
        "dcn": dcn,
    }
    seconds = max(times.values())
    if not seconds:
        return Estimate(**times, tokens_per_second=math.inf, model_flop_utilisation=0.0)
    utilisation = model_flops / (devices * chip.peak_flops * seconds)
    return Estimate(**times, tokens_per_second=tokens / seconds, model_flop_utilisation=utilisation)


def with_links(
    collectives: Sequence[Collective], topology: Topology, mesh: Mesh
) -> list[tuple[Collective, int]]:
    """Each collective with the links that its group's ring has."""
    flat = mesh.devices.flat
    return [(c, topology.links([flat[i] for i in c.group]) if c.group else 0) for c in collectives]
