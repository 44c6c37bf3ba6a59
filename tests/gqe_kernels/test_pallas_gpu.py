"""The GPU kernels keep the contract in the interpreter and on a GPU, and compile for an H200."""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from gqe_kernels import Mask, Routed, pallas_gpu, routed_attention
from gqe_kernels.pallas_gpu.items import Items, for_each
from gqe_kernels.pallas_gpu.tables import Visits, visits
from tests import oracle
from tests.gqe_kernels.contract import (
    CASES,
    DENSE_CASES,
    Case,
    DenseAttentionContract,
    RoutedAttentionContract,
    as_arguments,
    make_inputs,
)

TAKEN = tuple(dataclasses.replace(case, head_dim=64) for case in CASES)


@pytest.fixture
def interpreter():
    """JAX's interpreter of Mosaic GPU, with scratch memory full of NaNs."""
    if jax.version.__version_info__ < (0, 12):
        pytest.skip("the interpreter of jax 0.11 wants every phase of a barrier waited for")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


# Blocks that the interpreter can take.
SMALL = pallas_gpu.BlockSizes(kv=64, programs=2, staged=True)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
class TestInterpreted(RoutedAttentionContract):
    implementation = functools.partial(pallas_gpu.attention, blocks=SMALL)
    dtype = jnp.bfloat16
    base = Case(batch=1, head_dim=64)
    float32_cases = ()
    bfloat16_cases = (
        Case(batch=1, q_len=300, group=1, head_dim=64),
        Case(batch=1, q_len=150, group=1, head_dim=128, expert=4, k=2, segments="packed"),
        # More experts than the kernel selects among.
        Case(batch=1, head_dim=64, group=1, expert=16, causal=False, kv_len=37, shared="given"),
        Case(head_dim=64, q_len=5, kv_len=24, q_offset=(3, 19), segments="padded"),
        Case(batch=1, head_dim=64, q_len=8, kv_len=24, q_offset=-4, shared=None, weighted=False),
    )

    @pytest.mark.slow
    def test_no_field_of_the_mask_is_ignored(self):
        super().test_no_field_of_the_mask_is_ignored()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.slow
class TestDenseInterpreted(DenseAttentionContract):
    implementation = functools.partial(pallas_gpu.attention, blocks=SMALL)
    dtype = jnp.bfloat16
    cases = (Case(batch=1, q_len=150, expert=3, head_dim=64, segments="packed"),)


@pytest.mark.gpu
class TestDenseOnTheChip(DenseAttentionContract):
    implementation = "pallas_gpu"
    dtype = jnp.bfloat16
    cases = tuple(dataclasses.replace(case, head_dim=64) for case in DENSE_CASES)


@pytest.mark.gpu
class TestOnTheChip(RoutedAttentionContract):
    implementation = "pallas_gpu"
    dtype = jnp.bfloat16
    base = Case(head_dim=64)
    float32_cases = ()
    bfloat16_cases = (
        *TAKEN,
        Case(batch=1, q_len=1000, group=4, head_dim=128, segments="packed"),
        Case(batch=1, q_len=2048, group=2, head_dim=128),
        Case(batch=1, q_len=2048, group=2, head_dim=64),
    )


