"""A compiled train step in a file: written by `--compile-for SLICE --save`, run by `--compiled`.

The file has a line that names it, a line of JSON that says what it fits, and the executable as the
compiler's own library serialises it. Nothing in it is unpickled: what the step takes and returns
follows from the configuration. The executable is code, and runs.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.config_json import parse_json, to_dict
from gqe_jax.storage import Location, location, write_whole
from gqe_jax.training.steps import Steps, abstract_batch

_MAGIC = b"gqe-jax executable 1\n"
# Fields on which the train step does not depend.
_OTHER = ("run_dir", "resume_step", "seed", "log_every", "eval_every", "eval_batches", "profile")
_OTHER += ("checkpoint_every", "keep_checkpoints", "watchdog_seconds", "watchdog_exit", "wandb")
_OTHER += ("checkpoint_minutes", "compilation_cache", "compiled", "held_out")
_OTHER += ("data.corpus", "data.read_threads", "data.prefetch", "data.verify_checksums")
_OTHER += ("data.mixture", "data.decay_mixture")


def save(path: Location, compiled: jax.stages.Compiled, config: RunConfig, mesh: Mesh) -> None:
    """Writes the train step of `config`, compiled for `mesh`, whose devices need not be there."""
    executable: Any = compiled.runtime_executable()
    program: Any = compiled  # jax has no public name for the arguments that a program keeps
    header = {"kept": sorted(program._executable._kept_var_idx), **_fits(config, mesh)}
    write_whole(path, _MAGIC + json.dumps(header).encode() + b"\n" + executable.serialize())


def load(config: RunConfig, steps: Steps) -> Callable[..., Any]:
    """The train step of the file `config.compiled`, which takes and returns what `steps` has.

    Args:
      config: the run.
      steps: of the run.

    Raises:
      ConfigError: the file cannot be read, or does not fit; says why.
    """
    path, begins = location(config.compiled or ""), f"compiled is {config.compiled!r}"
    again = "compile it again, with --compile-for SLICE --save"
    if config.teacher is not None:
        raise ConfigError(f"{begins}; a run with a teacher has no compiled step: leave it out")
    try:
        content = path.read_bytes()
        magic, line, executable = content.split(b"\n", 2)
        header = parse_json(line)
        if magic + b"\n" != _MAGIC or not isinstance(header, dict):
            raise ValueError("it does not begin like one")
        kept = [int(index) for index in header["kept"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{begins}, which is no compiled step ({error}); {again}") from None
    differ = list(_differences(header, _fits(config, steps.mesh)))
    if differ:
        raise ConfigError(f"{begins}, which does not fit: {'; '.join(differ)}; {again}")
    try:
        return _Loaded(executable, kept, config, steps)
    except (jax.errors.JaxRuntimeError, ValueError, TypeError) as error:
        raise ConfigError(f"{begins}, which cannot be loaded ({error}); {again}") from None


class _Loaded:
    """A train step that is not compiled here."""

    def __init__(self, executable: bytes, kept: list[int], config: RunConfig, steps: Steps):
        arguments = steps.layout.abstract, abstract_batch(config, steps.mesh)
        devices = steps.mesh.devices.flat
        sharding: Any = jax.tree.leaves(steps.layout.sharding)[0]
        client: Any = devices[0].client
        self._executable = client.deserialize_executable(
            executable, executable_devices=sharding._internal_device_list
        )
        self._kept, self._in = kept, jax.tree.structure(arguments)
        shapes, self._out = jax.tree.flatten(steps.train_step.trace(*arguments).out_info)
        state = jax.tree.leaves(steps.layout.abstract)
        replicated = jax.sharding.NamedSharding(steps.mesh, jax.sharding.PartitionSpec())
        # As of `make_steps`: the next state lies as the state does, the metrics on every device.
        layout = [x.sharding for x in state] + [replicated] * (len(shapes) - len(state))
        self._results = list(zip([x.shape for x in shapes], layout, strict=True))

    def __call__(self, *arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        if structure != self._in:
            raise ValueError(f"the compiled step takes {self._in}, not {structure}")
        results = self._executable.execute_sharded([leaves[index] for index in self._kept])
        shards = results.disassemble_into_single_device_arrays()
        arrays = [
            jax.make_array_from_single_device_arrays(shape, sharding, pieces)
            for (shape, sharding), pieces in zip(self._results, shards, strict=True)
        ]
        return jax.tree.unflatten(self._out, arrays)


def _fits(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """What a compiled step and those who load it have in common, as JSON has it."""
    devices = list(mesh.devices.flat)
    places = [[d.id, *getattr(d, "coords", ()), getattr(d, "slice_index", 0)] for d in devices]
    found = {
        "versions": {name: _version(name) for name in ("gqe-jax", "jax", "jaxlib", "libtpu")},
        "sources": _sources(),
        "chip": devices[0].device_kind,
        "devices": len(devices),
        "places": places,
        "mesh": dict(mesh.shape),
        "config": dict(_flat(to_dict(dataclasses.replace(config, mesh=type(config.mesh)())))),
    }
    return json.loads(json.dumps(found))


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> Iterator[str]:
    """Yields what differs, in words."""
    for group in ("versions", "config"):
        saved = theirs.get(group)
        saved = saved if isinstance(saved, dict) else {}
        for name, value in ours[group].items():
            if saved.get(name) != value:
                yield f"{name} is {value}, and was {saved.get(name)}"
    for name in ("chip", "devices", "mesh"):
        if theirs.get(name) != ours[name]:
            yield f"{name} is {ours[name]}, and was {theirs.get(name)}"
    if theirs.get("devices") == ours["devices"] and theirs.get("places") != ours["places"]:
        yield "the chips of the slice are in another order"
    if theirs.get("sources") != ours["sources"]:
        yield "the source of gqe_jax or gqe_kernels has changed"


def _flat(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if f"{path}{name}" in _OTHER:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sources() -> str:
    """A digest of the code from which the step is traced."""
    digest = hashlib.sha256()
    for package in ("gqe_jax", "gqe_kernels"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        folder = pathlib.Path(spec.origin).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
