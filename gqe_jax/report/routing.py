"""The experts that a run's checkpoint chooses for each token of a text."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from gqe_jax.config import AttentionConfig, MeshConfig
from gqe_jax.data import DataError, open_corpus
from gqe_jax.data.tokenizers import Tokenizer
from gqe_jax.sharding import batch_sharding, check_divides, make_mesh
from gqe_jax.training.checkpoint import Checkpoints
from gqe_jax.training.steps import make_steps

END_OF_DOCUMENT = "␄"


@dataclasses.dataclass(frozen=True)
class RoutedText:
    """A text's tokens, and how a checkpoint routes them."""

    config: AttentionConfig
    step: int
    """Of the checkpoint."""
    tokens: Int[np.ndarray, "token"]
    texts: list[str]
    """What each token adds to the text: nothing, where it only begins a character."""
    expert_index: Int[np.ndarray, "layer token group k"]
    router_probs: Float[np.ndarray, "layer token group expert"]


def route_text(
    run_dir: str | os.PathLike,
    text: str | None = None,
    *,
    step: int | Literal["latest", "best"] = "latest",
    max_tokens: int = 4096,
    corpus: str | None = None,
    mesh: MeshConfig | None = None,
) -> RoutedText | None:
    """Runs a text through a run's checkpoint, in windows of the length that it was trained on.

    Args:
      run_dir: the run's directory.
      text: what is routed; None: the beginning of the corpus's held-out split.
      step: which checkpoint.
      max_tokens: what lies beyond is left out.
      corpus: for the tokenizer and the held-out text; None: the run's.
      mesh: of devices; None: a copy of the model on each.

    Returns:
      The routing; None for the dense baseline, which has none.

    Raises:
      CheckpointError: the run has no such checkpoint.
      ConfigError: the mesh does not fit the devices or the model.
      DataError: the corpus does not fit the model, or there is no text.
    """
    with Checkpoints(run_dir, read_only=True) as checkpoints:
        step = checkpoints.resolve(step)
        trained, _ = checkpoints.read_run(step)
        attention = trained.model.attention
        if attention.variant == "gqa":
            return None
        opened = open_corpus(corpus or trained.data.corpus, verify=False)
        tokenizer = opened.tokenizer()
        if text is None:
            tokens = opened.validation.read(0, max_tokens)
        else:
            (encoded,) = tokenizer.encode_batch([text])
            tokens = encoded[:max_tokens].astype(np.int32)
        if len(tokens) == 0:
            raise DataError("text is empty; give at least one token")
        if tokens.max() >= trained.model.vocab_size:
            raise DataError(
                f"corpus {opened.directory} gives the token id {tokens.max()}; the model of "
                f"{run_dir} has a vocabulary of {trained.model.vocab_size}: name the corpus that "
                "it was trained on"
            )
        devices = make_mesh(mesh or MeshConfig())
        length = min(trained.sequence_length, len(tokens))
        rows = -(-len(tokens) // length)
        rows += -rows % (devices.shape["data"] * devices.shape["fsdp"])
        run = dataclasses.replace(
            trained, batch_size=rows, sequence_length=length, accumulation_steps=1
        )
        check_divides(run, dict(devices.shape))
        steps = make_steps(run, devices)
        params = checkpoints.restore_params(step, steps.abstract_state, steps.state_sharding)

    padding = (0, rows * length - len(tokens))
    windows = np.pad(tokens, padding).reshape(rows, length)
    segments = np.pad(np.ones(len(tokens), np.int32), padding).reshape(rows, length)

    @jax.jit
    def forward(params, windows, segments):
        model = nnx.merge(steps.graphdef, params)
        _, aux, _ = model(windows, segment_ids=segments, return_routing=True)
        return aux.expert_index, aux.router_probs

    with jax.set_mesh(devices):
        inputs = jax.device_put((windows, segments), batch_sharding(devices))
        routing = jax.device_get(forward(params, *inputs))
    index, probs = (
        x.reshape(len(x), rows * length, *x.shape[3:])[:, : len(tokens)] for x in routing
    )
    return RoutedText(attention, step, tokens, token_texts(tokenizer, tokens), index, probs)


def token_texts(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text that the tokens before it decode to.

    A character of several tokens belongs to the last of them. The end of a document is shown as a
    symbol.
    """
    tokens = [int(token) for token in tokens]
    texts = []
    context = begin = 0  # decoded before, and not yet shown
    for end, token in enumerate(tokens, start=1):
        if token == tokenizer.end_of_document:
            texts.append(END_OF_DOCUMENT)
            context = begin = end
            continue
        known = tokenizer.decode(tokens[context:begin])
        text = tokenizer.decode(tokens[context:end])
        complete = not text.endswith("\N{REPLACEMENT CHARACTER}") or end - begin >= 4
        texts.append(text[len(known) :] if complete else "")
        if complete:
            context, begin = begin, end
    return texts
