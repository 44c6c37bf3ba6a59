"""The model interface of EleutherAI's lm-evaluation-harness; needs the extra `eval`.

Requests are sorted by length and batched with lengths rounded up to powers of two, so that few
shapes are compiled. Every process receives all requests and computes its rows of each batch; to the
harness the job looks like one process.
"""

import functools
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gqe_jax.config import ConfigError
from gqe_jax.data.tokenizers import encode_prompt
from gqe_jax.generation import Generator, Sampling, stream_text
from gqe_jax.model.transformer import Transformer
from gqe_jax.runs import RestoredRun
from gqe_jax.sharding import RULES, OnMesh, batch_sharding, global_batch, local_rows
from gqe_jax.training.loss import chunked_scores

_SHORTEST = 32


def continuation_scores(
    model: Transformer,
    tokens: Int[Array, "batch length"],
    targets: Int[Array, "batch length"],
    counts: Bool[Array, "batch length"],
) -> tuple[Float[Array, "batch"], Bool[Array, "batch"]]:
    """Log-likelihood of each row's targets where `counts`, and whether all of them are greedy."""
    hidden, _, _ = model(tokens)
    sums, misses = chunked_scores(hidden, model.logit_table, targets, counts)
    return sums, misses == 0


class HarnessModel(TemplateLM):
    """The harness's interface to a run.

    Args:
      run: the model, its mesh and tokenizer.
      batch_size: rows per batch over all devices; rounded up to a multiple of the batch shards.
      max_length: maximum tokens of context and continuation; contexts are truncated on the left,
        continuations never. Generated text may exceed it.
    """

    def __init__(self, run: RestoredRun, *, batch_size: int, max_length: int):
        super().__init__()
        self._run = run
        self._mesh = run.mesh
        self._text_tokenizer = run.tokenizer
        shards = int(np.prod([run.mesh.shape[name] for name in RULES["batch"]]))
        self._batch_size = -(-batch_size // shards) * shards
        self.max_length = max_length
        graphdef, self._params = nnx.split(run.model)
        whole = NamedSharding(run.mesh, PartitionSpec())

        @functools.partial(jax.jit, out_shardings=whole)
        def score(params, tokens, targets, counts):
            return continuation_scores(nnx.merge(graphdef, params), tokens, targets, counts)

        self._score = OnMesh(run.mesh, score)

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token."""
        return self._text_tokenizer.end_of_document

    @property
    def prefix_token_id(self) -> int:
        """What precedes a text without context: BOS, or without one the end of a document."""
        return self._text_tokenizer.special.start

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator(self._run.model, self._mesh)

    def tok_encode(self, string: str, add_special_tokens=None, **kwargs) -> list[int]:
        """Token ids, with BOS as `encode_prompt` has it; `add_special_tokens=False`: without."""
        if add_special_tokens is False:
            return self._text_tokenizer.encode_batch([string])[0].tolist()
        return encode_prompt(self._text_tokenizer, string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        sequences = []
        for _, context, continuation in requests:
            # The harness moves trailing spaces to the continuation, which may empty the context.
            context = context or [self.prefix_token_id]
            kept = max(self.max_length + 1, len(continuation) + 1)
            sequences.append(((context + continuation)[-kept:], len(continuation)))
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with _progress(len(requests), "loglikelihood") as bar:
            for length, members in _batches(
                [len(sequence) - 1 for sequence, _ in sequences], self._batch_size
            ):
                arrays = _pad([sequences[i] for i in members], self._batch_size, length)
                sums, greedy = jax.device_get(self._score(self._params, *self._share(arrays)))
                for row, i in enumerate(members):
                    answers[i] = float(sums[row]), bool(greedy[row])
                bar.update(len(members))
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts; windows of `max_length` predict each token once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop sequence; greedy unless the task samples."""
        contexts = [
            (self.tok_encode(request.args[0]) or [self.prefix_token_id])[-self.max_length :]
            for request in requests
        ]
        arguments: list[Any] = [request.args for request in requests]  # (context, options)
        options = [_options(gen_kwargs) for _, gen_kwargs in arguments]
        texts = [""] * len(requests)
        by_options = sorted(range(len(requests)), key=lambda i: repr(options[i]))
        with _progress(len(requests), "generate_until") as bar:
            for _, group in itertools.groupby(by_options, key=lambda i: repr(options[i])):
                group = list(group)
                lengths = [len(contexts[i]) for i in group]
                for _, members in _batches(lengths, self._batch_size):
                    rows = [group[i] for i in members]
                    self._generate(rows, contexts, options[rows[0]], texts)
                    bar.update(len(rows))
        return texts

    def _generate(self, rows, contexts, options, texts) -> None:
        padded = rows + rows[-1:] * (self._batch_size - len(rows))  # the same shape for all batches
        pieces = stream_text(
            self._generator,
            self._text_tokenizer,
            [contexts[i] for i in padded],
            max_tokens=options["max_gen_toks"],
            sampling=_sampling(options),
            rows=padded,
            stop=options["until"],
        )
        for row, piece in pieces:
            if row < len(rows):
                texts[rows[row]] += piece

    def _share(self, arrays):
        sharding = batch_sharding(self._mesh)
        rows = local_rows(sharding, self._batch_size)
        mine = [array[rows] for array in arrays]
        return global_batch(sharding, self._batch_size, mine)


def _options(given: dict) -> dict[str, Any]:
    """A task's `generation_kwargs` with the harness's defaults; what is null is not given.

    Raises:
      ConfigError: a value is of the wrong type.
    """
    try:
        options: dict[str, Any] = dict(
            normalize_gen_kwargs({k: v for k, v in given.items() if v is not None})
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"generation_kwargs is {given!r}; correct the task: {error}") from None
    if options["max_gen_toks"] < 1 or not all(isinstance(s, str) for s in options["until"]):
        raise ConfigError(
            f"generation_kwargs is {given!r}; correct the task: until must be strings, and the "
            "number of tokens positive"
        )
    return options


def _sampling(options: dict[str, Any]) -> Sampling:
    """A task's sampling; without a temperature that of `transformers`, 1."""
    if not options["do_sample"]:
        return Sampling()
    try:
        top_k = int(options.get("top_k") or 0) or None
        top_p = float(options.get("top_p") or 1.0)
        return Sampling(float(options.get("temperature", 1.0)), top_k, top_p)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"generation_kwargs has {options!r}; correct the task: {error}") from None


def _batches(lengths: Sequence[int], batch_size: int):
    """Yields (padded length, request indices) per batch, the longest first."""
    padded = [max(_SHORTEST, 1 << (length - 1).bit_length()) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for length, group in itertools.groupby(order, key=lambda i: padded[i]):
        for members in itertools.batched(group, batch_size):
            yield length, list(members)


def _pad(sequences: Sequence[tuple[list[int], int]], batch_size: int, length: int):
    """Inputs, targets and the mask of scored targets, [batch_size, length], right-padded."""
    tokens, targets = (np.zeros((batch_size, length), np.int32) for _ in range(2))
    counts = np.zeros((batch_size, length), bool)
    for row, (sequence, scored) in enumerate(sequences):
        end = len(sequence) - 1
        tokens[row, :end], targets[row, :end] = sequence[:-1], sequence[1:]
        counts[row, end - scored : end] = True
    return tokens, targets, counts


def _progress(total: int, what: str) -> tqdm.tqdm:
    hidden = jax.process_index() != 0 or not sys.stderr.isatty()
    return tqdm.tqdm(total=total, desc=what, unit="request", leave=False, disable=hidden)
