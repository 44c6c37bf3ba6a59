"""Formats a compiled step as text and as JSON-serialisable values."""

import collections
import dataclasses
import math
from typing import Any

from gqe_jax.compile_for import cycle_table
from gqe_jax.compile_for.collectives import Collective
from gqe_jax.compile_for.program import Compiled
from gqe_kernels.chips import GIB


def traffic(crossing: tuple[Collective, ...]) -> dict[tuple[str, str], float]:
    """Bytes that a device sends, by collective kind and mesh axes, the largest first."""
    sums = collections.defaultdict(float)
    for each in crossing:
        axes = " × ".join(each.axes) + (" between slices" if each.between_slices else "")
        sums[each.kind, axes] += each.bytes * each.times
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def as_text(compiled: Compiled) -> str:
    """The report that `--compile-for` prints."""
    topology, memory, costs, guess = (
        compiled.topology,
        compiled.memory,
        compiled.costs,
        compiled.estimate,
    )
    chip, scheduled = topology.chip, compiled.scheduled
    slices = f"{topology.num_slices} × " if topology.num_slices > 1 else ""
    axes = ", ".join(f"{axis} {size}" for axis, size in compiled.mesh.items())
    config = compiled.config
    lines = [
        f"{compiled.step} step for {slices}{topology.name}, {len(topology.devices)} devices "
        f"({axes}), compiled in {compiled.compile_seconds:.0f} s",
        f"{compiled.num_parameters:,} parameters; {config.batch_size} sequences of "
        f"{config.sequence_length} per step, in {config.accumulation_steps} microbatches; "
        f"remat {config.model.remat}",
        "On each device:",
        f"  {'parameters':<20} {_bytes(memory.parameters)}",
        f"  {'optimizer':<20} {_bytes(memory.optimizer)}",
        f"  {'temporaries':<20} {_bytes(memory.temporaries)}  (activations, gradients, gathered "
        "weights)",
        f"  {'peak HBM':<20} {_bytes(memory.peak)}  of {chip.hbm_bytes / GIB:.0f} GiB "
        f"({memory.peak / chip.hbm_bytes:.1%})",
        f"  {'matrix products':<20} {_scaled(costs.product_flops)}FLOP",
    ]
    for name, flops in costs.kernel_flops.items():
        lines.append(f"  {name:<20} {_scaled(flops)}FLOP")
    lines.append(f"  {'HBM traffic':<20} {_scaled(costs.hbm_bytes)}B")
    for (kind, names), sent in traffic(compiled.collectives).items():
        lines.append(f"  {kind:<20} {_scaled(sent)}B sent over {names}")
    lines += [
        "Estimate (compiled costs at published peaks, fully overlapped; not a measurement):",
        f"  compute {_time(guess.compute)}, HBM {_time(guess.hbm)}, ICI {_time(guess.ici)}, "
        f"DCN {_time(guess.dcn)}; without overlap {_time(guess.serial)}",
        f"  at best {_time(guess.seconds)} per step, bound by {guess.bound_by}: "
        f"{guess.tokens_per_second:,.0f} tokens/s, model FLOP utilisation "
        f"{guess.model_flop_utilisation:.1%}",
        f"As scheduled (static cycles of XLA and libtpu at {chip.clock / 1e9:.2f} GHz; not a "
        "measurement):",
        f"  XLA {_time(scheduled.xla)}, kernels {_time(scheduled.kernels)}, exposed collectives "
        f"{_time(scheduled.exposed)} ({_time(scheduled.overlapped)} overlapped)",
        f"  {_time(scheduled.seconds)} per step: {scheduled.tokens_per_second:,.0f} tokens/s, "
        f"model FLOP utilisation {scheduled.model_flop_utilisation:.1%}",
    ]
    reasons = dict.fromkeys(each.reason for each in compiled.kernels if each.reason)
    lines += [f"  not counted: {reason}" for reason in reasons]
    return "\n".join(lines)


def _bytes(size: int) -> str:
    unit, name = (GIB, "GiB") if size >= GIB / 10 else (2**20, "MiB")
    return f"{size / unit:8.2f} {name}"


def _scaled(value: float) -> str:
    power = min(4, max(0, int(math.log10(max(value, 1)) // 3)))
    return f"{value / 1000**power:8.2f} {' kMGT'[power].strip()}"


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"


def as_json(compiled: Compiled) -> dict[str, Any]:
    """The content of `--json`, in bytes, FLOPs and seconds."""
    guess = compiled.estimate
    return {
        "topology": compiled.topology.name,
        "num_slices": compiled.topology.num_slices,
        "devices": len(compiled.topology.devices),
        "mesh": compiled.mesh,
        "step": compiled.step,
        "parameters": compiled.num_parameters,
        "config": dataclasses.asdict(compiled.config),
        "hbm_bytes_of_chip": compiled.topology.chip.hbm_bytes,
        "memory": {
            **dataclasses.asdict(compiled.memory),
            "largest": [{"array": name, "bytes": n} for name, n in compiled.memory.largest],
        },
        "flops": compiled.costs.flops,
        "product_flops": compiled.costs.product_flops,
        "kernel_flops": dict(compiled.costs.kernel_flops),
        "hbm_traffic_bytes": compiled.costs.hbm_bytes,
        "collectives": [
            {"kind": kind, "axes": axes, "bytes": sent}
            for (kind, axes), sent in traffic(compiled.collectives).items()
        ],
        "estimate": {
            **dataclasses.asdict(guess),
            "seconds": guess.seconds,
            "in_turn": guess.serial,
            "bound_by": guess.bound_by,
        },
        "scheduled": {
            **dataclasses.asdict(compiled.scheduled),
            "seconds": compiled.scheduled.seconds,
        },
        "cycles": cycle_table.as_json(compiled.cycles, compiled.kernels, compiled.topology.chip),
        "compile_seconds": compiled.compile_seconds,
    }
