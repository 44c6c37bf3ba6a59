"""Loss on held-out text: nats a token, perplexity, bits a byte."""

import dataclasses
import math
import sys
from collections.abc import Callable

import jax
import numpy as np
import tqdm
from flax import nnx

from gqe_jax.config import DataConfig
from gqe_jax.data import Split, evaluation_batches
from gqe_jax.sharding import batch_sharding, global_batch, local_rows
from gqe_jax.training.steps import Steps


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Result of an evaluation."""

    loss: float
    """Mean cross-entropy of a token, nats."""
    perplexity: float
    bits_per_byte: float
    """Of the text in UTF-8; the tokens that end documents cost bits and count no bytes."""
    tokens: int
    """Tokens that were predicted."""

    @classmethod
    def of(cls, nats: float, tokens: float, split: Split) -> "HeldOut":
        """From sums over tokens of `split`, or of a part of it, of as many bytes a token."""
        loss = nats / tokens
        bytes_per_token = split.info.num_bytes / split.info.num_tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return cls(loss, perplexity, loss / math.log(2) / bytes_per_token, round(tokens))


def evaluate(
    steps: Steps,
    params: nnx.State,
    split: Split,
    config: DataConfig,
    *,
    batch_size: int,
    sequence_length: int,
    limit: int | None = None,
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> HeldOut | None:
    """Scores consecutive windows of a split.

    Args:
      steps: the compiled functions.
      params: the model's parameters on the mesh of `steps`.
      split: what is scored; each token but the first is predicted once, from the start of its
        window on.
      config: how it is read.
      batch_size, sequence_length: of a batch over all devices.
      limit: the most batches; None: all.
      progress: show a bar if the error stream is a terminal.
      stop: asked before each batch; True ends the evaluation without a result.
    """
    sharding = batch_sharding(steps.mesh)
    count, batches = evaluation_batches(
        split,
        config,
        rows=local_rows(sharding, batch_size),
        batch_size=batch_size,
        sequence_length=sequence_length,
        limit=limit,
    )
    hidden = not (progress and sys.stderr.isatty())
    sums = []
    for batch in tqdm.tqdm(batches, total=count, unit="batch", leave=False, disable=hidden):
        if stop():
            return None
        sums.append(steps.eval_step(params, global_batch(sharding, batch_size, batch)))
    nats, tokens = np.array(jax.device_get(sums), np.float64).sum(axis=0)
    return HeldOut.of(float(nats), float(tokens), split)
