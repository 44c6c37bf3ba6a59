"""Compiles the large configurations for slices that are not here, and draws up their tables.

    python -m experiments.compiled slices
    python -m experiments.compiled context

Each row is `python train.py NAME --compile-for SLICE ...`, minutes on two cores. What has
been compiled is kept, so that an interrupted table continues; delete the file to begin anew.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Annotated, Any, Literal

import tyro

from gqe_jax.commands import parse, run_command
from gqe_jax.config import ConfigError
from gqe_kernels.chips import GIB

Table = Literal["slices", "context"]
Figures = dict[str, Any] | str  # where the step does not fit, the first line of the message
CONFIGURATIONS = ("gqe_250m", "gqa_250m", "gqe_7b")
SLICES = ("v5e:16x16", "v5p:4x4x8")
# Slices of v5p with eight chips for each shard of the sequence, and the last with few sequences.
CONTEXT = (
    *((1, 8, "v5p:2x2x2"), (2, 8, "v5p:2x2x4"), (4, 8, "v5p:2x4x4"), (8, 8, "v5p:4x4x4")),
    *((16, 8, "v5p:4x4x8"), (64, 2, "v5p:4x4x8")),
)
# What the tables show of a step's figures, by section.
QUOTED = {
    "memory": ("parameters", "optimizer", "peak"),
    "estimate": ("seconds", "bound_by"),
    "scheduled": ("xla", "kernels", "exposed", "seconds", "tokens_per_second", "not_counted"),
}


@dataclasses.dataclass(frozen=True)
class CompiledConfig:
    """Compile the rows of a table that are missing, and print it."""

    table: Annotated[Table, tyro.conf.Positional]
    """`slices`: the configurations on slices. `context`: the long-context one as the context axis
    grows."""
    kept: pathlib.Path = pathlib.Path("docs/compiled.json")
    """What has been compiled, by command."""


def compile_by_command(*arguments: str) -> Figures:
    """The figures of `train.py *arguments` that the tables and comparisons need."""
    print(f"python train.py {' '.join(arguments)}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "figures.json"
        done = subprocess.run(
            [sys.executable, "train.py", *arguments, "--json", str(path)],
            text=True,
            capture_output=True,
            check=False,
        )
        if done.returncode == 0:
            return quoted(json.loads(path.read_text()))
    refusals = [line for line in done.stderr.splitlines() if "does not fit" in line]
    if not refusals:
        raise RuntimeError(f"train.py {' '.join(arguments)} failed:\n{done.stderr}")
    return refusals[0].removeprefix("error: ").split(" on each chip")[0]


def quoted(figures: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a step's figures; the command says the rest."""
    return {
        "mesh": {axis: size for axis, size in figures["mesh"].items() if size > 1},
        "hbm_bytes_of_chip": figures["hbm_bytes_of_chip"],
        "kernel_flops": sum(figures["kernel_flops"].values()),
        **{of: {name: figures[of][name] for name in names} for of, names in QUOTED.items()},
    }


def run_table(
    config: CompiledConfig, compile_step: Callable[..., Figures] = compile_by_command
) -> str:
    """The table as Markdown.

    Args:
      compile_step: the figures of `train.py` with these arguments, for the rows that are missing.

    Raises:
      ConfigError: rows are missing, and the others were compiled by other versions.
    """
    kept = json.loads(config.kept.read_text()) if config.kept.exists() else {"compiled": {}}

    def figures(*arguments: str) -> Figures:
        command = " ".join(arguments)
        if command not in kept["compiled"]:
            versions = {name: metadata.version(name) for name in ("jax", "libtpu")}
            if kept.setdefault("versions", versions) != versions:
                raise ConfigError(
                    f"{config.kept} lacks a row, and is of {kept['versions']}, not {versions}: "
                    "delete it to compile all rows"
                )
            kept["compiled"][command] = compile_step(*arguments)
            part = config.kept.with_suffix(".part")
            part.write_text(json.dumps(kept, indent=1) + "\n")
            part.replace(config.kept)
        return kept["compiled"][command]

    rows = {"slices": _slices, "context": _context}[config.table]
    return "\n".join(rows(figures))


def _slices(compiled: Callable[..., Figures]) -> Iterator[str]:
    yield (
        "| configuration | slice | mesh | state | peak of HBM | at best | XLA | kernels | exposed "
        "| as scheduled |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name in CONFIGURATIONS:
        for topology in SLICES:
            found = compiled(name, "--compile-for", topology)
            place = f"`{name}` | {topology}"
            if isinstance(found, str):
                yield f"| {place} | {found} |" + " |" * 7
                continue
            memory, guess, scheduled = found["memory"], found["estimate"], found["scheduled"]
            axes = (f"{axis} {size}" for axis, size in found["mesh"].items())
            state = (memory["parameters"] + memory["optimizer"]) / GIB
            kernels, total = f"{scheduled['kernels']:.3f} s", f"{scheduled['seconds']:.3f} s"
            total += f", {scheduled['tokens_per_second'] / 1e3:,.0f}k tokens/s"
            if scheduled["not_counted"]:
                kernels, total = f"not counted: {', '.join(scheduled['not_counted'])}", ""
            yield (
                f"| {place} | {', '.join(axes)} | {state:.1f} GiB "
                f"| {memory['peak'] / GIB:.1f} of {found['hbm_bytes_of_chip'] / GIB:.0f} GiB "
                f"| {guess['seconds']:.3f} s, {guess['bound_by']} | {scheduled['xla']:.3f} s "
                f"| {kernels} | {scheduled['exposed']:.3f} s | {total} |"
            )


def _context(compiled: Callable[..., Figures]) -> Iterator[str]:
    yield "| context | fsdp | slice | peak of HBM | × context | kernels |"
    yield "|---|---|---|---|---|---|"
    for context, fsdp, topology in CONTEXT:
        found = compiled(
            *("gqe_7b_128k", "--compile-for", topology, "--mesh.data", "1"),
            *("--mesh.fsdp", str(fsdp), "--mesh.context", str(context)),
            *("--batch-size", str(fsdp), "--accumulation-steps", "1"),
        )
        if isinstance(found, str):
            yield f"| {context} | {fsdp} | {topology} | {found} | | |"
            continue
        peak = found["memory"]["peak"] / GIB
        yield (
            f"| {context} | {fsdp} | {topology} | {peak:.1f} GiB | {peak * context:.0f} GiB "
            f"| {found['kernel_flops'] / 1e12:.0f} TFLOP |"
        )


def main() -> None:
    """The command line."""
    config = parse(
        CompiledConfig, sys.argv[1:], prog="python -m experiments.compiled", description=__doc__
    )
    print(run_command(lambda: run_table(config)))


if __name__ == "__main__":
    main()
