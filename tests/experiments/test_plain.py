"""The plain layer computes what this project's dense layer computes; the command that counts it."""

import functools
import pathlib
import re
import shlex

import jax
import pytest
from flax import nnx
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from experiments.cycles import read_command
from experiments.plain import BLOCKS, PlainAttention, blocks_of
from gqe_jax import AttentionConfig, ConfigError
from gqe_jax.model.attention import make_attention
from tests.gqe_kernels.contract import assert_close

CONFIG = AttentionConfig(
    variant="gqa", embed_dim=32, num_query_experts=4, num_kv_heads=2, head_dim=128
)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((), id="512", marks=pytest.mark.slow),
        pytest.param((256, 128, 128, 128, 256, 128), id="given"),
    ],
)
def test_it_equals_the_dense_layer(sizes, monkeypatch):
    make = splash_attention_kernel.make_splash_mha_single_device
    interpreted = functools.partial(make, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha_single_device", interpreted)
    plain = PlainAttention(CONFIG, blocks_of(sizes, 256), dtype="float32", rngs=nnx.Rngs(0))
    dense = make_attention(CONFIG, rngs=nnx.Rngs(1))
    for name in ("query", "key", "value", "out"):
        kernel = getattr(dense, name).kernel
        kernel[...] = getattr(plain, name).kernel[...].reshape(kernel.shape)
    x = jax.random.normal(jax.random.key(0), (2, 256, CONFIG.embed_dim))
    y, pullback = jax.vjp(plain, x)
    expected, expected_pullback = jax.vjp(lambda x: dense(x)[0], x)
    assert_close(y, expected, 1e-4, "output")
    assert_close(pullback(expected)[0], expected_pullback(expected)[0], 1e-4, "gradient of x")


def test_blocks_are_cut_to_the_length():
    assert set(blocks_of((), 4096).values()) == {512}
    assert len(blocks_of((), 4096)) == len(BLOCKS) + 2  # dQ has a kernel of its own
    assert blocks_of((2048, 512, 256, 1024, 2048, 1024), 1024)["block_q"] == 1024
    with pytest.raises(ConfigError, match="each must divide 768 tokens"):
        blocks_of((512,) * 6, 768)


PODS = pathlib.Path(__file__).parents[2] / "docs" / "pods.md"
COMMANDS = re.findall(
    r"^python -m experiments\.cycles (.*?)(?:  #.*)?$", PODS.read_text(), re.MULTILINE
)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_document_have_flags_that_exist(command):
    read = read_command(shlex.split(command))
    assert command.count("--splash-blocks") == bool(read.options.splash_blocks)


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--splash-blocks 512 512", "six positive sizes"), ("--length 5000", "it must divide tokens")],
)
def test_bad_options_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        read_command(shlex.split(f"gqe_250m v5e:2x2 --layer True {flags}"))
    assert message in capsys.readouterr().err
