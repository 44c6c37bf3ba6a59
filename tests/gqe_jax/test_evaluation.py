"""Held-out scores against direct computations."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from flax import nnx

from gqe_jax.config import DataConfig, MeshConfig
from gqe_jax.data import Corpus, DataError
from gqe_jax.evaluation import evaluate
from gqe_jax.evaluation.trigram import trigram_held_out
from gqe_jax.sharding import make_mesh
from gqe_jax.training.steps import make_steps
from tests.gqe_jax.runs import make_corpus, small_config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus.open(make_corpus(tmp_path_factory.mktemp("corpus")))


def test_loss_equals_the_logits_of_each_window(corpus, tmp_path):
    config = dataclasses.replace(
        small_config(corpus.directory, tmp_path), mesh=MeshConfig(data=2, fsdp=2, tensor=2)
    )
    steps = make_steps(config, make_mesh(config.mesh))
    params = steps.layout.init().params
    options = {"batch_size": 8, "sequence_length": 32}
    result = evaluate(steps, params, corpus.validation, DataConfig(), **options)

    model = nnx.merge(steps.layout.graphdef, jax.device_get(params))
    stream = corpus.validation.read(0, len(corpus.validation))
    nats = 0.0
    logits_of = nnx.jit(lambda model, tokens: model.logits(model(tokens)[0]))
    for start in range(0, len(stream) - 1, 32):
        window = stream[start : start + 33]
        logits = np.asarray(logits_of(model, window[None, :-1])[0], np.float64)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        nats -= logits[np.arange(len(window) - 1), window[1:]].sum()
    assert result.tokens == len(stream) - 1
    assert result.loss == pytest.approx(nats / result.tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    share = corpus.validation.info.num_bytes / corpus.validation.info.num_tokens
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) / share)

    assert (
        evaluate(steps, params, corpus.validation, DataConfig(), **options, stop=lambda: True)
        is None
    )


def test_trigram_model_equals_a_plain_one(corpus):
    """Witten-Bell by dictionaries, one token at a time."""
    stream = corpus.train.read(0, len(corpus.train)).tolist()
    counts = {}
    for order in range(3):
        for i in range(order, len(stream)):
            follow = counts.setdefault(tuple(stream[i - order : i]), {})
            follow[stream[i]] = follow.get(stream[i], 0) + 1

    def probability(context, token):
        lower = probability(context[1:], token) if context else 1 / 256
        follow = counts.get(context)
        if not follow:
            return lower
        total, distinct = sum(follow.values()), len(follow)
        return (follow.get(token, 0) + distinct * lower) / (total + distinct)

    scored = corpus.validation.read(0, len(corpus.validation)).tolist()
    nats = -math.log(probability((scored[0],), scored[1]))
    for i in range(2, len(scored)):
        nats -= math.log(probability((scored[i - 2], scored[i - 1]), scored[i]))
    result = trigram_held_out(corpus.train, corpus.validation)
    assert result.loss == pytest.approx(nats / (len(scored) - 1), rel=1e-9)
    for context in itertools.islice(counts, 5):
        assert sum(probability(context, t) for t in range(256)) == pytest.approx(1.0)


@pytest.mark.wrong_types
def test_trigram_model_takes_bytes_only(corpus):
    info = dataclasses.replace(corpus.train.info, max_token=300)
    split = type("Split", (), {"info": info, "read": corpus.train.read, "__len__": lambda _: 9})()
    with pytest.raises(DataError, match="takes a corpus of bytes"):
        trigram_held_out(split, corpus.validation)
