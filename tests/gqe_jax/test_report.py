"""The report: what is counted of a routing, and a page that shows it and needs nothing else."""

import base64
import dataclasses
import html.parser
import itertools
import json
import math
import operator
import pathlib
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from flax import nnx

from gqe_jax.config import ConfigError
from gqe_jax.data import DataError
from gqe_jax.data.tokenizers import ByteTokenizer
from gqe_jax.model.transformer import Transformer
from gqe_jax.report import measures, page
from gqe_jax.report.__main__ import ReportConfig, write_report
from gqe_jax.report.curves import Curves
from gqe_jax.report.measures import Expert
from gqe_jax.report.routing import route_text, token_texts
from gqe_jax.sharding import make_mesh
from gqe_jax.training.checkpoint import Checkpoints
from gqe_jax.training.state import lay_out_state
from gqe_jax.training.telemetry import METRICS_FILE
from tests.gqe_jax.runs import make_corpus, small_config

TEXT = 'naïve <b>"query" & </script> key\n' * 3  # 37 bytes a line: 3 windows and a part
LAYERS, GROUPS, EXPERTS, TOP_K = 2, 2, 4, 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with two of four experts a group, as it is before the first step, and its metrics."""
    directory = tmp_path_factory.mktemp("runs")
    config = small_config(make_corpus(directory), directory / "a<i>run")
    attention = dataclasses.replace(
        config.model.attention, num_query_experts=8, top_k=TOP_K, router_init_std=0.3
    )
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, attention=attention)
    )
    state = lay_out_state(config, make_mesh(config.mesh)).init()
    with Checkpoints(config.run_dir) as checkpoints:
        checkpoints.save(state, config, "fingerprint", eval_loss=None)
    metrics = {"loss": 2.0, "learning_rate": 0.1, "grad_norm": 2.0, "clipped_grad_norm": 1.0}
    metrics |= {"expert_load": np.full((LAYERS, GROUPS, EXPERTS), 0.5).tolist()}
    metrics |= {"router_entropy": np.ones((LAYERS, GROUPS)).tolist()}
    lines = [{"step": step, **metrics} for step in (1, 2)] + [
        {"step": 2, "eval_loss": 2.5, "eval_bits_per_byte": 3.6}
    ]
    (pathlib.Path(config.run_dir) / METRICS_FILE).write_text("\n".join(map(json.dumps, lines)))
    return config, state


@pytest.fixture(scope="module")
def routed(trained):
    return route_text(trained[0].run_dir, TEXT)


@pytest.fixture(scope="module")
def written(trained):
    """The page's path, of the same run twice."""
    run_dir = trained[0].run_dir
    output = pathlib.Path(run_dir).parent / "page"
    return write_report(ReportConfig((run_dir, f"{run_dir}/../a<i>run"), text=TEXT, output=output))


def reference_model(config):
    return Transformer(config.model, implementation="reference", rngs=nnx.Rngs(0))


def test_routing_is_that_of_each_window_alone(trained, routed):
    """The router in float64 NumPy, on the hidden states of the blocks one after the other."""
    config, state = trained
    whole, _ = nnx.split(nnx.eval_shape(lambda: reference_model(config)), nnx.Param)
    model = nnx.merge(whole, jax.device_get(state.params))
    graphdef, stacked = nnx.split(model.layers)
    layers = [jax.tree.map(operator.itemgetter(layer), stacked) for layer in range(LAYERS)]
    call = {"positions": None, "segment_ids": None, "cache": None}
    apply = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x, **call)[0])
    tokens = np.frombuffer(TEXT.encode(), np.uint8)
    np.testing.assert_array_equal(routed.tokens, tokens)
    windows = list(itertools.batched(tokens, config.sequence_length))
    assert len(windows[-1]) < config.sequence_length
    for number in (0, len(windows) - 1):
        x = model.embedding(jnp.array([windows[number]], jnp.int32))
        start = number * config.sequence_length
        window = slice(start, start + x.shape[1])
        for layer, params in enumerate(layers):
            block = nnx.merge(graphdef, params)
            seen = np.asarray(block.attention_norm(x)[0], np.float64)
            kernel = np.asarray(block.attention.router.kernel[...], np.float64)
            probs = np.exp(np.einsum("te,egm->tgm", seen, kernel))
            probs /= probs.sum(axis=-1, keepdims=True)
            np.testing.assert_allclose(routed.router_probs[layer, window], probs, atol=1e-4)
            ranked = -np.sort(-probs, axis=-1)[..., : TOP_K + 1]
            clear = -np.diff(ranked, axis=-1).max(axis=-1) > 1e-4
            assert clear.mean() > 0.9
            np.testing.assert_array_equal(
                routed.expert_index[layer, window][clear],
                np.argsort(-probs, axis=-1)[..., :TOP_K][clear],
            )
            x = apply(params, x)


