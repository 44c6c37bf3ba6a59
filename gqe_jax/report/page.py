"""Builds the report: one self-contained HTML page."""

import base64
import dataclasses
import html
import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from gqe_jax.report import curves, measures, pairs
from gqe_jax.report.curves import Curves
from gqe_jax.report.routing import RoutedText
from gqe_jax.training import goodput


@dataclasses.dataclass(frozen=True)
class Run:
    """The data of one run that the page shows."""

    curves: Curves
    routed: RoutedText | None
    missing: str = ""
    """The reason why there is no routed text."""


def build(runs: Sequence[Run]) -> tuple[str, dict[str, bytes]]:
    """The page's HTML, and its plots as PNG files by name."""
    images = {"loss.png": curves.loss([run.curves for run in runs])}
    figures, texts = [], []
    for number, run in enumerate(runs):
        suffix = f"-{number + 1}" if len(runs) > 1 else ""
        figures.append(_run_section(run, suffix, images))
        if run.routed is not None:
            texts.append(_text_data(run.curves.label, run.routed))
    overlay = _figure("loss.png", images, "Training and held-out loss by step")
    sections = [_header(runs), _section("Loss", overlay)]
    if texts:
        sections.append(_text_section(texts))
    body = "\n".join([*sections, *figures])
    read = lambda name: importlib.resources.files(__package__).joinpath(name).read_text()  # noqa: E731
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(', '.join(run.curves.label for run in runs))}: routing</title>\n"
        f"<style>\n{read('page.css')}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f'<script type="application/json" id="texts">{_script_json(texts)}</script>\n'
        f"<script>\n{read('page.js')}</script>\n</body>\n</html>\n"
    )
    return page, images


