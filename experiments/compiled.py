"""Compiles the large configurations for slices that are not here, and draws up their tables.

    python -m experiments.compiled slices
    python -m experiments.compiled context
    python -m experiments.compiled attention

Each row is `python train.py NAME --compile-for SLICE ...`, a minute or two on two cores. What has
been compiled is kept, so that a table that was cut short goes on; delete the file to begin anew.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import tyro

from gqe_jax.commands import parse, run_command

Table = Literal["slices", "context", "attention"]
GIB = 2**30
CONFIGURATIONS = (
    *("gqe_250m", "gqa_250m", "gqe_1b", "gqa_1b", "gqe_7b", "gqe_7b_top2", "gqa_7b"),
    "gqe_7b_128k",
)
SLICES = (("v5e:16x16", 1), ("v6e:16x16", 1), ("v5p:4x4x8", 1), ("v5p:4x4x8", 2))
# Slices of v5p with eight chips for each shard of the sequence, and the last with few sequences.
CONTEXT = (
    *((1, 8, "v5p:2x2x2"), (2, 8, "v5p:2x2x4"), (4, 8, "v5p:2x4x4"), (8, 8, "v5p:4x4x4")),
    *((16, 8, "v5p:4x4x8"), (64, 2, "v5p:4x4x8")),
)
# Length, sequences in 4.2M tokens, shards of each.
LENGTHS = ((2048, 2048, 1), (8192, 512, 1), (32_768, 128, 4), (131_072, 32, 16))


@dataclasses.dataclass(frozen=True)
class CompiledConfig:
    """Compile the rows of a table that are missing, and print it."""

    table: Annotated[Table, tyro.conf.Positional]
    """`slices`: every configuration on every slice. `context`: the long-context configuration as
    the context axis grows. `attention`: gqe_7b beside gqa_7b as sequences grow."""
    kept: pathlib.Path = pathlib.Path("docs/compiled.json")
    """What has been compiled, by command."""


def run_table(config: CompiledConfig) -> str:
    """The table as Markdown."""
    rows = {"slices": _slices, "context": _context, "attention": _attention}[config.table]
    return "\n".join(rows(config.kept))


def compiled(kept: pathlib.Path, *arguments: str) -> dict[str, Any] | str:
    """The figures of `train.py *arguments`; where it does not fit, the message's first line."""
    known = json.loads(kept.read_text()) if kept.exists() else {}
    command = " ".join(arguments)
    if command not in known:
        print(f"python train.py {command}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as directory:
            figures = pathlib.Path(directory) / "figures.json"
            found = subprocess.run(
                [sys.executable, "train.py", *arguments, "--json", str(figures)],
                text=True,
                capture_output=True,
                check=False,
            )
            if found.returncode == 0:
                known[command] = json.loads(figures.read_text())
                del known[command]["config"]  # the command says it
            elif "does not fit" in found.stderr:
                refusals = [line for line in found.stderr.splitlines() if "does not fit" in line]
                known[command] = refusals[0].removeprefix("error: ").split(" on each chip")[0]
            else:
                raise RuntimeError(f"train.py {command} failed:\n{found.stderr}")
        part = kept.with_suffix(".part")
        part.write_text(json.dumps(known, indent=1) + "\n")
        part.replace(kept)
    return known[command]


def _slices(kept: pathlib.Path) -> Iterator[str]:
    yield (
        "| configuration | slices | mesh | state | temporaries | peak of HBM | products | kernels "
        "| at best | bound by |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name in CONFIGURATIONS:
        for topology, count in SLICES:
            several = ("--num-slices", str(count)) if count > 1 else ()
            found = compiled(kept, name, "--compile-for", topology, *several)
            place = f"`{name}` | {f'{count} × ' if count > 1 else ''}{topology}"
            if isinstance(found, str):
                yield f"| {place} | {found} |" + " |" * 7
                continue
            memory, guess = found["memory"], found["estimate"]
            axes = (f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1)
            state = (memory["parameters"] + memory["optimizer"]) / GIB
            yield (
                f"| {place} | {', '.join(axes)} | {state:.1f} GiB "
                f"| {memory['temporaries'] / GIB:.1f} GiB "
                f"| {memory['peak'] / GIB:.1f} of {found['hbm_bytes_of_chip'] / GIB:.0f} GiB "
                f"| {found['product_flops'] / 1e12:.0f} TFLOP | {_kernels(found) / 1e12:.0f} TFLOP "
                f"| {guess['seconds']:.2f} s, {guess['tokens_per_second'] / 1e3:,.0f}k tokens/s, "
                f"{guess['model_flop_utilisation']:.0%} of the peak | {guess['bound_by']} |"
            )


def _context(kept: pathlib.Path) -> Iterator[str]:
    yield "| context | fsdp | slice | peak of HBM | × context | kernels |"
    yield "|---|---|---|---|---|---|"
    for context, fsdp, topology in CONTEXT:
        found = compiled(
            kept,
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
            f"| {_kernels(found) / 1e12:.0f} TFLOP |"
        )


def _attention(kept: pathlib.Path) -> Iterator[str]:
    yield (
        "| tokens | attention, GQE | attention, dense | ratio | step, GQE | step, dense | ratio |"
        "\n|---|---|---|---|---|---|---|"
    )
    for length, batch, context in LENGTHS:
        flops, seconds = [], []
        for name in ("gqe_7b", "gqa_7b"):
            found = compiled(
                kept,
                *(name, "--compile-for", "v5p:4x4x8", "--sequence-length", str(length)),
                *("--batch-size", str(batch), "--mesh.fsdp", str(32 if context < 16 else 8)),
                *("--mesh.context", str(context), "--mesh.data", "-1"),
                *("--accumulation-steps", str(4 if context < 16 else 2)),
            )
            flops.append(_kernels(found) / 1e12)
            seconds.append(found["estimate"]["seconds"])
        yield (
            f"| {length:,} | {flops[0]:.0f} TFLOP | {flops[1]:.0f} TFLOP "
            f"| {flops[1] / flops[0]:.2f} | {seconds[0]:.2f} s | {seconds[1]:.2f} s "
            f"| {seconds[1] / seconds[0]:.2f} |"
        )


def _kernels(found: dict[str, Any]) -> float:
    return sum(found["kernel_flops"].values())


def main() -> None:
    """The command line."""
    config = parse(
        CompiledConfig, sys.argv[1:], prog="python -m experiments.compiled", description=__doc__
    )
    print(run_command(lambda: run_table(config)))


if __name__ == "__main__":
    main()
