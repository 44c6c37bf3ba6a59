"""Loss on held-out text: nats per token, perplexity, bits per byte."""

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
    """The result of an evaluation."""

    loss: float
    """Mean cross-entropy, nats per token."""
    perplexity: float
    bits_per_byte: float
    """Bits per byte of UTF-8 text; BOS and end-of-document tokens add bits but no bytes. Of
    conversations, the text and the tokens are those of the answers."""
    tokens: int
    """Number of predicted tokens."""

    @classmethod
    def of(cls, nats: float, tokens: float, split: Split) -> "HeldOut":
        """From the summed loss of `tokens` tokens of `split`, at its mean bytes per token."""
        loss = nats / tokens
        bytes_per_token = split.info.num_bytes / (split.info.num_answers or split.info.num_tokens)
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
    """The loss on consecutive windows of a split.

    Args:
      steps: the compiled functions.
      params: the model's parameters on the mesh of `steps`.
      split: the text; each token but the first is predicted once, from its window's earlier tokens.
      config: options for reading the split.
      batch_size, sequence_length: the shape of a batch over all devices.
      limit: maximum number of batches; None: no limit.
      progress: show a progress bar if stderr is a terminal.
      stop: called before each batch; True ends the evaluation, which then returns None.
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
