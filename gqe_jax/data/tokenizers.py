"""Tokenizers: UTF-8 bytes, or a `tokenizer.json` of the Hugging Face `tokenizers` library."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from gqe_jax.errors import DataError
from gqe_jax.storage import Location, location

BYTE = "byte"
TOKENIZER_FILE = "tokenizer.json"
_END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")


@runtime_checkable
class Tokenizer(Protocol):
    """Maps text to token ids and back."""

    vocab_size: int
    end_of_document: int

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, tokens: Sequence[int | np.integer] | np.ndarray) -> str: ...


class ByteTokenizer:
    """Uses UTF-8 bytes as tokens; id 255, which UTF-8 never contains, ends a document."""

    vocab_size = 256
    end_of_document = 255

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint8 array per text."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, tokens: Sequence[int | np.integer] | np.ndarray) -> str:
        """The text; incomplete characters become U+FFFD, end-of-document tokens are dropped."""
        return bytes(t for t in tokens if t != self.end_of_document).decode(errors="replace")


class FileTokenizer:
    """Uses a `tokenizer.json`.

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
        names = _END_OF_DOCUMENT if end_of_document is None else (end_of_document,)
        ids = [self._tokenizer.token_to_id(name) for name in names]
        found = [token for token in ids if token is not None]
        if not found:
            raise DataError(
                f"end_of_document: tokenizer {path} has none of {', '.join(names)}; "
                "name the token that ends a document"
            )
        self.end_of_document: int = found[0]
        self.vocab_size: int = self._tokenizer.get_vocab_size()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint32 array of ids per text, without special tokens."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

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
