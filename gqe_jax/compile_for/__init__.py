"""Proof before the bill: a run's step compiled for a TPU slice that is not here, and its costs."""

import dataclasses
import json
import pathlib
from typing import Annotated

import tyro

from gqe_jax.compile_for import meshes
from gqe_jax.compile_for.program import Compiled, DoesNotFitError, Step, compile_step
from gqe_jax.compile_for.report import as_json, as_text
from gqe_jax.compile_for.topology import get_topology
from gqe_jax.config import ConfigError, RunConfig

__all__ = [
    "CompileCommand",
    "CompileOptions",
    "Compiled",
    "DoesNotFitError",
    "compile_for",
    "compile_step",
]


@dataclasses.dataclass(frozen=True)
class CompileOptions:
    """Compile a step for a TPU slice on this machine, instead of running it."""

    compile_for: str | None = None
    """A TPU slice, such as v5p:4x4x8: compile the step for it, say whether it fits and what it
    costs, and run nothing."""
    compile_step: Step = "train"
    """Which step: that of training, or that which scores held-out text."""
    num_slices: int = 1
    """Slices of that kind, joined by the data-center network; the data axis spans them."""
    sweep_meshes: int = 0
    """Compile for up to so many shapes of the mesh, and rank them; a compile takes minutes."""
    json: pathlib.Path | None = None
    """A file for the figures."""

    def __post_init__(self) -> None:
        for field, least in (("num_slices", 1), ("sweep_meshes", 0)):
            value = getattr(self, field)
            if value < least:
                raise ConfigError(f"{field} is {value}; it must be at least {least}")
            if value > least and self.compile_for is None:
                raise ConfigError(f"{field} is {value}; it needs compile_for, a TPU slice")
        if self.json is not None:
            if self.compile_for is None:
                raise ConfigError(f"json is {str(self.json)!r}; it needs compile_for, a TPU slice")
            if self.json.is_dir() or not self.json.parent.is_dir():
                raise ConfigError(
                    f"json is {str(self.json)!r}; it must be a file in a directory that exists"
                )


@dataclasses.dataclass(frozen=True)
class CompileCommand:
    """A command line of a run's fields and of how to compile it."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    proof: Annotated[CompileOptions, tyro.conf.arg(name="")]


def compile_for(config: RunConfig, options: CompileOptions) -> str:
    """Compiles `config` as the options say.

    Returns:
      What to print.

    Raises:
      ConfigError: the topology is unknown, or the configuration does not divide over it.
      DoesNotFitError: the step takes more memory than the chip has.
    """
    topology = get_topology(options.compile_for, options.num_slices)
    if options.sweep_meshes:
        tried = meshes.sweep(config, topology, options.compile_step, options.sweep_meshes)
        if not any(compiled for _, compiled in tried):
            raise DoesNotFitError(f"no mesh fits {topology.name}; tried:\n{meshes.table(tried)}")
        values, text = [as_json(one) for _, one in tried if one], meshes.table(tried)
    else:
        compiled = compile_step(config, topology, options.compile_step)
        values, text = as_json(compiled), as_text(compiled)
    if options.json is not None:
        options.json.write_text(json.dumps(values, indent=1) + "\n")
    return text
