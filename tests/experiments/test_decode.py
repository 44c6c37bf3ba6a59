"""The benchmark of decoding: it runs, and its ratios are those of the rounds."""

import pytest

from experiments import decode
from gqe_jax import AttentionConfig, ModelConfig

CONFIG = ModelConfig(
    attention=AttentionConfig(embed_dim=16, num_query_experts=4, num_kv_heads=2),
    num_layers=1,
    mlp_dim=16,
    vocab_size=32,
    dtype="float32",
)


def test_a_model_decodes():
    decoder = decode.Decoder(CONFIG, batch=2, context=8, steps=2)
    assert decoder.run() > 0
    assert decoder.cache[0].length.tolist() == [8, 8]  # the next round finds the same cache


def test_ratios_are_those_of_the_rounds():
    speeds = {"gqe": iter([10.0, 20.0, 30.0]), "gqa": iter([5.0, 20.0, 60.0])}

    class Measured:
        def __init__(self, config, *_):
            self.run = lambda: next(speeds[config.attention.variant])

    result = decode.compare(CONFIG, batch=1, context=8, steps=1, rounds=3, decoder=Measured)
    assert result["tokens_per_second"]["gqe"] == {"q1": 15.0, "median": 20.0, "q3": 25.0}
    assert result["gqe_over_gqa"] == {"q1": 0.75, "median": 1.0, "q3": 1.5}


def test_one_round_has_no_spread(capsys):
    with pytest.raises(SystemExit):
        decode.main(["--rounds", "1"])
    assert "rounds is 1; a spread needs at least 2" in capsys.readouterr().err
