"""Compiles a run's step for a TPU slice that need not be attached: its memory and its costs."""

import dataclasses
import json
import pathlib

from gqe_jax.compile_for import meshes
from gqe_jax.compile_for.program import Compiled, DoesNotFitError, Step, compile_step
from gqe_jax.compile_for.report import as_json, as_text
from gqe_jax.compile_for.topology import get_topology
from gqe_jax.config import ConfigError, RunConfig

__all__ = ["CompileOptions", "Compiled", "DoesNotFitError", "compile_for", "compile_step"]


@dataclasses.dataclass(frozen=True)
class CompileOptions:
    """Which step is compiled, for how many slices and meshes."""

    compile_step: Step = "train"
    """The step that trains, or the step that scores held-out text."""
    num_slices: int = 1
    """Number of slices, joined by the data-center network; the data axis spans them."""
    sweep_meshes: int = 0
    """Compile for up to this many mesh shapes and rank them; each takes minutes."""
    json: pathlib.Path | None = None
    """A file to write the figures to."""

    save: pathlib.Path | None = None
    """A file for the compiled train step, which `train.py --compiled FILE` runs on that slice."""

    def __post_init__(self) -> None:
        for field, least in (("num_slices", 1), ("sweep_meshes", 0)):
            if (value := getattr(self, field)) < least:
                raise ConfigError(f"{field} is {value}; it must be at least {least}")
        for field in ("json", "save"):
            path = getattr(self, field)
            if path is not None and (path.is_dir() or not path.parent.is_dir()):
                raise ConfigError(
                    f"{field} is {str(path)!r}; it must be a file in a directory that exists"
                )
        if self.save is not None and (self.sweep_meshes or self.compile_step != "train"):
            raise ConfigError(
                f"save is {str(self.save)!r}; it needs one mesh and the train step: leave out "
                "sweep_meshes and compile_step"
            )


def compile_for(config: RunConfig, slice_name: str, options: CompileOptions) -> str:
    """Compiles a run's step for a TPU slice.

    Args:
      config: the run.
      slice_name: the slice, such as `v5p:4x4x8`.
      options: which step, and for how many slices and meshes.

    Returns:
      The text to print.

    Raises:
      ConfigError: the slice is unknown, or the configuration does not divide over it.
      DoesNotFitError: the step takes more memory than the chip has.
    """
    topology = get_topology(slice_name, options.num_slices)
    if options.sweep_meshes:
        tried = meshes.sweep(config, topology, options.compile_step, options.sweep_meshes)
        if not any(compiled for _, compiled in tried):
            raise DoesNotFitError(f"no mesh fits {topology.name}; tried:\n{meshes.table(tried)}")
        values, text = [as_json(one) for _, one in tried if one], meshes.table(tried)
    else:
        compiled = compile_step(config, topology, options.compile_step, save=options.save)
        values, text = as_json(compiled), as_text(compiled)
    if options.json is not None:
        options.json.write_text(json.dumps(values, indent=1) + "\n")
    return text
