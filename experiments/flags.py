"""Compiles a step for a TPU slice with sets of libtpu's options, and tabulates its collectives.

    python -m experiments.flags gqe_1b v5p:4x4x4
    python -m experiments.flags gqe_1b v5p:4x4x4 --num-slices 2

A row takes minutes. Kernels are left out, for the options do not change them.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated
from unittest import mock

import jax
import tyro

from configs import CONFIGS
from gqe_jax.commands import parse, run_command
from gqe_jax.compile_for import compile_step
from gqe_jax.compile_for.topology import get_topology
from gqe_jax.config import ConfigError
from gqe_jax.training import steps
from gqe_jax.training.compiler_options import OVERLAP
from gqe_kernels.chips import GIB

SPARSE_CORE = OVERLAP["v5p"]
FUSED = (
    *("enable_async_collective_fusion", "enable_async_collective_fusion_fuse_all_gather"),
    *("enable_async_collective_fusion_fuse_all_reduce", "overlap_compute_collective_tc"),
    "enable_async_collective_fusion_multiple_steps",
)
SETS: Mapping[str, Mapping[str, str]] = {
    "none": {},
    "fused asynchronous gathers and sums": {f"xla_tpu_{name}": "true" for name in FUSED}
    | {f"xla_enable_async_{kind}": "true" for kind in ("all_gather", "all_reduce")},
    "a scheduler with more features, run again": {
        "xla_tpu_enable_all_experimental_scheduler_features": "true",
        "xla_latency_hiding_scheduler_rerun": "2",
    },
    "all collectives on the SparseCore": SPARSE_CORE,
    "gathers on the SparseCore": {
        name: value
        for name, value in SPARSE_CORE.items()
        if "offload_all_reduce" not in name and "offload_reduce_scatter" not in name
    },
    "pipelined sums between slices": {
        "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
        "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    },
}
"""Options by the name of their set: those that are published for other trainers."""


@dataclasses.dataclass(frozen=True)
class FlagsConfig:
    """Compile a step with each set."""

    config: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CONFIG")]]
    """The configuration."""
    slice: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SLICE")]]
    """A TPU slice, such as v5p:4x4x4."""
    num_slices: int = 1
    """Number of slices."""
    sets: tuple[str, ...] = tuple(SETS)
    """The sets, by name."""

    def __post_init__(self) -> None:
        for field, names in (("config", (self.config,)), ("sets", self.sets)):
            known = CONFIGS if field == "config" else SETS
            for name in names:
                if name is not tyro.MISSING and name not in known:
                    names = ", ".join(map(repr, known))
                    raise ConfigError(f"{field} has {name!r}; it must be among {names}")


def rows(config: FlagsConfig) -> Iterator[str]:
    """The table's lines as Markdown; a set that the compiler refuses has its message.

    Raises:
      ConfigError: the slice is unknown, or the configuration does not divide over it.
    """
    topology = get_topology(config.slice, config.num_slices)
    yield "| options | XLA, ms | exposed, ms | hidden, ms | temporaries |"
    yield "|---|---|---|---|---|"
    for name in config.sets:
        with mock.patch.object(steps, "compiler_options", return_value=dict(SETS[name])):
            try:
                compiled = compile_step(CONFIGS[config.config], topology)
            except jax.errors.JaxRuntimeError as error:
                yield f"| {name} | refused: {str(error).splitlines()[0][:120]} | | | |"
                continue
        found = compiled.scheduled
        times = (found.xla, found.exposed, found.overlapped)
        yield (
            f"| {name} | {' | '.join(f'{1e3 * seconds:,.1f}' for seconds in times)} "
            f"| {compiled.memory.temporaries / GIB:.1f} GiB |"
        )


def main() -> None:
    """The command line."""
    config = parse(
        FlagsConfig(tyro.MISSING, tyro.MISSING),
        sys.argv[1:],
        prog="python -m experiments.flags",
        description=__doc__,
    )
    run_command(lambda: [print(row, flush=True) for row in rows(config)])


if __name__ == "__main__":
    main()