def _header(runs: Sequence[Run]) -> str:
    verdicts, rows = [], []
    for run in runs:
        name = html.escape(run.curves.label)
        verdicts.append(_verdict(run))
        training, evaluations = run.curves.training, run.curves.evaluations
        load = run.curves.expert_load
        variant = run.routed.config.variant if run.routed else "gqa" if load is None else "–"
        cells = [
            f"<th scope=row>{name}</th>",
            _cell(variant),
            _cell(f"{training['step'][-1]:,}"),
            _cell(f"{training['loss'][-1]:.4f}"),
            _cell(f"{evaluations['eval_loss'][-1]:.4f}" if evaluations else "–"),
            _cell(f"{evaluations['eval_bits_per_byte'][-1]:.4f}" if evaluations else "–"),
            _cell("–" if load is None else f"{measures.final_load(load).min():.2f}"),
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = ("run", "variant", "steps", "loss", "held-out loss", "bits per byte", "least load*")
    head = "".join(f"<th scope=col>{name}</th>" for name in heads)
    return (
        "<header>\n<h1>Routing report</h1>\n"
        f"{''.join(verdicts)}\n"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>\n"
        '<p class="note">* Load of the least used expert, averaged over the last tenth of the '
        "logged steps, relative to the uniform load k / M. Below "
        f"{measures.IDLE_BELOW:g} an expert is idle and its group has collapsed.</p>\n"
        "</header>"
    )


def _verdict(run: Run) -> str:
    """A line that says whether experts collapsed, from the training metrics."""
    name, load = html.escape(run.curves.label), run.curves.expert_load
    if load is None:
        return f'<p class="verdict dense"><b>{name}</b>: dense, no routing.</p>'
    layers, groups = load.shape[1:3]
    idle = measures.idle_experts(load)
    if not idle:
        return (
            f'<p class="verdict fine"><b>{name}</b>: no collapse; every expert of the '
            f"{layers * groups} groups is in use.</p>"
        )
    collapsed = len({(expert.layer, expert.group) for expert in idle})
    named = ", ".join(f"layer {e.layer} group {e.group} expert {e.expert}" for e in idle[:12])
    more = f" and {len(idle) - 12} more" if len(idle) > 12 else ""
    return (
        f'<p class="verdict collapsed"><b>{name}</b>: collapse in {collapsed} of '
        f"{layers * groups} groups; idle: {named}{more}.</p>"
    )


def _run_section(run: Run, suffix: str, images: dict[str, bytes]) -> str:
    content = []

    def add(name: str, image: bytes, title: str, note: str, extra: str = "") -> None:
        images[name] = image
        figure = _figure(name, images, f"{title}, {run.curves.label}")
        content.append(f'<h3>{title}</h3>\n<p class="note">{note}</p>\n{figure}\n{extra}')

    if run.curves.expert_load is not None:
        add(
            f"expert_load{suffix}.png",
            curves.expert_load(run.curves),
            "Expert load",
            "The fraction of a training batch's tokens routed to each expert, by layer and group.",
        )
        add(
            f"router_entropy{suffix}.png",
            curves.router_entropy(run.curves),
            "Router entropy",
            "Mean entropy of a token's router probabilities over log M: 1 is uniform, 0 certain.",
        )
    if run.routed is not None:
        experts, top_k = run.routed.router_probs.shape[-1], run.routed.expert_index.shape[-1]
        shares = measures.pair_shares(measures.chosen(run.routed.expert_index, experts))
        add(
            f"expert_pairs{suffix}.png",
            pairs.pairs(shares, experts, same_group_possible=top_k > 1),
            "Experts selected together",
            f"In {len(run.routed.tokens):,} tokens of the text above. Labels are group·expert"
            + ("." if top_k > 1 else "; with k = 1 a token selects one expert per group."),
            _pair_table(measures.strongest_pairs(shares, experts)),
        )
    add(
        f"optimizer{suffix}.png",
        curves.optimizer(run.curves),
        "Optimizer",
        "Learning rate, and the global gradient norm before and after clipping.",
    )
    if run.curves.goodput is not None:
        content.append(_time_table(run.curves.goodput))
    if run.missing:
        content.insert(0, f'<p class="note">No routed text: {html.escape(run.missing)}.</p>')
    return _section(html.escape(run.curves.label), "\n".join(content))


def _time_table(record: dict[str, Any]) -> str:
    seconds = goodput.spent(record)
    total = max(sum(seconds.values()), 1e-9)
    rows = "".join(
        f"<tr>{_cell(kind)}{_cell(f'{value:,.0f}')}{_cell(f'{value / total:.1%}')}</tr>"
        for kind, value in seconds.items()
    )
    head = "".join(f"<th scope=col>{name}</th>" for name in ("", "seconds", "share"))
    return (
        f'<h3>Time</h3>\n<p class="note">Wall time of all starts: {record.get("restarts", 0)} '
        f"restarts, {record.get('lost_steps', 0)} steps lost.</p>\n"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        "</div>"
    )


def _pair_table(found: Sequence[measures.Pair]) -> str:
    rows = "".join(
        f"<tr>{_cell(pair.first.layer)}{_cell(f'{pair.first.group}·{pair.first.expert}')}"
        f"{_cell(f'{pair.second.group}·{pair.second.expert}')}{_cell(f'{pair.together:.1%}')}"
        f"{_cell(f'{pair.independent:.1%}')}</tr>"
        for pair in found
    )
    heads = ("layer", "expert", "and expert", "together", "if independent")
    head = "".join(f"<th scope=col>{name}</th>" for name in heads)
    return (
        "<details><summary>Pairs across groups that differ most from independent selection"
        f'</summary><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _text_section(texts: Sequence[dict[str, Any]]) -> str:
    runs = "".join(
        f'<option value="{i}">{html.escape(text["label"])}</option>' for i, text in enumerate(texts)
    )
    selects = "".join(
        f'<label id="{name}-label">{name} <select id="{name}">{options}</select></label>'
        for name, options in (("run", runs), ("layer", ""), ("group", ""), ("rank", ""))
    )
    return _section(
        "Selected expert of each token",
        f'<div class="controls">{selects}</div>\n<div id="experts"></div>\n'
        '<div id="text" tabindex="0" role="region" aria-label="The text, by expert"></div>\n'
        '<p class="note" id="token">Point at a token for its experts in every group of the '
        "layer.</p>\n<noscript>The colours of the text need JavaScript.</noscript>",
    )


def _text_data(label: str, routed: RoutedText) -> dict[str, Any]:
    """The JSON of a routed text that page.js reads; arrays are in base64."""
    probs, index = routed.router_probs, routed.expert_index
    taken = measures.chosen(index, probs.shape[-1])
    selected = np.take_along_axis(probs, index, axis=-1)
    texts = {int(token): text for token, text in zip(routed.tokens, routed.texts, strict=True)}
    preferring = [
        [
            [[[texts[p.token], round(p.share, 4), p.count] for p in expert] for expert in group]
            for group in measures.preferring_tokens(routed.tokens, layer)
        ]
        for layer in taken
    ]
    return {
        "label": label,
        "step": routed.step,
        "shape": [*index.shape, probs.shape[-1]],
        "tokens": routed.texts,
        "index": _base64(index.astype("<u2")),
        "percent": _base64(np.rint(100 * selected).astype(np.uint8)),
        "load": np.round(taken.mean(axis=1), 4).tolist(),
        "preferring": preferring,
    }


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>"


def _figure(name: str, images: dict[str, bytes], description: str) -> str:
    source = f"data:image/png;base64,{_base64(images[name])}"
    return f'<figure><img src="{source}" alt="{html.escape(description)}"></figure>'


def _cell(value: Any) -> str:
    return f"<td>{html.escape(str(value))}</td>"


def _base64(data: bytes | np.ndarray) -> str:
    return base64.b64encode(
        np.ascontiguousarray(data) if not isinstance(data, bytes) else data
    ).decode()


def _script_json(value: Any) -> str:
    """JSON without "<", so that it cannot close the script element around it."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
