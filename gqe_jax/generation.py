"""Text generation: chunked prefill, then batched decoding with the dense GQA cache.

    generator = Generator(model)
    for row, piece in stream_text(generator, tokenizer, ["def main"], max_tokens=100):
        print(piece, end="", flush=True)

Prompts of different lengths share a batch: each row is right-padded in the prefill and then decodes
at its own positions. A row's results do not depend on the other rows, and depend on the chunks, the
batch size and the mesh only through the rounding of sums. Greedy tokens differ only where two
logits, or two experts' probabilities, tie within that rounding.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from gqe_jax.config import ConfigError, MeshConfig
from gqe_jax.data.tokenizers import Tokenizer, encode_prompt
from gqe_jax.model.transformer import Transformer, unrolled
from gqe_jax.sharding import RULES, OnMesh, constrain, make_mesh, shardings

_CAPACITY_STEP = 128  # cache capacities are multiples of it, so that few shapes are compiled
_SHORTEST_CHUNK = 16
_SURROGATES = 0xD800


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Options for sampling a token from the logits."""

    temperature: float = 0.0
    """Divisor of the logits; 0: greedy, the most probable token."""
    top_k: int | None = None
    """Sample from the k most probable tokens and any that tie with the k-th; None: all."""
    top_p: float = 1.0
    """After top_k, sample from the smallest set of most probable tokens with this probability."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be >= 0")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; it must be positive, or None for all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


@functools.partial(jax.jit, static_argnames="sampling")
def sample(
    logits: Float[Array, "batch vocab"],
    sampling: Sampling,
    key: Array,
    row: Int[Array, "batch"],
    position: Int[Array, ""],
) -> Int[Array, "batch"]:
    """Samples one token per row; its randomness depends only on `key`, its `row` and `position`."""
    if sampling.temperature < jnp.finfo(jnp.float32).tiny:  # 0 in float32
        return jnp.argmax(logits, axis=-1)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        more_probable = jnp.cumsum(probability, axis=-1) - probability
        kept = more_probable < sampling.top_p
        least = jnp.min(ordered, axis=-1, keepdims=True, where=kept, initial=jnp.inf)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), position))(row)
    return jax.vmap(jax.random.categorical)(keys, logits)


class Generator:
    """Generates tokens with a model; compiles once for each shape of batch, chunk and cache.

    Args:
      model: the model; its parameters are copied, unstacked by layer, in the computation dtype.
      mesh: the device mesh, from `sharding.make_mesh`; None: one device.
      chunk_size: tokens per row and prefill step.

    Raises:
      ConfigError: `chunk_size` is not positive.
    """

    def __init__(self, model: Transformer, mesh: Mesh | None = None, *, chunk_size: int = 256):
        if chunk_size < 1:
            raise ConfigError(f"chunk_size is {chunk_size}; it must be positive")
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:1]) if mesh is None else mesh
        self.chunk_size = chunk_size
        self._vocab_size = model.config.vocab_size
        self._embed_dim = model.config.embed_dim
        self._dtype = jnp.dtype(model.config.dtype)
        trained, params = nnx.split(model)
        unroll = lambda params: nnx.state(unrolled(nnx.merge(trained, params)))  # noqa: E731
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: unrolled(nnx.merge(trained, params))))
        layout = shardings(jax.eval_shape(unroll, params), self.mesh)
        whole = NamedSharding(self.mesh, PartitionSpec())
        self._params = OnMesh(self.mesh, jax.jit(unroll, out_shardings=layout))(params)

        @functools.partial(jax.jit, static_argnums=(1, 2))
        def create(params, batch, capacity):
            cache = nnx.merge(graphdef, params).create_cache(batch, capacity)
            axes = {1: ("batch",), 3: ("batch", None, None), 4: ("batch", "group", None, None)}
            return jax.tree.map(lambda x: constrain(x, *axes[x.ndim]), cache)

        @functools.partial(jax.jit, donate_argnums=(3, 4))
        def prefill(params, tokens, count, last, cache):
            is_token = jnp.arange(tokens.shape[1]) < count[:, None]
            hidden, _, cache = nnx.merge(graphdef, params)(
                tokens, segment_ids=is_token.astype(jnp.int32), cache=cache
            )
            index = jnp.maximum(count - 1, 0)[:, None, None]
            ending = jnp.take_along_axis(hidden, index, axis=1)[:, 0]
            return jnp.where(count[:, None] > 0, ending, last), cache

        @jax.jit
        def logits(params, hidden):
            return nnx.merge(graphdef, params).logits(hidden[:, None])[:, 0]

        @functools.partial(jax.jit, donate_argnums=3)
        def decode(params, token, active, cache):
            hidden, _, cache = nnx.merge(graphdef, params)(
                token[:, None], segment_ids=active[:, None].astype(jnp.int32), cache=cache
            )
            return logits(params, hidden[:, 0]), cache

        choose = jax.jit(sample, static_argnames="sampling", out_shardings=whole)
        self._create, self._prefill, self._logits, self._decode, self._sample = (
            OnMesh(self.mesh, f) for f in (create, prefill, logits, decode, choose)
        )

    def stream(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        *,
        max_tokens: int,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        rows: Sequence[int] | None = None,
        end_of_document: int | Collection[int] | None = None,
        stop: Callable[[int, int], bool] = lambda row, token: False,
    ) -> Iterator[tuple[int, int]]:
        """Continues the prompts as one batch, and yields each row's tokens as they are generated.

        Args:
          prompts: token ids, at least one each.
          max_tokens: maximum number of new tokens per row.
          sampling, seed: how tokens are sampled.
          rows: a number per prompt that seeds its randomness, so that a prompt of a long list gets
            the same samples in any batch; None: 0, 1, …
          end_of_document: the token, or the tokens, that end a row and are not yielded; None: no
            such token.
          stop: called with the row and the token after each yield; True ends that row.

        Yields:
          (row, token).

        Raises:
          ConfigError: a prompt is empty, or has an id that the model has not.
        """
        if len(prompts) == 0:
            return
        for row, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ConfigError(
                    f"prompt {row} is empty; give it a token, such as end_of_document"
                )
            unknown = [token for token in prompt if not 0 <= token < self._vocab_size]
            if unknown:
                raise ConfigError(
                    f"prompt {row} has the token id {unknown[0]}; the model has the ids 0 to "
                    f"{self._vocab_size - 1}: use the tokenizer that it was trained with"
                )
        ends = (end_of_document,) if isinstance(end_of_document, int) else end_of_document or ()
        shards = int(np.prod([self.mesh.shape[name] for name in RULES["batch"]]))
        batch = _round_up(len(prompts), shards)
        number = np.arange(batch) if rows is None else np.pad(rows, (0, batch - len(prompts)))
        key = jax.random.key(seed)
        logits, cache = self._start(prompts, batch, max_tokens)
        following = token = self._sample(logits, sampling, key, number, 0)
        active = np.arange(batch) < len(prompts)
        for step in range(1, max_tokens + 1):
            if step < max_tokens:  # dispatched before the host waits for the current token
                logits, cache = self._decode(self._params, token, active.copy(), cache)
                following = self._sample(logits, sampling, key, number, step)
            tokens = np.asarray(token)
            for row in np.flatnonzero(active).tolist():
                value = int(tokens[row])
                if value in ends:
                    active[row] = False
                    continue
                yield row, value
                active[row] = not stop(row, value)
            if step == max_tokens or not active.any():
                return
            token = following

    def _start(self, prompts, batch, max_tokens):
        """Prefills the cache in chunks; returns the logits after each prompt, and the cache."""
        longest = max(map(len, prompts))
        chunk = min(self.chunk_size, max(_SHORTEST_CHUNK, 1 << (longest - 1).bit_length()))
        length = _round_up(longest, chunk)
        tokens, lengths = np.zeros((batch, length), np.int32), np.zeros(batch, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        capacity = _round_up(max(longest + max_tokens, chunk), _CAPACITY_STEP)
        cache = self._create(self._params, batch, capacity)
        last = jnp.zeros((batch, self._embed_dim), self._dtype)
        for start in range(0, length, chunk):
            count = np.clip(lengths - start, 0, chunk)
            part = tokens[:, start : start + chunk]
            last, cache = self._prefill(self._params, part, count, last, cache)
        return self._logits(self._params, last), cache


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


class TextStream:
    """Decodes the tokens of one row incrementally, up to a stop sequence.

    Holds back the bytes of an incomplete character, and text that may be the beginning of a stop
    sequence. Tokens are decoded together with those before them, since some decoders treat the
    first token differently: drop the space before it, for example.

    Args:
      decode: maps tokens to text, with U+FFFD for incomplete characters.
      stop: sequences that end the text; they are not part of it. They may contain special tokens,
        which `decode` drops.
      prompt: the tokens before the row's; their text is not returned.
      special: the texts of the special tokens, by id.

    >>> text = TextStream(lambda tokens: bytes(tokens).decode(errors="replace"), stop=["\\n\\n"])
    >>> [text.push(token) for token in "né\\n\\nx".encode()]
    ['n', '', 'é', '', '', '']
    >>> text.stopped
    True
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str] = (),
        *,
        prompt: Sequence[int] = (),
        special: Mapping[int, str] = types.MappingProxyType({}),
    ):
        if "" in stop:
            raise ConfigError("stop is ''; a stop sequence must have at least one character")
        self._decode = decode
        # The special tokens of stop sequences are lone surrogates here, which no text contains.
        named = [token for token, text in special.items() if any(text in s for s in stop)]
        self._marks = {token: chr(_SURROGATES + i) for i, token in enumerate(named)}
        marked = list(stop)
        for token in sorted(named, key=lambda token: -len(special[token])):
            marked = [s.replace(special[token], self._marks[token]) for s in marked]
        self._stop = tuple(dict.fromkeys([*stop, *marked]))
        self._unmark = dict.fromkeys(map(ord, self._marks.values()))
        self._tokens = list(prompt)  # the tokens that are decoded together
        self._settled = len(self._tokens)  # how many of them are settled
        self._known = decode(self._tokens) if self._tokens else ""  # the text of the settled tokens
        self._waiting = ""  # settled text that is held back
        self._returned = 0  # characters returned since `_waiting` begins
        self.stopped = False

    def push(self, token: int) -> str:
        """Adds a token and returns the text that can be emitted now."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        text = self._waiting + self._new_text() + self._marks.get(token, "")
        end = min((i for s in self._stop if (i := text.find(s)) >= 0), default=None)
        if end is not None:
            self.stopped = True
            return text[self._returned : end].translate(self._unmark)
        whole = text.rstrip("\ufffd")
        ready = len(whole) - self._partial_stop_length(whole)
        piece = whole[self._returned : ready]
        self._returned = max(self._returned, ready)
        if whole == text and text != self._waiting:
            self._settle(text)
        return piece.translate(self._unmark)

    def finish(self) -> str:
        """The text that was held back, at the end of the row."""
        if self.stopped:
            return ""
        return (self._waiting + self._new_text())[self._returned :].translate(self._unmark)

    def _new_text(self) -> str:
        """The text of the tokens that are not settled."""
        text = self._decode(self._tokens)
        # The last character of a prompt may be one that the first tokens complete.
        known = self._known if text.startswith(self._known) else self._known.rstrip("\ufffd")
        return text[len(known) :]

    def _settle(self, text: str) -> None:
        """Settles the current tokens, all of whose characters are complete."""
        recent = self._tokens[self._settled :]
        if self._decode(recent):  # else the next token would be the first for the decoder
            self._tokens = recent
        self._settled, self._known = len(self._tokens), self._decode(self._tokens)
        self._waiting, self._returned = text[self._returned :], 0

    def _partial_stop_length(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a prefix of a stop sequence."""
        longest = max(map(len, self._stop), default=0) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-size:]) for s in self._stop):
                return size
        return 0


