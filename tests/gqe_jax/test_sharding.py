"""The table of axes, applied to meshes of simulated devices."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from configs import CONFIGS
from gqe_jax.config import ConfigError, MeshConfig
from gqe_jax.sharding import batch_sharding, check_divides, global_batch, local_rows, make_mesh
from gqe_jax.training.state import lay_out_state
from gqe_jax.training.steps import make_steps

TINY = CONFIGS["tiny"]


def test_parameters_and_optimizer_state_are_split_over_fsdp_and_tensor():
    steps = make_steps(TINY, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    state = steps.layout.init()
    query = state.params["layers"]["attention"]["query"]["kernel"]
    assert query[...].sharding.spec == PartitionSpec(None, ("fsdp",), ("tensor",), None, None)
    for array in jax.tree.leaves((state.params, state.opt_state)):
        if array.size > 10_000:
            shard = array.addressable_shards[0].data
            assert shard.size == array.size // 4, array.sharding


def test_slots_that_do_not_divide_stay_whole():
    steps = make_steps(TINY, make_mesh(MeshConfig(data=1, fsdp=2, tensor=4)))
    layout = steps.layout.sharding.params["layers"]["attention"]["out"]["kernel"]
    assert layout.get_value().spec == PartitionSpec(None, None, None, ("fsdp",))


def test_initial_parameters_do_not_depend_on_the_mesh():
    def params(mesh):
        return jax.device_get(lay_out_state(TINY, make_mesh(mesh)).init().params)

    jax.tree.map(
        np.testing.assert_array_equal,
        params(MeshConfig()),
        params(MeshConfig(data=1, fsdp=4, tensor=2)),
    )


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ({"data": 8}, {"batch_size": 12}, r"batch_size / accumulation_steps is 12.*data × mesh.fs"),
        ({"data": 8}, {"accumulation_steps": 4}, "batch_size / accumulation_steps is 4"),
        ({"data": 1, "tensor": 8}, {}, "num_kv_heads is 4; it must be a multiple of mesh.tensor"),
    ],
)
def test_what_does_not_divide_is_named(mesh, changes, message):
    config = dataclasses.replace(TINY, **changes)
    with pytest.raises(ConfigError, match=message):
        check_divides(config, dict(make_mesh(MeshConfig(**mesh)).shape))


@pytest.mark.wrong_types
def test_any_axis_may_cross_the_hosts_of_gpus(monkeypatch):
    """JAX numbers the hosts of GPUs as slices, and there is no faster network inside them only."""
    devices = [SimpleNamespace(platform="gpu", slice_index=i // 4, id=i) for i in range(8)]
    made = []
    monkeypatch.setattr(
        "gqe_jax.sharding.mesh_utils.create_device_mesh",
        lambda shape, devices: made.append((shape, devices)) or np.array(jax.devices()),
    )
    monkeypatch.setattr("gqe_jax.sharding.Mesh", lambda array, *_, **__: array)
    make_mesh(MeshConfig(data=1, fsdp=8), devices)
    assert made == [((1, 8, 1, 1), devices)]


def test_a_batch_is_fed_by_rows():
    sharding = batch_sharding(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    np.testing.assert_array_equal(local_rows(sharding, 16), np.arange(16))
    rows = np.arange(32).reshape(16, 2)
    batch = global_batch(sharding, 16, {"rows": rows})["rows"]
    np.testing.assert_array_equal(batch, rows)
    assert batch.addressable_shards[0].data.shape == (4, 2)


@pytest.mark.wrong_types
def test_a_host_of_a_pod_feeds_rows_that_are_not_consecutive():
    """On a 4 x 4 network whose hosts have 2 x 2 chips each."""
    devices = [SimpleNamespace(host=2 * (i // 8) + i % 4 // 2) for i in range(16)]
    sharding = SimpleNamespace(
        mesh=SimpleNamespace(size=16),
        addressable_devices_indices_map=lambda shape: {
            i: (slice(2 * i, 2 * i + 2), slice(None))
            for i, device in enumerate(devices)
            if device.host == 1
        },
    )
    np.testing.assert_array_equal(local_rows(sharding, 32), [4, 5, 6, 7, 12, 13, 14, 15])


def test_metadata_of_axes_survives_the_optimizer():
    state = lay_out_state(TINY, make_mesh(MeshConfig())).abstract
    moments = state.opt_state[1].mu
    axes = lambda tree: {  # noqa: E731
        path: variable.get_metadata()["out_sharding"] for path, variable in nnx.to_flat_state(tree)
    }
    assert axes(moments) == axes(state.params)
