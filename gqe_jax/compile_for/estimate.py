"""Estimates a step's time, from published peaks and from what the compilers scheduled.

`Estimate` is a lower bound, not a measurement: matrix units, HBM and links all run at their peak
and overlap fully, so that the slowest of them sets the time. `serial` is the sum of the times,
without any overlap. `Scheduled` sums the cycles that the compilers expect of the instructions that
they made, which is no measurement either: waits for HBM within kernels are not in it.

Collectives use rings over the links that `Topology.links` returns.
"""

import dataclasses
import math
from collections.abc import Sequence

from jax.sharding import Mesh

from gqe_jax.compile_for.collectives import Collective
from gqe_jax.compile_for.costs import Costs
from gqe_jax.compile_for.cycles import Cycles
from gqe_jax.compile_for.kernel_cycles import KernelCycles
from gqe_jax.compile_for.topology import Topology
from gqe_kernels.chips import Chip


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step per resource, and the throughput at full overlap.

    Attributes:
      model_flop_utilisation: model FLOPs over peak FLOPs; causal attention counts half, recomputed
        activations do not count.
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
    def serial(self) -> float:
        return self.compute + self.hbm + self.ici + self.dcn

    @property
    def bound_by(self) -> str:
        times = {"compute": self.compute, "HBM": self.hbm, "ICI": self.ici, "DCN": self.dcn}
        return max(times, key=times.__getitem__)


def estimate(
    costs: Costs,
    crossings: Sequence[tuple[Collective, int]],
    chip: Chip,
    *,
    devices: int,
    tokens: int,
    model_flops: float,
) -> Estimate:
    """Estimates one step.

    Args:
      costs: the costs on one device.
      crossings: the collectives, each with the number of links over which a device sends.
      chip: the chip.
      devices: number of devices.
      tokens, model_flops: totals of the step over all devices.
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


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """Seconds of one step by the compilers' own static cycles.

    Attributes:
      xla: XLA's instructions.
      kernels: Pallas kernels that can be counted.
      exposed: collectives, without what is scheduled while they are under way.
      overlapped: what is scheduled meanwhile.
      not_counted: names of the kernels that cannot be counted, and that are not in any sum.
    """

    xla: float
    kernels: float
    exposed: float
    overlapped: float
    not_counted: tuple[str, ...]
    tokens_per_second: float
    model_flop_utilisation: float

    @property
    def seconds(self) -> float:
        return self.xla + self.kernels + self.exposed


def as_scheduled(
    cycles: Cycles,
    kernels: Sequence[KernelCycles],
    crossings: Sequence[tuple[Collective, int]],
    chip: Chip,
    *,
    devices: int,
    tokens: int,
    model_flops: float,
) -> Scheduled:
    """Sums up one step; arguments as in `estimate`, and the static cycles on one device."""
    exposed = overlapped = 0.0
    for collective, links in crossings:
        rate = chip.dcn_bandwidth if collective.between_slices else links * chip.link_bandwidth
        seconds = collective.bytes / rate
        hidden = min(seconds, collective.hidden_cycles / chip.clock)
        exposed += (seconds - hidden) * collective.times
        overlapped += hidden * collective.times
    found = Scheduled(
        xla=cycles.total.cycles / chip.clock,
        kernels=sum(each.total for each in kernels) / chip.clock,
        exposed=exposed,
        overlapped=overlapped,
        not_counted=tuple(dict.fromkeys(each.name for each in kernels if each.cycles is None)),
        tokens_per_second=math.inf,
        model_flop_utilisation=0.0,
    )
    if not found.seconds:
        return found
    utilisation = model_flops / (devices * chip.peak_flops * found.seconds)
    return dataclasses.replace(
        found, tokens_per_second=tokens / found.seconds, model_flop_utilisation=utilisation
    )


def with_links(
    collectives: Sequence[Collective], topology: Topology, mesh: Mesh
) -> list[tuple[Collective, int]]:
    """Pairs each collective with the number of links in its group's ring."""
    flat = mesh.devices.flat
    return [(c, topology.links([flat[i] for i in c.group]) if c.group else 0) for c in collectives]
