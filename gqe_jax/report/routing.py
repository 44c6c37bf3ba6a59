"""The experts that a run's checkpoint selects for each token of a text."""

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
from gqe_jax.data.tokenizers import Tokenizer, encode_prompt
from gqe_jax.runs import Run
from gqe_jax.sharding import OnMesh, batch_sharding, check_divides, make_mesh

END_OF_DOCUMENT = "␄"


@dataclasses.dataclass(frozen=True)
class RoutedText:
    """The tokens of a text, and the experts that a checkpoint selects for each."""

    config: AttentionConfig
    step: int
    """The checkpoint's step."""
    tokens: Int[np.ndarray, "token"]
    texts: list[str]
    """The characters that each token completes; empty where it only begins one."""
    expert_index: Int[np.ndarray, "layer token group k"]
    router_probs: Float[np.ndarray, "layer token group expert"]


def route_text(
    run_dir: str | os.PathLike,
    text: str | None = None,
    *,
    step: int | Literal["latest", "best"] = "latest",
    max_tokens: int = 4096,
    corpus: str | None = None,
    end_of_document: str | None = None,
    mesh: MeshConfig | None = None,
) -> RoutedText | None:
    """Runs a text through a run's checkpoint, in windows of the length that it was trained on.

    Args:
      run_dir: the run's directory.
      text: the text to route; None: the beginning of the corpus's held-out split.
      step: a checkpoint's number, `latest` or `best`.
      max_tokens: maximum number of tokens; the rest of the text is dropped.
      corpus: the source of the tokenizer and the held-out text; None: the run's own.
      end_of_document: the token that ends a document; None: the tokenizer's.
      mesh: the device mesh; None: the run's, if it fits the devices.

    Returns:
      The routing; None for the dense baseline.

    Raises:
      CheckpointError: the run has no such checkpoint.
      ConfigError: the mesh does not fit the devices or the model.
      DataError: the corpus does not fit the model, or there is no text.
    """
    run = Run.find(run_dir, step)
    trained = run.config
    attention = trained.model.attention
    if attention.variant == "gqa":
        return None
    tokens, tokenizer = _read_tokens(run, text, max_tokens, corpus, end_of_document)
    devices = make_mesh(run.mesh(mesh))
    length = min(trained.sequence_length, len(tokens))
    if devices.shape["context"] > 1:  # its shards hold halves of windows
        length += -length % (2 * devices.shape["context"])
    rows = -(-len(tokens) // length)
    rows += -rows % (devices.shape["data"] * devices.shape["fsdp"])
    sizes = {"batch_size": rows, "sequence_length": length, "accumulation_steps": 1}
    check_divides(dataclasses.replace(trained, **sizes), dict(devices.shape))
    padding = (0, rows * length - len(tokens))
    windows = np.pad(tokens, padding).reshape(rows, length)
    segments = np.pad(np.ones(len(tokens), np.int32), padding).reshape(rows, length)

    graphdef, params = run.load(devices)

    def forward(params, windows, segments):
        model = nnx.merge(graphdef, params)
        _, aux, _ = model(windows, segment_ids=segments, return_routing=True)
        return aux.expert_index, aux.router_probs

    inputs = jax.device_put((windows, segments), batch_sharding(devices))
    routing = jax.device_get(OnMesh(devices, jax.jit(forward))(params, *inputs))
    index, probs = (
        x.reshape(len(x), rows * length, *x.shape[3:])[:, : len(tokens)] for x in routing
    )
    return RoutedText(attention, run.step, tokens, token_texts(tokenizer, tokens), index, probs)


def _read_tokens(
    run: Run, text: str | None, max_tokens: int, corpus: str | None, end_of_document: str | None
) -> tuple[Int[np.ndarray, "token"], Tokenizer]:
    """Returns the tokens of the text, or of held-out text, and the tokenizer.

    A run that has its own tokenizer needs no corpus to route a text.
    """
    opened = None
    if text is None or corpus is not None:
        opened = open_corpus(corpus or run.config.data.corpus, verify=False)
    if opened is None or corpus is None:
        tokenizer = run.tokenizer(end_of_document=end_of_document)
    else:
        tokenizer = opened.tokenizer()
    if text is not None:
        tokens = np.array(encode_prompt(tokenizer, text)[:max_tokens], np.int32)
    else:
        assert opened is not None
        tokens = opened.validation.read(0, max_tokens)
    if len(tokens) == 0:
        raise DataError("text is empty; give at least one token")
    if tokens.max() >= run.config.model.vocab_size:
        source = run.directory if opened is None else f"corpus {opened.directory}"
        raise DataError(
            f"{source} gives the token id {tokens.max()}; the model of {run.directory} has a "
            f"vocabulary of {run.config.model.vocab_size}: name the corpus that it was trained on"
        )
    return tokens, tokenizer


def token_texts(tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray) -> list[str]:
    """Returns the characters that each token completes, given the tokens before it.

    A character of several tokens belongs to the last of them. An end-of-document token becomes a
    symbol.
    """
    tokens = [int(token) for token in tokens]
    texts = []
    context = begin = 0  # first token decoded, first not shown
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
