"""Loading a run: one rule each for configuration, mesh, tokenizer and attention kernel."""

import dataclasses
import importlib
import json
import pathlib
import shutil

import numpy as np
import pytest
import tokenizers

from gqe_jax.config import ConfigError, MeshConfig
from gqe_jax.data.tokenizers import TOKENIZER_FILE
from gqe_jax.evaluation.run import defaults_for, evaluate_run
from gqe_jax.report.routing import route_text
from gqe_jax.runs import Run, find_config, named_configs, restore_run, write_config
from gqe_jax.training.checkpoint import CheckpointError
from tests.gqe_jax.runs import make_corpus, save_untrained, small_config

WORDS = {"<|endoftext|>": 0, "query": 1, "key": 2, "[UNK]": 3}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run_dir(corpus, tmp_path_factory):
    return save_untrained(small_config(corpus, tmp_path_factory.mktemp("run")))


def changed(run_dir: pathlib.Path, copy: pathlib.Path, **changes) -> str:
    """A copy of the run whose checkpoint has another configuration."""
    shutil.copytree(run_dir, copy)
    saved = copy / "checkpoints" / "0" / "run" / "metadata"
    content = json.loads(saved.read_text())
    content["config"] |= changes
    saved.write_text(json.dumps(content))
    return str(copy)


def write_tokenizer(directory: pathlib.Path) -> None:
    """A tokenizer of four words."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(directory / TOKENIZER_FILE))


def test_a_runs_own_tokenizer_comes_first_and_needs_no_corpus(run_dir, tmp_path):
    data = dataclasses.asdict(Run.find(run_dir).config.data) | {"corpus": "gone"}
    copy = changed(run_dir, tmp_path / "run", data=data)
    write_tokenizer(tmp_path / "run")
    assert restore_run(copy).tokenizer.vocab_size == len(WORDS)
    routed = route_text(copy, "key query key")
    np.testing.assert_array_equal(routed.tokens, [2, 1, 2])
    assert Run.find(copy).tokenizer_file() == tmp_path / "run" / TOKENIZER_FILE


def test_a_tokenizer_that_is_named_comes_before_it(run_dir, corpus, tmp_path):
    copy = changed(run_dir, tmp_path / "run")
    write_tokenizer(tmp_path / "run")
    assert Run.find(copy).tokenizer("byte").vocab_size == 256
    routed = route_text(copy, "key", corpus=str(corpus))
    np.testing.assert_array_equal(routed.tokens, list(b"key"))


def test_held_out_text_is_scored_by_the_runs_attention_kernel(run_dir, tmp_path):
    copy = changed(run_dir, tmp_path / "run", attention_kernel="reference")
    config = dataclasses.replace(defaults_for(copy), batches=1)
    assert config.attention_kernel == "reference"
    best = evaluate_run(dataclasses.replace(config, attention_kernel=None))
    assert evaluate_run(config).held_out.loss == pytest.approx(best.held_out.loss, rel=1e-5)
    with pytest.raises(NotImplementedError, match="'cudnn' does not take query: dtype float32"):
        evaluate_run(dataclasses.replace(config, attention_kernel="cudnn"))
    with pytest.raises(ConfigError, match="attention_kernel is 'flash'"):
        dataclasses.replace(config, attention_kernel="flash")


def test_a_kernel_of_another_platform_is_not_the_default(run_dir, tmp_path):
    copy = changed(run_dir, tmp_path / "run", attention_kernel="pallas_gpu")
    assert defaults_for(copy).attention_kernel is None


def test_every_loader_takes_the_runs_mesh_where_it_fits(run_dir, tmp_path):
    own = MeshConfig(data=2, fsdp=2, context=1, tensor=2)
    fits = changed(run_dir, tmp_path / "fits", mesh=own.sizes)
    larger = changed(run_dir, tmp_path / "larger", mesh=MeshConfig(data=2, fsdp=16).sizes)
    named = MeshConfig(data=4, fsdp=2)
    for directory, expected in ((fits, own), (larger, MeshConfig())):
        assert Run.find(directory).mesh() == defaults_for(directory).mesh == expected
        restored = restore_run(directory)
        assert dict(restored.mesh.shape) == expected.resolve(8)
        assert dict(restore_run(directory, mesh=named).mesh.shape) == named.resolve(8)
    assert named.named == named
    assert MeshConfig().named is None


def test_a_text_is_routed_alike_on_every_mesh(run_dir, tmp_path):
    """Also one shorter than the two halves of a window that each context shard holds."""
    alone = route_text(str(run_dir), "a query", mesh=MeshConfig(data=8))
    over_context = MeshConfig(data=1, context=4, tensor=2).sizes
    routed = route_text(changed(run_dir, tmp_path / "run", mesh=over_context), "a query")
    np.testing.assert_allclose(routed.router_probs, alone.router_probs, atol=1e-5)


def test_a_missing_checkpoint_is_named(run_dir, tmp_path):
    with pytest.raises(CheckpointError, match=r"step is 7; .* has 0"):
        Run.find(run_dir, 7)
    with pytest.raises(CheckpointError, match="has no checkpoints; name the run directory"):
        restore_run(tmp_path)


def test_a_configuration_is_found_by_its_name_or_its_run(corpus, tmp_path, monkeypatch):
    assert find_config("tiny") == named_configs()["tiny"]
    config = small_config(corpus, tmp_path / "elsewhere")
    write_config(config, tmp_path)
    assert find_config(str(tmp_path)) == dataclasses.replace(config, run_dir=str(tmp_path))

    def without_configs(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", without_configs)
    assert find_config(str(tmp_path)).run_dir == str(tmp_path)
    with pytest.raises(ConfigError, match="CONFIG is 'tiny'; it must be"):
        find_config("tiny")
