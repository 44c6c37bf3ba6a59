"""A baseline for byte models: trigrams with interpolated Witten-Bell smoothing.

    python -m gqe_jax.evaluation.trigram --corpus stdlib

Counts the trigrams of a byte corpus's training split and scores the held-out split as one stream.
"""

import dataclasses
import sys

import numpy as np

from gqe_jax.commands import parse, run_command
from gqe_jax.data import DataError, Split, open_corpus
from gqe_jax.evaluation.perplexity import HeldOut

_BYTES = 256


def _interpolate(counts: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Interpolated Witten-Bell probabilities (Witten and Bell 1991, method C).

    Args:
      counts: [..., context, token].
      lower: probabilities given the shorter context, broadcastable to `counts`.
    """
    total = counts.sum(axis=-1, keepdims=True)
    distinct = np.count_nonzero(counts, axis=-1, keepdims=True)
    return np.where(total > 0, (counts + distinct * lower) / np.maximum(total + distinct, 1), lower)


def trigram_held_out(train: Split, validation: Split) -> HeldOut:
    """Loss of a byte trigram model on the held-out split, from its second byte on.

    Raises:
      DataError: the tokens are not bytes.
    """
    tokens = train.read(0, len(train))
    scored = validation.read(0, len(validation))
    if max(train.info.max_token, validation.info.max_token) >= _BYTES:
        raise DataError("corpus has tokens above 255; the trigram model takes a corpus of bytes")
    context = tokens[:-2] * _BYTES + tokens[1:-1]
    trigrams = np.bincount(context * _BYTES + tokens[2:], minlength=_BYTES**3)
    bigrams = np.bincount(tokens[:-1] * _BYTES + tokens[1:], minlength=_BYTES**2)
    unigrams = np.bincount(tokens, minlength=_BYTES)

    unigram = _interpolate(unigrams, np.full(_BYTES, 1 / _BYTES))
    bigram = _interpolate(bigrams.reshape(_BYTES, _BYTES), unigram)
    trigram = _interpolate(trigrams.reshape(_BYTES, _BYTES, _BYTES), bigram)
    second = bigram[scored[0], scored[1]]  # the second byte has one byte of context
    rest = trigram[scored[:-2], scored[1:-1], scored[2:]]
    nats = -np.log(second) - np.log(rest).sum()
    return HeldOut.of(float(nats), float(len(scored) - 1), validation)


@dataclasses.dataclass(frozen=True)
class TrigramConfig:
    """Evaluate the trigram baseline."""

    corpus: str = "stdlib"
    """`stdlib`, or a directory written by `python -m gqe_jax.data.prepare --tokenizer byte`."""


def main() -> None:
    """Runs the command line."""
    config = parse(TrigramConfig, sys.argv[1:], prog="trigram", description=__doc__)
    corpus = run_command(lambda: open_corpus(config.corpus))
    result = run_command(lambda: trigram_held_out(corpus.train, corpus.validation))
    print(f"{result.bits_per_byte:.4f} bits per byte on {result.tokens:,} held-out tokens")


if __name__ == "__main__":
    main()
