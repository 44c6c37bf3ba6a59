"""Tokenizers: UTF-8 bytes, or a `tokenizer.json` of the Hugging Face `tokenizers` library."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from gqe_jax.data.special_tokens import SpecialTokens, library_errors, special_tokens
from gqe_jax.errors import DataError
from gqe_jax.storage import Location, location

BYTE = "byte"
TOKENIZER_FILE = "tokenizer.json"
MAX_VOCAB_SIZE = 1 << 31  # batches hold int32 tokens


@runtime_checkable
class Tokenizer(Protocol):
    """Maps text to token ids and back."""

    vocab_size: int
    special: SpecialTokens
    special_texts: Mapping[int, str]
    """The special tokens that `decode` drops."""

    @property
    def end_of_document(self) -> int: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode_documents(self, documents: Sequence[np.ndarray]) -> list[str]: ...

    def decode(self, tokens: Sequence[int | np.integer] | np.ndarray) -> str: ...


class ByteTokenizer:
    """Uses UTF-8 bytes as tokens; id 255, which UTF-8 never contains, ends a document."""

    vocab_size = 256
    special = SpecialTokens(end_of_document=255, ends=(255,), prefix=(), start=255)
    special_texts: Mapping[int, str] = {}

    @property
    def end_of_document(self) -> int:
        """The token that ends a document."""
        return self.special.end_of_document

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint8 array per text."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    encode_documents = encode_batch

    def decode_documents(self, documents: Sequence[np.ndarray]) -> list[str]:
        """The text of each result of `encode_documents`."""
        return [tokens.tobytes().decode() for tokens in documents]

    def decode(self, tokens: Sequence[int | np.integer] | np.ndarray) -> str:
        """The text without end-of-document tokens.

        Incomplete characters become U+FFFD, and ids above 255, which a larger model can generate.
        """
        invalid = 0xFE  # in no UTF-8 text
        shown = (int(t) for t in tokens if t != self.end_of_document)
        return bytes(t if t < 256 else invalid for t in shown).decode(errors="replace")


class FileTokenizer:
    """Uses a `tokenizer.json`, without its truncation and padding.

    Args:
      path: the file.
      end_of_document: the token that ends a document, or its id; None: as the files beside the
        tokenizer have it, or a common one. With an id those files are not read, and nothing is put
        before a text.

    Raises:
      DataError: the file is no tokenizer, or has no such token.
    """

    def __init__(self, path: Location, end_of_document: str | int | None = None):
        import tokenizers  # not needed for bytes

        self._path = path
        remedy = "it must be 'byte' or a tokenizer.json of the tokenizers library"
        with library_errors(f"tokenizer {path} cannot be read", remedy):
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
            self._set_up(end_of_document)

    def _set_up(self, end_of_document: str | int | None) -> None:
        import tokenizers

        path = self._path
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise DataError(f"tokenizer {path} has no tokens; copy it again")
        self.vocab_size: int = 1 + max(ids)
        """Number of ids up to the largest; a sparse vocabulary has fewer entries."""
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise DataError(
                f"tokenizer {path} has the token id {self.vocab_size - 1}; ids must be less than "
                f"{MAX_VOCAB_SIZE}: number its vocabulary anew"
            )
        if isinstance(end_of_document, int):
            end = end_of_document
            self.special = SpecialTokens(end, ends=(end,), prefix=(), start=end)
        else:
            self.special = special_tokens(path, self._tokenizer, end_of_document)
        added = self._tokenizer.get_added_tokens_decoder().get(self.end_of_document)
        if added is not None and not added.special:
            # `encode_documents` treats only special tokens as text.
            flags = ("single_word", "lstrip", "rstrip", "normalized")
            kept = {flag: getattr(added, flag) for flag in flags}
            special = tokenizers.AddedToken(added.content, special=True, **kept)
            self._tokenizer.add_special_tokens([special])
        found = self._tokenizer.get_added_tokens_decoder().items()
        self.special_texts: Mapping[int, str] = {
            token: each.content for token, each in found if each.special
        }

    @property
    def end_of_document(self) -> int:
        """The token that ends a document."""
        return self.special.end_of_document

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint32 array of ids per text; a special token that the text spells is that token."""
        return self._encode(self._tokenizer.encode_batch, texts)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint32 array of ids per text; a special token that the text spells is text."""
        self._tokenizer.encode_special_tokens = True
        try:
            return self._encode(self._tokenizer.encode_batch_fast, texts)
        finally:
            self._tokenizer.encode_special_tokens = False

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text, as `encode_batch`, and the characters [first, end) of each."""
        with library_errors(f"tokenizer {self._path} cannot encode a text", "correct it"):
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        return np.asarray(encoding.ids, np.uint32), offsets

    def _encode(self, encode: Callable[..., Any], texts: Sequence[str]) -> list[np.ndarray]:
        remedy = "correct it: it needs a token for unknown text, for example"
        with library_errors(f"tokenizer {self._path} cannot encode a text", remedy):
            encodings = encode(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def decode_documents(self, documents: Sequence[np.ndarray]) -> list[str]:
        """The text of each result of `encode_documents`."""
        ids = [tokens.tolist() for tokens in documents]
        with library_errors(f"tokenizer {self._path} cannot decode tokens", "correct its decoder"):
            return self._tokenizer.decode_batch(ids, skip_special_tokens=False)

    def decode(self, tokens: Sequence[int | np.integer] | np.ndarray) -> str:
        """The text, without special tokens."""
        with library_errors(f"tokenizer {self._path} cannot decode tokens", "correct its decoder"):
            return self._tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True)


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that a model continues, with BOS where the post-processor adds it.

    A text that spells BOS gets no second one.
    """
    ids, prefix = tokenizer.encode_batch([text])[0].tolist(), list(tokenizer.special.prefix)
    return ids if ids[: len(prefix)] == prefix else prefix + ids


def load_tokenizer(name: str | Location, end_of_document: str | int | None = None) -> Tokenizer:
    """Loads `byte` or a tokenizer.json; the arguments are those of `FileTokenizer`.

    Raises:
      DataError: there is no such file, or it is no tokenizer.
    """
    if str(name) == BYTE:
        if isinstance(end_of_document, str):
            raise DataError(
                f"end_of_document is {end_of_document!r}; bytes have their own: leave it out"
            )
        return ByteTokenizer()
    path = location(name)
    if not path.is_file():
        raise DataError(f"tokenizer is {str(name)!r}; it must be 'byte' or a tokenizer.json")
    return FileTokenizer(path, end_of_document)