@pytest.fixture(scope="module")
def report():
    """ptxas's report of each kernel, by name and head_dim."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("needs the CUDA plugin, of the extra: pip install -e '.[cuda]'")
    found = subprocess.run(
        [sys.executable, "-m", "kernels.benchmarks.gpu_compile"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_compiled_for_an_h200_nothing_is_serialised_or_spilled(report):
    cells = [[cell.strip() for cell in line.split("|")] for line in report.splitlines()]
    rows = [row[1:-1] for row in cells if len(row) > 1 and row[1].startswith("gqe_")]
    assert len(rows) == 12  # three kernels, two head_dims, with segments and without
    for name, case, _, spilled, serialised in rows:
        assert (spilled, serialised) == ("0", "no"), (name, case)


@pytest.mark.parametrize(
    ("tiles", "batch", "heads", "programs"),
    [(7, 2, 3, 5), (1, 1, 3, 8), (4, 1, 2, 8), (9, 1, 1, 1)],
)
@pytest.mark.parametrize("descending", [True, False])
def test_every_item_is_done_once(tiles, batch, heads, programs, descending):
    done = by_program(Items(tiles, batch, heads, descending, programs))
    assert done.shape == (min(programs, tiles * batch * heads), tiles, batch, heads)
    np.testing.assert_array_equal(done.sum(axis=0), 1)


def test_a_persistent_grid_is_even():
    tiles, batch, heads = 32, 8, 9  # causal, 8 sequences of 4,096 tokens
    steps = by_program(Items(tiles, batch, heads, True, 132)).sum(axis=(2, 3)) @ range(1, tiles + 1)
    assert steps.sum() == batch * heads * tiles * (tiles + 1) // 2
    assert steps.max() < 1.02 * steps.mean()


def by_program(items: Items) -> np.ndarray:
    """How often each program of the grid does each item."""

    def run(_):
        def count(number, tile, batch, head, done):
            return done.at[tile, batch, head].add(1)

        return for_each(items, count, jnp.zeros(items[:3], jnp.int32))

    return np.asarray(jax.vmap(run, axis_name="program")(jnp.arange(*items.grid)))


@pytest.mark.parametrize(
    ("dtype", "changes", "reason"),
    [
        ("float32", {}, "query: dtype float32, where bfloat16 or float16"),
        ("bfloat16", {"head_dim": 32}, "query: head_dim 32, where 64 or 128"),
        ("bfloat16", {"scale": -1.0}, "scale: -1.0, where a positive"),
    ],
)
def test_what_the_kernels_cannot_take_is_named(dtype, changes, reason):
    arrays, masking = make_inputs(Case(**({"head_dim": 64} | changes)))
    arrays = as_arguments(arrays, dtype)
    with pytest.raises(NotImplementedError, match=reason):
        routed_attention(**arrays, **masking, implementation="pallas_gpu")


@pytest.mark.wrong_types
def test_a_gpu_that_is_no_hopper_is_named():
    ampere = types.SimpleNamespace(platform="gpu", compute_capability="8.0")
    query, key = jnp.ones((1, 64, 2, 2, 64), jnp.bfloat16), jnp.ones((1, 64, 2, 64), jnp.bfloat16)
    reason = pallas_gpu.unsupported(Routed(query, key, key), Mask(), device=ampere)
    assert reason.startswith("the GPU here: compute capability 8.0")


def test_block_sizes_are_checked():
    with pytest.raises(ValueError, match=r"BlockSizes\.kv is 100; it must be a multiple of 64"):
        pallas_gpu.BlockSizes(kv=100)
    with pytest.raises(ValueError, match=r"BlockSizes\.stages is 1; it must be at least 2"):
        pallas_gpu.BlockSizes(stages=1)
    with pytest.raises(ValueError, match=r"BlockSizes\.programs is 0; it must be positive"):
        pallas_gpu.BlockSizes(programs=0)


@pytest.mark.parametrize("outer", ["q", "kv"])
@pytest.mark.parametrize("segments", [None, "ascending", "any"])
@pytest.mark.parametrize("causal", [True, False])
def test_visits_are_what_the_mask_shows(causal, segments, outer):
    rng = np.random.default_rng(0)
    ids = None
    if segments is not None:
        ids = rng.integers(1, 5, (2, 8)).repeat(32, axis=1).astype(np.int32)
        ids = np.sort(ids, axis=1) if segments == "ascending" else ids
        ids[:, 230:] = 0
    offset, lengths, rows = np.array([0, 64], np.int32), (250, 250), (64, 32)
    mask = Mask(jnp.asarray(offset)[:, None], ids, ids, causal)
    table = visits(mask, 2, lengths=lengths, rows=rows, outer=outer)
    wholes = 0
    for b in range(2):
        segment_ids = (None, None) if ids is None else (ids[b], ids[b])
        seen = oracle.visible(offset[b] + np.arange(256), 256, causal, *segment_ids)
        seen[:, 250:] = False
        blocks = seen.reshape(4, 64, 8, 32)
        some, every = blocks.any(axis=(1, 3)), blocks.all(axis=(1, 3))
        if outer == "kv":
            some, every = some.T, every.T
        for i in range(len(some)):
            visit = Visits.read(table, b, i)
            visited = [int(visit.block(step)) for step in range(visit.steps)]
            assert len(set(visited)) == len(visited)
            assert set(np.flatnonzero(some[i])) <= set(visited)
            assert set(visited) <= set(range(some.shape[1]))
            assert every[i][visited[: int(visit.whole)]].all()
            wholes += int(visit.whole) - every[i].sum()
    assert wholes == 0 or segments == "any"
