"""Tokenizers: UTF-8 bytes, or a `tokenizer.json` of the Hugging Face `tokenizers` library."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from gqe_jax.errors import DataError
from gqe_jax.storage import Location, location

BYTE = "byte"
TOKENIZER_FILE = "tokenizer.json"
MAX_VOCAB_SIZE = 1 << 31  # batches hold int32 tokens
_END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")


@runtime_checkable
class Tokenizer(Protocol):
    """Maps text to token ids and back."""

    vocab_size: int
    end_of_document: int

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode_documents(self, documents: Sequence[np.ndarray]) -> list[str]: ...

    def decode(self, tokens: Sequence[int | np.integer] | np.ndarray) -> str: ...


class ByteTokenizer:
    """Uses UTF-8 bytes as tokens; id 255, which UTF-8 never contains, ends a document."""

    vocab_size = 256
    end_of_document = 255

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint8 array per text."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    encode_documents = encode_batch

    def decode_documents(self, documents: Sequence[np.ndarray]) -> list[str]:
        """The text of each result of `encode_documents`."""
        return [tokens.tobytes().decode() for tokens in documents]

    def decode(self, tokens: Sequence[int | np.integer] | np.ndarray) -> str:
        """The text; incomplete characters become U+FFFD, end-of-document tokens are dropped."""
        return bytes(t for t in tokens if t != self.end_of_document).decode(errors="replace")


class FileTokenizer:
    """Uses a `tokenizer.json`, without its truncation and padding.

    Args:
      path: the file.
      end_of_document: the token that ends a document; None: the first known of `_END_OF_DOCUMENT`.

    Raises:
      DataError: the file is no tokenizer, or has no such token.
    """

    def __init__(self, path: Location, end_of_document: str | None = None):
        import tokenizers  # not needed for bytes

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:
            raise DataError(
                f"tokenizer {path} cannot be read ({error}); it must be 'byte' or a tokenizer.json "
                "of the tokenizers library"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        names = _END_OF_DOCUMENT if end_of_document is None else (end_of_document,)
        ids = [self._tokenizer.token_to_id(name) for name in names]
        found = [token for token in ids if token is not None]
        if not found:
            raise DataError(
                f"end_of_document: tokenizer {path} has none of {', '.join(names)}; "
                "name the token that ends a document"
            )
        self.end_of_document: int = found[0]
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        """Number of ids up to the largest; a sparse vocabulary has fewer entries."""
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise DataError(
                f"tokenizer {path} has the token id {self.vocab_size - 1}; ids must be less than "
                f"{MAX_VOCAB_SIZE}: number its vocabulary anew"
            )
        added = self._tokenizer.get_added_tokens_decoder().get(self.end_of_document)
        if added is not None and not added.special:
            # `encode_documents` treats only special tokens as text.
            flags = ("single_word", "lstrip", "rstrip", "normalized")
            kept = {flag: getattr(added, flag) for flag in flags}
            special = tokenizers.AddedToken(added.content, special=True, **kept)
            self._tokenizer.add_special_tokens([special])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint32 array of ids per text; a special token that the text spells is that token."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint32 array of ids per text; a special token that the text spells is text."""
        self._tokenizer.encode_special_tokens = True
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        finally:
            self._tokenizer.encode_special_tokens = False
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def decode_documents(self, documents: Sequence[np.ndarray]) -> list[str]:
        """The text of each result of `encode_documents`."""
        ids = [tokens.tolist() for tokens in documents]
        return self._tokenizer.decode_batch(ids, skip_special_tokens=False)

    def decode(self, tokens: Sequence[int | np.integer] | np.ndarray) -> str:
        """The text, without special tokens."""
        return self._tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True)


def load_tokenizer(name: str | Location, end_of_document: str | None = None) -> Tokenizer:
    """Loads `byte` or a tokenizer.json.

    Raises:
      DataError: there is no such file, or it is no tokenizer.
    """
    if str(name) == BYTE:
        return ByteTokenizer()
    path = location(name)
    if not path.is_file():
        raise DataError(f"tokenizer is {str(name)!r}; it must be 'byte' or a tokenizer.json")
    return FileTokenizer(path, end_of_document)
