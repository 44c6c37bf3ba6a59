"""Damaged and hostile files are refused with a message, or read; see tests/gqe_jax/fuzz.py."""

import json
import os
import pickle
import subprocess
import sys
import time

import pytest
import tokenizers

from gqe_jax.config import AttentionConfig, ConfigError, ModelConfig
from gqe_jax.config_json import parse_json
from gqe_jax.data import DataError
from gqe_jax.data.tokenizers import load_tokenizer
from gqe_jax.errors import UserError
from gqe_jax.interop.tensors import Tensors, WeightsError
from gqe_jax.report.curves import Curves
from gqe_jax.runs import load_config
from gqe_jax.training.checkpoint import CheckpointError, Checkpoints
from gqe_jax.training.telemetry import METRICS_FILE, read_metrics

pytest.importorskip("hypothesis", reason="needs hypothesis: pip install -e '.[test]'")

from tests.gqe_jax import fuzz, special

CASES = {"checkpoint": 8, "Hugging Face": 16, "export": 16}
"""Of the kinds that take longest."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz.KINDS, ids=lambda kind: kind.name)
def test_damaged_files_are_refused_or_read(kind, tmp_path):
    cases = next((number for name, number in CASES.items() if name in kind.name), 40)
    tally = fuzz.fuzz(kind, cases, 0, tmp_path)
    assert tally.failures == {}
    assert tally.refused + tally.accepted == cases


def test_what_reads_wrongly_is_found(tmp_path, monkeypatch):
    """The harness sees an error, a wait, a file and a program that it should not."""
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    (tmp_path / "elsewhere").write_text("")
    readers = {
        "KeyError": lambda directory: {}["a"],
        "Hang": lambda directory: time.sleep(5),
        "elsewhere": lambda directory: (tmp_path / "elsewhere").read_text(),
        "link": lambda directory: (directory / "link").read_text(),
        "new": lambda directory: (tmp_path / "new").mkdir(),
        "os.system": lambda directory: os.system("true"),
        "subprocess": lambda directory: subprocess.run([sys.executable, "-c", ""]),
        "pickle": lambda directory: pickle.loads(b"cos\nsystem\n."),
        "exec": lambda directory: exec("1"),
    }
    directory = tmp_path / "files"
    directory.mkdir()
    (directory / "link").symlink_to(tmp_path / "elsewhere")
    fuzz.WATCH or fuzz.WATCH.append(fuzz.Watch())
    for name, read in readers.items():
        outcome, _ = fuzz.attempt(fuzz.Kind(name, lambda _: [], read), directory)
        assert name.replace("link", "elsewhere") in outcome, (name, outcome)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, b'"\xff"', "1" * 5000])
def test_json_that_python_cannot_hold_is_a_value_error(content):
    with pytest.raises(ValueError, match=r"nested too deeply|utf-8|digits"):
        parse_json(content)


def test_deep_nesting_is_refused_in_every_file(tmp_path):
    deep = "[" * 100_000
    (tmp_path / "config.json").write_text(deep)
    with pytest.raises(ConfigError, match=r"config.json is not the configuration .*nested too"):
        load_config(tmp_path)
    lines = [deep, json.dumps({"step": 3}), "[" * 900 + "]" * 900]
    (tmp_path / METRICS_FILE).write_text("\n".join(lines))
    assert read_metrics(tmp_path) == [{"step": 3}]


@pytest.mark.parametrize(
    "header",
    [
        '"text"',
        "[1]",
        "null",
        '{"a": 5}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": {}}}',
        '{"a": {"dtype": "F32", "shape": [18446744073709551615, 2], "data_offsets": [0, 4]}}',
        "[" * 100_000,
    ],
)
def test_a_safetensors_header_of_another_form_is_refused(header, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(WeightsError, match=r"model.safetensors cannot be read: .*; copy it again"):
        Tensors(tmp_path)


def part(name, **fields):
    """A change of one part of a tokenizer.json on which the library panics."""
    return lambda content: content.update({name: fields})


def empty_pattern(kind):
    return {"type": kind, "pattern": {"String": ""}, "content": "x"}


def backtracking():
    return {"type": "Split", "pattern": {"Regex": "(a+a+)+b"}, "invert": False}


@pytest.mark.parametrize(
    "change",
    [
        part("normalizer", **empty_pattern("Replace")),
        part("normalizer", type="Precompiled", precompiled_charsmap="AAAA"),
        part("pre_tokenizer", **backtracking(), behavior="Isolated"),
        part("pre_tokenizer", type="FixedLength", length=0),
        part("decoder", type="Strip", content="a", start=1 << 40, stop=1 << 40),
    ],
)
def test_a_tokenizer_that_panics_is_refused(change, tmp_path):
    fuzz.write_other_tokenizers(tmp_path)
    path = tmp_path / "bpe" / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tokenizer .* cannot (be read|encode|decode)"):
        use(load_tokenizer(path))


def use(tokenizer):
    documents = tokenizer.encode_documents(["the query of Paris", "a" * 60 + "c"])
    tokenizer.decode_documents(documents)
    tokenizer.decode(documents[0])


def test_no_one_else_s_interruption_becomes_a_message(tmp_path, monkeypatch):
    path = special.write(tmp_path) / "tokenizer.json"

    class Interrupted:
        @staticmethod
        def from_str(text):
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizers, "Tokenizer", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(path)


def test_sizes_that_overflow_are_refused():
    attention = AttentionConfig(
        embed_dim=8, num_query_experts=2**31 - 1, num_kv_heads=2**31 - 1, head_dim=2**31 - 2
    )
    with pytest.raises(ConfigError, match=r"a parameter has \d+ elements, .*at most 281474976"):
        ModelConfig(attention=attention)
    for value in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ConfigError, match=r"embedding_init_std is .*; it must be >= 0 and fin"):
            ModelConfig(embedding_init_std=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": [1.0]}, "loss is not in every record"),
        ({"learning_rate": "fast"}, "learning_rate is not in every record"),
        ({"expert_load": [[[0.5], [0.5, 0.5]]]}, "expert_load is not in every record"),
        ({"router_entropy": 0.5}, "router_entropy is not in every record"),
        ({"grad_norm": 10**400}, "grad_norm is not in every record"),
    ],
)
def test_damaged_metrics_are_refused_by_the_report(change, message, tmp_path):
    directory = tmp_path / "run"
    fuzz.make_metrics(directory)
    path = directory / METRICS_FILE
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1] |= change
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=rf"metrics.jsonl: {message}.*delete the damaged lines"):
        Curves.read(directory)


def test_damaged_json_of_a_checkpoint_names_the_checkpoint(tmp_path):
    directory = tmp_path / "run"
    names = fuzz.make_checkpoint(directory)
    step = directory / "checkpoints" / "0"
    run, metrics = step / "run" / "metadata", step / "metrics" / "metrics"
    assert {str(path.relative_to(directory)) for path in (run, metrics)} <= set(names)
    good = json.loads(run.read_text())
    seed = good["config"] | {"seed": "x"}
    for change, message in (
        ({"corpus": ["none"]}, r"corpus is \['none'\], which is no fingerprint"),
        ({"config": seed}, "of its configuration, seed is 'x'; it must be of type int"),
        ({"config": None}, "of its configuration, RunConfig is None"),
    ):
        run.write_text(json.dumps(good | change))
        wanted = r"checkpoints/0 cannot be read .*" + message
        with (
            Checkpoints(directory, read_only=True) as found,
            pytest.raises(CheckpointError, match=wanted),
        ):
            found.read_run(0)
    run.write_text(json.dumps(good | {"checksums": [1]}))
    with pytest.raises(CheckpointError, match="its item run has no checksums"):
        fuzz.read_checkpoint(directory)
    run.write_text(json.dumps(good))
    for loss in ("1" + "0" * 400, "true", "[1]", "NaN", "[" * 100_000):
        metrics.write_text(f'{{"eval_loss": {loss}}}')
        with Checkpoints(directory, read_only=True) as checkpoints:
            assert checkpoints.best() is None
    (step / "_CHECKPOINT_METADATA").write_text('"text"')
    with pytest.raises(UserError, match=r"a checkpoint in .*checkpoints is damaged \("):
        fuzz.read_checkpoint(directory)


@pytest.mark.parametrize("length", ["64", [64], -1, 0, 1.5, True])
def test_a_length_that_is_no_number_is_refused(length, tmp_path):
    fuzz.make_companions(tmp_path / "model")
    path = tmp_path / "model" / "huggingface.json"
    path.write_text(json.dumps({"max_position_embeddings": length}))
    with pytest.raises(DataError, match=r"max_position_embeddings is .*; it must be a positive"):
        fuzz.companions(tmp_path / "model")