def test_held_out_text_is_the_default(trained):
    held_out = route_text(trained[0].run_dir, max_tokens=40)
    assert "".join(held_out.texts).startswith(
        ("the ", "a ", "query ", "expert ", "group ", "head ")
    )
    assert held_out.expert_index.shape == (LAYERS, 40, GROUPS, TOP_K)
    with pytest.raises(DataError, match="text is empty"):
        route_text(trained[0].run_dir, "")


def test_tokens_add_up_to_the_text():
    tokens = [*"aé日".encode(), 255, *b"b"]
    assert token_texts(ByteTokenizer(), tokens) == ["a", "", "é", "", "", "日", "␄", "b"]
    broken = token_texts(ByteTokenizer(), [0xE6, 0x97, 0x41, 0x42])
    assert len(broken) == 4
    assert "".join(broken).endswith("AB")


def test_an_expert_below_a_tenth_of_its_share_is_idle():
    load = np.full((40, 2, 1, 4), 0.5)  # k = 2 of 4: an even share is 0.5
    load[:36, 0, 0] = [0.0, 0.0, 1.0, 1.0]  # not in the last tenth
    load[36:, 1, 0] = [0.04, 0.06, 0.9, 1.0]
    np.testing.assert_allclose(measures.final_load(load)[1, 0], [0.08, 0.12, 1.8, 2.0])
    assert measures.idle_experts(load) == [Expert(1, 0, 0)]


def test_pairs_are_counted():
    index = np.array([[[[0], [1]], [[0], [1]], [[0], [0]], [[1], [0]]]])  # [1, 4, 2, 1]
    shares = measures.pair_shares(measures.chosen(index, 2))
    expected = [[0.75, 0, 0.25, 0.5], [0, 0.25, 0.25, 0], [0.25, 0.25, 0.5, 0], [0.5, 0, 0, 0.5]]
    np.testing.assert_allclose(shares[0], expected)
    first = measures.strongest_pairs(shares, 2, count=1)[0]
    assert (first.first, first.second) == (Expert(0, 0, 0), Expert(0, 1, 0))
    assert (first.together, first.independent) == (0.25, 0.375)


def test_tokens_that_prefer_an_expert():
    tokens = np.array([7] * 30 + [8] * 30 + [9])
    index = np.array([0] * 30 + [1] * 20 + [0] * 10 + [1])[None, :, None, None]
    (group,) = measures.preferring_tokens(tokens, measures.chosen(index, 2)[0])
    assert [(p.token, p.count, p.share) for p in group[0]] == [(7, 30, 1.0)]
    assert [(p.token, p.count) for p in group[1]] == [(8, 30), (9, 1)]
    assert group[1][0].share == pytest.approx(2 / 3)


