"""Compiles a kernel for a chip in a process of its own, and reads the schedule that libtpu dumps.

libtpu takes its dump flags from the environment when it is loaded, once, so every compile needs a
fresh process.
"""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from gqe_kernels.chips import chip
from gqe_kernels.cycles.bundles import Program, Region, read_dump, regions

# What a kernel that sets no limit itself may take of the VMEM: libtpu's default keeps splash
# attention from its best block sizes.
VMEM_KIB = 100 * 1024

_ROOT = Path(__file__).resolve().parents[3]


class CompileError(RuntimeError):
    """The TPU compiler refused the kernel."""


class OutOfVmemError(CompileError):
    """The kernel's blocks do not fit in the core's vector memory."""


def schedule(
    case: str,
    chip_name: str,
    options: dict,
    *,
    like: Sequence[tuple[Program, Region]] | None = None,
    timeout: float = 1800,
) -> list[tuple[Program, Region]]:
    """The scheduled instructions of a case, each with its tree of regions.

    The case is compiled a second time with traces, from which the regions take the names of the
    `jax.named_scope`s inside the kernel and of the functions under `pl.when`. The figures are those
    of the compile without traces.

    Args:
      case: "module:function"; the function takes `options` and returns an object with `function`
        and `arguments` (`jax.ShapeDtypeStruct`s).
      like: the case with other options, to take the labels from instead: for a sweep of block
        sizes, which leave libtpu's numbers of the regions alone.
      timeout: seconds for a compile.

    Raises:
      CompileError: the compiler refused the kernel.
      ScheduleError: the dump cannot be read.
    """
    slots = chip(chip_name).delay_slots
    found = [(p, regions(p, slots)) for p in _compile(case, chip_name, options, False, timeout)]
    if like is None:
        like = [(p, regions(p, slots)) for p in _compile(case, chip_name, options, True, timeout)]
    labelled = {program.name: tree for program, tree in like}
    for program, tree in found:
        if program.name in labelled:
            _take_labels(tree, labelled[program.name])
    return found


def _take_labels(tree: Region, traced: Region) -> None:
    # A trace is a barrier to the scheduler, so the bundles differ; libtpu's region numbers do not.
    names = {(r.kind, r.number): r.label for r in traced.walk() if r.label is not None}
    for region in tree.walk():
        region.label = names.get((region.kind, region.number))


def _compile(case, chip_name, options, traces, timeout) -> list[Program]:
    with tempfile.TemporaryDirectory(prefix="tpu_schedule_") as directory:
        flags = [
            f"--xla_jf_dump_to={directory}",
            "--xla_jf_dump_llo_text=true",
            "--xla_jf_emit_annotations=true",
            "--xla_jf_dump_llo_pass_label_regex=packed-bundles-post-ra|pre-delay|final",
            f"--xla_tpu_scoped_vmem_limit_kib={VMEM_KIB}",
        ]
        if traces:
            flags += ["--xla_enable_custom_call_region_trace=true"]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            # The lock guards a chip; a compile ahead of time opens none, so many may run at once.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": " ".join(flags),
            "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        request = json.dumps({"case": case, "chip": chip_name, "options": options})
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, request],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode:
            vmem = re.search(r"memory space vmem|exceeded scoped vmem", done.stderr)
            error = OutOfVmemError if vmem else CompileError
            lines = done.stderr.strip().splitlines()[-12:]
            raise error(f"{case} for {chip_name} with {options}:\n" + "\n".join(lines))
        return read_dump(Path(directory))


def versions() -> dict[str, str]:
    """What a schedule depends on beside the kernel."""
    return {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}


def load(case: str):
    """The function that "module:function" names.

    Raises:
      ValueError: there is no such function.
    """
    module, _, name = case.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"case is {case!r}; it must be 'module:function' ({error})") from error


def build(case: str, chip_name: str, options: dict):
    """What the case's function makes of the options; it is given `chip` if it takes that."""
    function = load(case)
    if "chip" in inspect.signature(function).parameters:
        options = {"chip": chip_name, **options}
    return function(**options)


def _worker(request: str) -> None:
    import jax
    from jax.experimental import pallas as pl
    from jax.experimental import topologies

    when = pl.when

    def labelled_when(condition):
        def decorate(body):
            def scoped():
                with jax.named_scope(body.__name__):
                    return body()

            named = body.__name__ != "_" and not body.__name__.startswith("<")
            return when(condition)(scoped if named else body)

        return decorate

    pl.when = labelled_when
    spec = json.loads(request)
    case = build(spec["case"], spec["chip"], spec["options"])
    topology = topologies.get_topology_desc(
        topology_name=chip(spec["chip"]).topology, platform="tpu"
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), case.arguments
    )
    jax.jit(case.function).lower(*arguments).compile()


if __name__ == "__main__":
    _worker(sys.argv[1])
