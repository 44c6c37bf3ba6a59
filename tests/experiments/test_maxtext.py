"""MaxText's step beside ours: its configuration, what its kernels visit, and its products."""

import importlib.util
import pathlib
import re
import shlex

import numpy as np
import pytest

from experiments import maxtext
from experiments.maxtext import MaxTextOptions, compare, fields, read_command, splash_runs_of
from gqe_jax.config import ConfigError
from gqe_kernels.cycles.counting import call_cycles
from tests.gqe_kernels.test_cycles import COPIES, LOOP, OUTSIDE, STEP, schedule

HERE = importlib.util.find_spec("maxtext") is not None
MESH = {"data": 4, "fsdp": 2, "context": 1, "tensor": 2}
SMALL = ["gqa_250m", "v5e:2x2", "--batch-size", "8", "--sequence-length", "256"]
SMALL += ["--model.num-layers", "2", "--model.mlp-dim", "256", "--model.vocab-size", "512"]
SMALL += ["--model.attention.embed-dim", "256", "--model.attention.num-query-experts", "4"]
SMALL += ["--model.attention.num-kv-heads", "2", "--mesh.data", "4", "--remat", "full"]


def test_the_geometry_is_that_of_the_configuration():
    arguments = ["gqe_7b", "v5e:16x16", "--batch-size", "256", "--accumulation-steps", "2"]
    run = read_command(arguments).run
    found = dict(each.split("=", 1) for each in fields(run, MESH, MaxTextOptions(remat="full")))
    expected = {
        "base_emb_dim": 4096,
        "base_num_decoder_layers": 32,
        "base_num_query_heads": 32,
        "base_num_kv_heads": 8,
        "head_dim": 128,
        "base_mlp_dim": 14336,
        "vocab_size": 32768,
        "rope_max_timescale": 500_000,
        "max_target_length": 4096,
        "ici_data_parallelism": 4,
        "ici_fsdp_parallelism": 2,
        "ici_tensor_parallelism": 2,
        "internal_compile_num_devices": 16,
        "gradient_accumulation_steps": 2,
        "per_device_batch_size": 8.0,  # 256 sequences in two parts, over 16 chips
        "remat_policy": "full",
        "sa_block_q": 512,
        "sa_block_kv_dq": 512,
        "sa_use_fused_bwd_kernel": False,
    }
    assert {name: found[name] for name in expected} == {
        name: str(value) for name, value in expected.items()
    }


PODS = pathlib.Path(__file__).parents[2] / "docs" / "pods.md"


@pytest.mark.parametrize(
    "command", re.findall(r"^python -m experiments\.maxtext (.*)", PODS.read_text(), re.MULTILINE)
)
def test_commands_of_the_document_have_flags_that_exist(command):
    found = read_command(shlex.split(command))
    mesh = found.run.mesh.sizes | {"data": 8}
    assert fields(found.run, mesh, found.options)


def test_blocks_are_cut_to_the_length():
    options = MaxTextOptions(splash_blocks=(2048, 512, 256, 1024, 2048, 1024))
    assert options.blocks(1024) == {
        "block_q": 1024,
        "block_kv": 512,
        "block_kv_compute": 256,
        "block_q_dkv": 1024,
        "block_kv_dkv": 1024,
        "block_kv_dkv_compute": 1024,
    }
    with pytest.raises(ConfigError, match="each must divide 768 tokens"):
        options.blocks(768)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--splash-blocks", "512", "512"], "must be six positive sizes"),
        (["--remat", "keep_dots"], "minimal_with_context"),
        (["--mesh.context", "2"], r"are \(2, False, 'none'\).*must be \(1, False, 'none'\)"),
        (["--model.attention.qk-norm", "True"], r"\(1, True, 'none'\)"),
    ],
)
def test_what_maxtext_has_not_is_named(flags, message, capsys):
    arguments = ["gqa_250m", "v5e:2x2", *flags]
    if flags[0] in ("--splash-blocks", "--remat"):
        with pytest.raises(SystemExit):
            read_command(arguments)
        assert message in capsys.readouterr().err
        return
    run = read_command(arguments).run
    with pytest.raises(ConfigError, match=message):
        fields(run, {**MESH, "context": run.mesh.context}, MaxTextOptions())


@pytest.mark.parametrize("kernel", ["fwd_segmented_residuals", "dq_segmented", "dkv_segmented"])
def test_splash_attention_visits_what_its_mask_shows(kernel):
    arguments = ["gqa_250m", "v5e:4x4", "--batch-size", "32", "--sequence-length", "64"]
    run = read_command(arguments).run
    options = MaxTextOptions(splash_blocks=(8, 16, 8, 16, 8, 8))
    if kernel.startswith("dq"):
        options = MaxTextOptions()
    runs = splash_runs_of(run, MESH, options)(f"splash_mha_{kernel}", None)
    q, kv = {"fwd": (8, 16), "dkv": (16, 8), "dq": (64, 64)}[kernel.partition("_")[0]]
    seen = np.tril(np.ones((64, 64), bool)).reshape(64 // q, q, 64 // kv, kv).any((1, 3))
    rows, heads, kv_heads = 4, 8, 4  # 32 sequences over 8 chips, 16 heads over 2
    ends = kv_heads * seen.shape[1] if kernel.startswith("dkv") else heads * seen.shape[0]
    expected = {"grid": heads * seen.size, "init": ends, "run": heads * seen.sum(), "end": ends}
    assert runs == {name: rows * times for name, times in expected.items()}
    assert splash_runs_of(run, MESH, options)("another_kernel", None) is None


def test_regions_of_splash_attention_are_found_by_their_products():
    runs = {"grid": 32, "init": 8, "run": 20, "end": 8}
    program, tree = schedule(34, (10, False), (1000, True), (30, False))
    expected = OUTSIDE + 34 * (LOOP + COPIES + STEP) + 8 * 10 + 20 * 1000 + 8 * 30
    assert call_cycles(program, tree, runs, cores=1) == expected


@pytest.mark.skipif(HERE, reason="MaxText is installed")
@pytest.mark.libtpu
def test_a_missing_maxtext_comes_with_its_installation():
    with pytest.raises(maxtext.UserError, match=r"pip install --no-deps --target DIR maxtext"):
        compare(read_command(SMALL))


@pytest.mark.skipif(not HERE, reason="needs MaxText: python -m experiments.maxtext says how")
@pytest.mark.libtpu
def test_the_products_are_those_of_the_geometry():
    said = []
    (counted,) = compare(read_command(SMALL), said.append)
    tokens, width, mlp, vocab = 2 * 256, 256, 256, 512
    # Queries, keys, values and the output of 4 heads of 64 in 2 groups; three products of the MLP.
    weights = 2 * (width * (256 + 128 + 128) + 256 * width + 3 * width * mlp)
    # Forward, the same again, and two products backward; the last block may not run again. The
    # logits' three.
    flops = counted.xla.total.flops
    assert 3 <= (flops / (2 * tokens) - 3 * width * vocab) / weights <= 4
    assert {kernel.name.split("_")[2] for kernel in counted.kernels} == {"fwd", "dq", "dkv"}
    assert "temporaries" in said[0]
