"""The sets of the compiler's options: for TPUs alone, and known to their compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gqe_jax.compile_for.topology import get_topology
from gqe_jax.config import ConfigError, MeshConfig, RunConfig
from gqe_jax.sharding import make_mesh
from gqe_jax.training.compiler_options import OVERLAP, compiler_options
from gqe_jax.training.steps import make_steps
from tests.gqe_jax.runs import small_config


def test_other_devices_have_no_options():
    assert compiler_options("overlap", make_mesh(MeshConfig())) == {}
    with pytest.raises(ConfigError, match="libtpu_flags is 'fast'; it must be one of default"):
        RunConfig(libtpu_flags="fast")


@pytest.mark.libtpu
@pytest.mark.parametrize(("name", "slices"), [("v5e:2x2", 1), ("v5p:2x2x1", 1), ("v5p:2x2x1", 2)])
def test_the_compiler_takes_the_options_of_a_set(name, slices):
    mesh = make_mesh(MeshConfig(), list(get_topology(name, slices).devices))
    options = compiler_options("overlap", mesh)
    assert options == OVERLAP.get(name[:3], {})
    assert bool(options) == name.startswith("v5p")
    assert compiler_options("default", mesh) == {}
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=sharding)
    jax.jit(jnp.sum, compiler_options=options).lower(x).compile()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_tpu_no_such_option"):
        jax.jit(jnp.sum, compiler_options={"xla_tpu_no_such_option": "true"}).lower(x).compile()


@pytest.mark.libtpu
def test_the_steps_are_compiled_with_them(tmp_path):
    mesh = make_mesh(MeshConfig(), list(get_topology("v5p:2x2x1").devices))
    config = small_config(tmp_path, tmp_path, mesh=MeshConfig(), libtpu_flags="overlap")
    for flags in ("overlap", "default"):
        steps = make_steps(dataclasses.replace(config, libtpu_flags=flags), mesh)
        for step in (steps.train_step, steps.eval_step):
            assert ("sparse_core_collective" in repr(step.function._jit_info)) == (
                flags == "overlap"
            )
