"""The results as JSON: written after every case, and continued by the next run."""

import dataclasses
import json
import math
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

from gqe_kernels.chips import peak_flops
from kernels.benchmarks.speed.cases import SpeedCase
from kernels.benchmarks.speed.timing import Outcome, spread

PACKAGES = ("jax", "jaxlib", "flax", "tokamax", "libtpu", "jax-cuda13-plugin", "nvidia-cudnn-cu13")
KEPT = {"gqe": 1, "dense": 2}  # kernels of the op that are timed in layers and models


# The best options of the best kernels of the op, by side and name.
Known = Mapping[tuple[str, str], Mapping[str, Any]]


class DocumentError(ValueError):
    """A file of results that a run cannot continue."""


def header(command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The device, versions and settings that all cases of a file share."""
    device = jax.devices()[0]
    return {
        "command": command,
        "device": device.device_kind,
        "platform": device.client.platform_version.strip(),
        "versions": {
            each.name: each.version for each in metadata.distributions() if each.name in PACKAGES
        },
        "settings": dict(settings),
    }


def load(path: pathlib.Path, head: Mapping[str, Any]) -> dict[str, Any]:
    """The document at `path`, or a new one.

    Raises:
      DocumentError: the file is none, or of another device, versions or settings.
    """
    if not path.exists():
        return {**head, "cases": []}
    try:
        document = json.loads(path.read_text())
        cases = {case["case"]: case for case in document["cases"]}
    except (ValueError, TypeError, KeyError) as error:
        raise DocumentError(
            f"{path} holds no results of this benchmark ({error!r}); name another file with --json"
        ) from error
    for field in ("device", "platform", "versions", "settings"):
        if document.get(field) != head[field]:
            raise DocumentError(
                f"{field} is {document.get(field)!r} in {path} and {head[field]!r} here; name "
                "another file with --json, or delete this one"
            )
    return {**head, "cases": list(cases.values())}


def write(path: pathlib.Path, data: bytes) -> None:
    """Replaces a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


def save(path: pathlib.Path, document: Mapping[str, Any]) -> None:
    """Writes the document; a reader sees the old file or the new one, never a part."""
    write(path, (json.dumps(document, indent=1) + "\n").encode())


def best_options(document: Mapping[str, Any], case: SpeedCase) -> Known:
    """The options of the fastest kernels of the op that this case's layers call.

    They are those at the nearest length that has been timed; empty where none has.
    """
    same = ("op", case.training, case.head_dim, case.top_k)
    ops = [
        one
        for one in document["cases"]
        if one["best"] and (one["level"], one["training"], one["head_dim"], one["top_k"]) == same
    ]
    if not ops:
        return {}
    nearest = min(
        ops,
        key=lambda one: (abs(math.log2(one["length"] / case.length)), one["batch"] != case.batch),
    )
    timed = (one for one in nearest["contenders"] if one["seconds"])
    timed = sorted(timed, key=lambda one: one["seconds"]["median"])
    return {
        (side, one["name"]): one["options"]
        for side, kept in KEPT.items()
        for one in [one for one in timed if one["side"] == side][:kept]
    }


def record(case: SpeedCase, outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """The JSON record of a case.

    Args:
      outcomes: those of its contenders and of the matrix product.
      seconds: what the whole case took.
    """
    (yardstick,) = (one for one in outcomes if one.contender.side == "matmul")
    rate = None
    if yardstick.seconds:
        rate = yardstick.contender.flops / statistics.median(yardstick.seconds)
    entries, best = [], {}
    for side in case.sides:
        of_side = [outcome for outcome in outcomes if outcome.contender.side == side]
        reference = next((one for one in of_side if one.contender.name == "xla"), None)
        for name in dict.fromkeys(outcome.contender.name for outcome in of_side):
            same = [outcome for outcome in of_side if outcome.contender.name == name]
            entries.append(_entry(case, same, rate, reference))
        timed = [outcome for outcome in of_side if outcome.seconds]
        if timed:
            best[side] = min(timed, key=lambda one: statistics.median(one.seconds))
    ratio = None
    if len(best) == 2:
        first, second = (best[side].seconds for side in case.sides)
        ratio = spread([b / a for a, b in zip(first, second, strict=True)])
    return {
        "case": case.name,
        **dataclasses.asdict(case),
        "matmul_tflops": rate and rate / 1e12,
        "best": {side: outcome.contender.name for side, outcome in best.items()},
        "ratio": ratio,
        "contenders": entries,
        "took_seconds": round(seconds, 1),
    }


def _entry(
    case: SpeedCase, same: Sequence[Outcome], rate: float | None, reference: Outcome | None
) -> dict[str, Any]:
    """The record of one contender at its best options, with those that were tried."""
    kept = min(same, key=lambda one: (not one.seconds, one.screened is None, one.screened or 0.0))
    one = kept.contender
    entry = {
        "name": one.name,
        "side": one.side,
        "options": dict(one.options),
        "error": kept.error,
        "screened_seconds": kept.screened,
        "seconds": spread(kept.seconds) if kept.seconds else None,
        "tflops": None,
        "share_of_matmul": None,
        "memory_bytes": kept.memory,
        "deviation": _deviation(kept, reference),
        "tried": [
            {"options": dict(o.contender.options), "error": o.error, "seconds": o.screened}
            for o in same
            if o is not kept
        ],
    }
    if kept.seconds:
        median = entry["seconds"]["median"]
        entry["tflops"] = one.flops / median / 1e12
        entry["share_of_matmul"] = rate and one.flops / median / rate
        if case.level in ("model", "step"):
            entry["tokens_per_second"] = case.batch * case.length / median
            peak = peak_flops(jax.devices()[0])
            entry["model_flops_utilisation"] = peak and one.flops / median / peak
    return entry


def _deviation(outcome: Outcome, reference: Outcome | None) -> float | None:
    """The largest difference of the results from those of `xla`, as a share of the largest."""
    if outcome.slots is None or reference is None or reference.slots is None:
        return None
    ours, theirs = (np.asarray(one.slots, np.float32) for one in (outcome, reference))
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def row(case: Mapping[str, Any]) -> str:
    """A row of the printed table."""
    cells = [case["case"]]
    by_name = {(one["side"], one["name"]): one for one in case["contenders"]}
    for one in (by_name[best] for best in case["best"].items()):
        share = "" if one["share_of_matmul"] is None else f", {one['share_of_matmul']:.0%}"
        cell = f"{one['name']} {1e3 * one['seconds']['median']:.3g} ms, "
        cell += f"{one['tflops']:.3g} TFLOP/s{share}"
        if "tokens_per_second" in one:
            cell += f", {one['tokens_per_second']:,.0f} tokens/s"
        if one.get("model_flops_utilisation"):
            cell += f", MFU {one['model_flops_utilisation']:.1%}"
        cells.append(cell)
    cells += ["none ran"] * (3 - len(cells))
    ratio = case["ratio"]
    cells.append("" if ratio is None else f"{ratio['median']:.2f}")
    cells.append("" if ratio is None else f"{ratio['q1']:.2f} to {ratio['q3']:.2f}")
    failed = [one["name"] for one in case["contenders"] if one["error"] is not None]
    cells.append(", ".join(failed))
    return "| " + " | ".join(cells) + " |"


HEADING = (
    "| case | GQE (selected): kernel, time, rate, share of a matrix product's "
    "| dense (all) | ratio | its quartiles | failed |\n|---|---|---|---|---|---|"
)
