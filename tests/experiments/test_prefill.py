"""The benchmark of whole layers and models: what it counts, and whom it compares."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import experts, prefill, whole
from experiments.prefill import FULL, SMALL, cases
from gqe_jax import AttentionConfig, GroupedQueryAttention
from kernels.benchmarks.speed import document, timing
from kernels.benchmarks.speed.cases import SpeedCase
from kernels.benchmarks.speed.op import matmul
from kernels.benchmarks.speed.peers import peers


def test_flops_of_a_layer_by_hand():
    config = AttentionConfig(embed_dim=10, num_query_experts=4, num_kv_heads=2, head_dim=2)
    flops = functools.partial(whole.layer_flops, length=2, batch=1)
    # Columns: 4 experts, 2 keys, 2 values and a shared query of 2, a router of 4; rows of W_O: 4
    # slots of 2. 3 of 5 heads are active; 2 tokens make 3 pairs.
    columns = 2 * (4 + 2 + 2 + 1) + 4 + 2 * 4
    assert flops(config, training=False) == 2 * 2 * 10 * columns + 3 * 3 * 2 * 2 * 2
    assert flops(config, training=True) == 3 * 2 * 2 * 10 * columns + 3 * 3 * 7 * 2 * 2
    dense = dataclasses.replace(config, variant="gqa")
    columns = 2 * (4 + 2 + 2) + 2 * 4
    assert flops(dense, training=False) == 2 * 2 * 10 * columns + 4 * 3 * 2 * 2 * 2


def test_a_prefill_has_the_logits_of_one_token():
    flops = [whole.model_flops(SMALL.model, 4, 2, training=training) for training in (False, True)]
    logits = 2 * SMALL.model.embed_dim * SMALL.model.vocab_size
    assert flops[1] == 3 * (flops[0] + 2 * 3 * logits)


def test_every_case_has_a_name_of_its_own_and_a_geometry():
    for scale in (FULL, SMALL):
        found = cases(scale)
        assert len({case.name for case in found}) == len(found)
        for case in found:  # with k = 1 and with k = 2
            attention = whole.run_config(case, scale, "gqe").model.attention
            assert (attention.num_active_heads, attention.num_query_experts) == (9, 16)
    assert {case.length for case in cases(FULL) if case.level == "op"} == {
        1024 * 2**i for i in range(8)
    }


def test_what_the_speeds_to_reach_need_comes_first():
    found = [(c.level, c.training, c.head_dim, c.length, c.top_k) for c in cases(FULL)]
    table = [1024 * n for n in (2, 4, 8, 32, 128)]
    rows = (("op", False), ("layer", False), ("op", True))
    assert found[:15] == [(*row, 64, length, 1) for row in rows for length in table]
    assert found[15:17] == [("op", False, head_dim, 16_384, 1) for head_dim in (64, 128)]
    assert found[17:19] == [("step", True, 64, length, 1) for length in (2048, 16_384)]


def test_layers_are_timed_with_the_kernels_that_were_best_in_the_op():
    known = {("gqe", "cudnn"): {}, ("dense", "tokamax"): {"implementation": "triton"}}
    assert [entry[:3] for entry in whole.variants("gpu", known)] == [
        ("default", "gqe", {}),
        ("cudnn", "gqe", {}),
        ("tokamax", "gqa", {"implementation": "triton"}),
    ]
    names = [entry[0] for entry in whole.variants("gpu", {})]
    assert names == ["default", "pallas_gpu", *(peer.name for peer in peers("gpu"))]


def test_a_dense_layer_attends_by_the_peer():
    config = AttentionConfig(embed_dim=16, num_query_experts=4, num_kv_heads=2, variant="gqa")
    x = jax.random.normal(jax.random.key(0), (2, 8, 16))

    def attend(implementation):
        layer = GroupedQueryAttention(config, implementation=implementation, rngs=nnx.Rngs(0))
        return layer(x)[0]

    expected = attend("reference")
    peer = next(peer for peer in peers("cpu") if peer.name == "jax.nn")
    found = attend(functools.partial(peer.attention, {}))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    wrong = dataclasses.replace(peer, attend=lambda q, k, v: 0 * q)
    np.testing.assert_array_equal(attend(functools.partial(wrong.attention, {})), 0)


def test_selected_queries_are_those_of_the_selected_experts():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 5, 6)), rng.normal(size=(6, 3, 4, 2))
    index = np.argsort(rng.random((2, 5, 3, 4)), axis=-1)[..., :2]
    every = np.einsum("ble,egmd->blgmd", x, kernel)
    expected = np.take_along_axis(every, index[..., None], axis=3)
    arguments = (jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), jnp.asarray(index))
    for project in (experts.selected_queries, experts.all_queries):
        np.testing.assert_allclose(project(*arguments), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        SpeedCase("layer", False, 32, 2, 8),
        SpeedCase("projection", True, 32, 2, 8, experts_per_group=4, sides=("selected", "all")),
    ],
    ids=lambda case: case.level,
)
def test_a_case_is_timed_and_recorded(case):
    scale = dataclasses.replace(SMALL, tokens=64, matmul=32, seconds=1e-4)
    found = prefill.contenders(scale, "cpu", case, {})
    found = [one for one in found if one.name != "tokamax.ragged_dot"]
    outcomes = timing.time_contenders(
        [*found, matmul(32, jnp.dtype("float32"))],
        rounds=2,
        seconds=1e-9,
        flops_per_second=1.0,
        progress=lambda _: None,
    )
    record = document.record(case, outcomes, seconds=1.0)
    assert record["ratio"]["q1"] <= record["ratio"]["median"] <= record["ratio"]["q3"]
    assert all(one["error"] is None for one in record["contenders"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "1"], "rounds is 1; a spread needs at least 2"),
        (["--budget-minutes", "-2"], "budget_minutes is -2.0; it must be positive"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        prefill.main(arguments)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