class Reader(html.parser.HTMLParser):
    """Checks that elements nest, and collects attributes, and text by the last id."""

    void = ("meta", "img", "link", "br")

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.text = [], [], {}
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.void:
            self.open.append(tag)
            self.name = dict(attributes).get("id", tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text[self.name] = self.text.get(self.name, "") + data


def test_page_is_whole_and_needs_nothing_else(written, routed):
    content = written.read_text()
    reader = Reader(content)
    for tag, attributes in reader.tags:
        assert tag != "link"
        assert "href" not in attributes
        assert attributes.get("src", "data:").startswith("data:"), tag
    assert not re.search(r"https?://|@import|url\(", re.sub(r"base64,[^\"]*", "", content))
    assert "<i>" not in content

    images = sorted(written.parent.glob("*.png"))
    assert [image.name for image in images] == sorted(
        ["loss.png"]
        + [
            f"{name}-{run}.png"
            for name in ("expert_load", "expert_pairs", "optimizer", "router_entropy")
            for run in (1, 2)
        ]
    )
    embedded = {
        a["src"].removeprefix("data:image/png;base64,") for t, a in reader.tags if t == "img"
    }
    assert {base64.b64decode(image) for image in embedded} == {i.read_bytes() for i in images}
    assert all(matplotlib.image.imread(image).std() > 0.01 for image in images)

    data, _ = json.loads(reader.text["texts"])
    assert data["shape"] == [LAYERS, len(TEXT.encode()), GROUPS, TOP_K, EXPERTS]
    assert "".join(data["tokens"]) == TEXT
    index = np.frombuffer(base64.b64decode(data["index"]), "<u2").reshape(data["shape"][:4])
    np.testing.assert_array_equal(index, routed.expert_index)


def curves(load, label="run"):
    steps = np.arange(1, len(load) + 1)
    training = dict.fromkeys(("loss", "learning_rate"), 1.0 / steps)
    training |= {"grad_norm": steps * 1.0, "clipped_grad_norm": steps * 1.0, "step": steps}
    training |= {"expert_load": load, "router_entropy": np.full(load.shape[:3], math.log(2))}
    return Curves(label, training, {})


def test_collapse_stands_at_the_top():
    even = np.full((10, 2, 3, 2), 0.5)
    collapsed = even.copy()
    collapsed[-1, 1, 2] = [0.97, 0.03]
    content, _ = page.build(
        [
            page.Run(curves(even, "<good>"), None, "no checkpoint & more"),
            page.Run(curves(collapsed, "bad"), None),
        ]
    )
    header = content[content.index("<header>") : content.index("</header>")]
    assert "<b>&lt;good&gt;</b>: no collapse; every expert of the 6 groups is in use" in header
    assert "<b>bad</b>: collapse in 1 of 6 groups; idle: layer 1 group 2 expert 1." in header
    assert "No routed text: no checkpoint &amp; more." in content
    Reader(content)


def test_what_is_wrong_is_named(tmp_path, trained):
    run_dir = trained[0].run_dir
    with pytest.raises(ConfigError, match=r"text and text_file \(x\) are both given"):
        ReportConfig((run_dir,), text="a", text_file="x")
    with pytest.raises(ConfigError, match="has no metrics of training steps"):
        write_report(ReportConfig((str(tmp_path),)))
    with pytest.raises(ConfigError, match=r"text_file .*nowhere cannot be read"):
        write_report(ReportConfig((run_dir,), text_file=tmp_path / "nowhere"))


def test_browser_colours_the_tokens(written, routed, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"needs a browser; found none of {', '.join(names)}")
    shown = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
         "--virtual-time-budget=2000", "--dump-dom",
         f"{written.as_uri()}#run=1&layer=1&group=1&rank=1"],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    reader = Reader(shown)
    spans = [attributes for tag, attributes in reader.tags if "data-token" in attributes]
    assert [int(span["data-expert"]) for span in spans] == routed.expert_index[1, :, 1, 1].tolist()
    assert [tag for tag, a in reader.tags if a.get("class") == "expert"] == ["div"] * EXPERTS
    options = [(tag, a) for tag, a in reader.tags if tag in ("select", "option")]
    counts = {}
    for tag, attributes in options:
        if tag == "select":
            name = attributes["id"]
        counts[name] = counts.get(name, -1) + 1
    assert counts == {"run": 2, "layer": LAYERS, "group": GROUPS, "rank": TOP_K}