def stream_text(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int] | np.ndarray],
    *,
    max_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    rows: Sequence[int] | None = None,
    stop: Sequence[str] = (),
) -> Iterator[tuple[int, str]]:
    """Continues texts or token lists as one batch, and yields (row, next piece of its text).

    A text begins with BOS where the tokenizer's post-processor adds it; an empty text starts a new
    document. A row ends with any token that ends a text. The arguments are those of
    `Generator.stream`, except that `stop` lists the strings that end a row's text; they are not
    part of it.
    """

    def encode(prompt):
        tokens = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt
        return tokens if len(tokens) else [tokenizer.special.start]

    ids = [encode(prompt) for prompt in prompts]
    texts = [
        TextStream(
            tokenizer.decode,
            stop,
            prompt=[int(token) for token in prompt],
            special=tokenizer.special_texts,
        )
        for prompt in ids
    ]
    tokens = generator.stream(
        ids,
        max_tokens=max_tokens,
        sampling=sampling,
        seed=seed,
        rows=rows,
        end_of_document=tokenizer.special.ends,
        stop=lambda row, token: texts[row].stopped,
    )
    for row, token in tokens:
        if piece := texts[row].push(token):
            yield row, piece
    for row, text in enumerate(texts):
        if piece := text.finish():
            yield row, piece
