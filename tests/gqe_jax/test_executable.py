"""A train step from a file: the numbers of one that is compiled here, and what does not fit."""

import dataclasses
import io
import json

import numpy as np
import pytest

from gqe_jax.compile_for import CompileOptions
from gqe_jax.compile_for.program import compile_step
from gqe_jax.compile_for.topology import get_topology
from gqe_jax.config import ConfigError, MeshConfig
from gqe_jax.sharding import make_mesh
from gqe_jax.training import executable
from gqe_jax.training.loop import train
from gqe_jax.training.steps import abstract_batch, make_steps
from tests.gqe_jax.runs import comparable_metrics, make_corpus, saved_state, small_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run, and the file of its train step."""
    folder = tmp_path_factory.mktemp("compiled")
    config = small_config(make_corpus(folder), folder / "run", steps=3, eval_every=3)
    mesh = make_mesh(config.mesh)
    steps = make_steps(config, mesh)
    arguments = steps.layout.abstract, abstract_batch(config, mesh)
    path = folder / "step"
    executable.save(path, steps.train_step.lower(*arguments).compile(), config, mesh)
    return config, path


@pytest.mark.slow
def test_a_run_with_a_loaded_step_has_the_same_numbers(saved, tmp_path):
    config, path = saved
    loaded = dataclasses.replace(config, run_dir=str(tmp_path / "run"), compiled=str(path))
    train(loaded, stream=io.StringIO())
    train(config, stream=io.StringIO())
    assert comparable_metrics(loaded.run_dir) == comparable_metrics(config.run_dir)
    ours, theirs = saved_state(loaded), saved_state(config)
    assert len(ours) == len(theirs) > 20
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def changed(path, tmp_path, **values):
    """A copy of the file whose header has these values."""
    magic, line, content = path.read_bytes().split(b"\n", 2)
    header = json.loads(line)
    for name, value in values.items():
        header[name] = header[name] | value if isinstance(value, dict) else value
    other = tmp_path / "other"
    other.write_bytes(b"\n".join([magic, json.dumps(header).encode(), content]))
    return other


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"versions": {"jax": "0.1"}}, "jax is .*, and was 0.1; compile it again"),
        ({"config": {"model.mlp_dim": 7}}, "model.mlp_dim is 48, and was 7"),
        ({"chip": "TPU v5"}, "chip is cpu, and was TPU v5"),
        ({"mesh": {"data": 16}}, "mesh is .*, and was .*16"),
        ({"places": []}, "the chips of the slice are in another order"),
        ({"sources": "0"}, "the source of gqe_jax or gqe_kernels has changed"),
        ({"kept": "all"}, "which is no compiled step"),
    ],
)
def test_a_step_that_does_not_fit_is_refused_with_the_reason(saved, tmp_path, values, message):
    config, path = saved
    other = dataclasses.replace(
        config, run_dir=str(tmp_path / "run"), compiled=str(changed(path, tmp_path, **values))
    )
    with pytest.raises(ConfigError, match=message):
        train(other, stream=io.StringIO())


def test_a_file_that_is_none_or_damaged_is_refused(saved, tmp_path):
    config, path = saved
    steps = make_steps(config, make_mesh(config.mesh))
    content = path.read_bytes()
    for wrong in (b"", b"\x80\x04K\x01.", b"\n\n\n", content[:100], content[:-1000]):
        (tmp_path / "wrong").write_bytes(wrong)
        named = dataclasses.replace(config, compiled=str(tmp_path / "wrong"))
        with pytest.raises(ConfigError, match=r"compiled is .*; compile it again"):
            executable.load(named, steps)
    with pytest.raises(ConfigError, match="No such file"):
        executable.load(dataclasses.replace(config, compiled=str(tmp_path / "no")), steps)
    with pytest.raises(ConfigError, match="a teacher has no compiled step"):
        executable.load(dataclasses.replace(config, compiled="x", teacher="y"), steps)


def test_what_the_step_does_not_depend_on_can_differ(saved):
    config, path = saved
    other = dataclasses.replace(config, seed=5, log_every=7, run_dir="z", compiled=str(path))
    executable.load(other, make_steps(config, make_mesh(config.mesh)))


@pytest.mark.libtpu
def test_a_step_for_a_slice_is_saved_and_refused_here(saved, tmp_path):
    config, _ = saved
    sliced = dataclasses.replace(config, mesh=MeshConfig(), batch_size=8)
    path = tmp_path / "step"
    compile_step(sliced, get_topology("v5e:2x2"), save=path)
    assert path.stat().st_size > 10_000
    named = dataclasses.replace(config, compiled=str(path))
    with pytest.raises(ConfigError, match="chip is cpu, and was TPU v5 lite"):
        executable.load(named, make_steps(config, make_mesh(config.mesh)))
    with pytest.raises(ConfigError, match=r"save is .* one mesh and the train step"):
        CompileOptions(save=path, sweep_meshes=2)
