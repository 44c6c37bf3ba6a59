"""Writes tokenised documents to the shards of a corpus."""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from gqe_jax.data.corpus import MARKS_SUFFIX, SPLITS, Manifest, ShardInfo, SplitInfo, token_dtype
from gqe_jax.data.tokenizers import BYTE, TOKENIZER_FILE, Tokenizer
from gqe_jax.errors import DataError
from gqe_jax.storage import Location, is_remote

ANSWER, FIRST = np.uint8(1), np.uint8(2)
"""Marks of a token: it has a loss; it is the first of its document."""
_ENCODE_BYTES = 1 << 20  # text per call of the tokenizer


class Document(NamedTuple):
    """A document of a split."""

    split: str
    text: str
    where: str
    """Where it comes from, for messages."""


class ShardWriter:
    """Writes one split's tokens to files of at most `shard_tokens` tokens.

    If `marked`, each token has a byte of marks too, in a file beside its shard.
    """

    def __init__(
        self,
        directory: Location,
        prefix: str,
        dtype: np.dtype,
        shard_tokens: int,
        *,
        marked: bool = False,
    ):
        self._directory, self._prefix = directory, prefix
        self._dtype, self._shard_tokens = dtype, shard_tokens
        self._file: BinaryIO | None = None
        self._hash, self._room = hashlib.sha256(), 0
        self._shards: list[ShardInfo] = []
        self._documents = self._bytes = 0
        self._max_token = 0
        self._answers = 0 if marked else None
        self._marks: list[np.ndarray] = []  # of the open shard

    def add(self, tokens: np.ndarray, num_bytes: int, marks: np.ndarray | None = None) -> None:
        """Appends a document of `num_bytes` UTF-8 bytes.

        Args:
          tokens: the document; without marks the last one is end-of-document.
          num_bytes: its size; with marks, that of its answers.
          marks: of each token.

        Raises:
          DataError: a token does not fit the shards' dtype.
        """
        self._documents += 1
        self._bytes += num_bytes
        self._append(tokens, marks)

    def pad(self, count: int, token: int) -> None:
        """Appends padding: a document of its own that has no loss."""
        marks = np.zeros(count, np.uint8)
        marks[:1] = FIRST
        if count:
            self._append(np.full(count, token, np.uint32), marks)

    def _append(self, tokens: np.ndarray, marks: np.ndarray | None) -> None:
        largest = int(tokens.max())
        if largest > np.iinfo(self._dtype).max:
            raise DataError(f"the tokenizer made the id {largest}; shards hold {self._dtype.name}")
        self._max_token = max(self._max_token, largest)
        tokens = tokens.astype(self._dtype)
        while len(tokens):
            if self._file is None or self._room == 0:
                self._finish_shard()
                self._name = f"{self._prefix}-{len(self._shards):03d}.bin"
                self._hash, self._room = hashlib.sha256(), self._shard_tokens
                self._file = (self._directory / self._name).open("wb")
            piece, tokens = tokens[: self._room], tokens[self._room :]
            self._file.write(piece.tobytes())
            self._hash.update(piece.tobytes())
            self._room -= len(piece)
            if marks is not None and self._answers is not None:
                self._marks.append(marks[: len(piece)])
                self._answers += int(np.count_nonzero(marks[: len(piece)] & ANSWER))
                marks = marks[len(piece) :]

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        if not is_remote(self._directory):
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        count = self._shard_tokens - self._room
        marks_sha256 = None
        if self._answers is not None:
            marks = np.concatenate(self._marks).tobytes()
            (self._directory / (self._name + MARKS_SUFFIX)).write_bytes(marks)
            marks_sha256, self._marks = hashlib.sha256(marks).hexdigest(), []
        self._shards.append(ShardInfo(self._name, count, self._hash.hexdigest(), marks_sha256))
        self._file = None

    def close(self) -> SplitInfo:
        """Closes the last shard and returns the split's sizes and shards."""
        self._finish_shard()
        tokens = sum(shard.num_tokens for shard in self._shards)
        return SplitInfo(
            tokens,
            self._documents,
            self._bytes,
            self._max_token,
            tuple(self._shards),
            self._answers,
        )


def write_documents(
    directory: Location,
    name: str,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    shard_tokens: int,
    *,
    skip: Callable[[DataError], None] | None = None,
    changed: Callable[[str], None] | None = None,
) -> dict[str, SplitInfo]:
    """Tokenises documents into shards `SPLIT-NAME-NNN.bin` in `directory`.

    Args:
      directory, name: where the shards go, and the middle of their names.
      documents: the documents of all splits.
      tokenizer: the tokenizer.
      shard_tokens: maximum number of tokens in a shard.
      skip: called with the error of a document that cannot be stored, which is left out; None: the
        error is raised.
      changed: called with the place of each document that decodes to another text.

    Raises:
      DataError: the tokens of a document contain the end-of-document token.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {
        split: ShardWriter(directory, f"{split}-{name}", dtype, shard_tokens) for split in SPLITS
    }
    end = np.array([tokenizer.end_of_document], np.uint32)
    prefix = np.array(tokenizer.special.document_prefix, np.uint32)
    for part in _parts(documents):
        encoded = tokenizer.encode_documents([document.text for document in part])
        decoded = tokenizer.decode_documents(encoded) if changed else [None] * len(part)
        for document, tokens, text in zip(part, encoded, decoded, strict=True):
            if (tokens == end).any():
                error = DataError(
                    f"{document.where}: the tokenizer reads a part of the text as the "
                    f"end-of-document token, id {end[0]}; name a token that no text contains: "
                    "--end-of-document"
                )
                if skip is None:
                    raise error
                skip(error)
                continue
            if changed and text != document.text:
                changed(document.where)
            size = len(document.text.encode())
            writers[document.split].add(np.concatenate([prefix, tokens, end]), size)
    return {split: writer.close() for split, writer in writers.items()}


def _parts(documents: Iterable[Document]) -> Iterator[list[Document]]:
    part, size = [], 0
    for document in documents:
        part.append(document)
        size += len(document.text)
        if size >= _ENCODE_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def merge_splits(parts: list[dict[str, SplitInfo]]) -> dict[str, SplitInfo]:
    """Concatenates the splits of all tasks, in the order of the tasks."""
    merged = {}
    for split in SPLITS:
        infos = [part[split] for part in parts]
        merged[split] = SplitInfo(
            num_tokens=sum(info.num_tokens for info in infos),
            num_documents=sum(info.num_documents for info in infos),
            num_bytes=sum(info.num_bytes for info in infos),
            max_token=max(info.max_token for info in infos),
            shards=tuple(itertools.chain(*(info.shards for info in infos))),
        )
    return merged


def make_manifest(
    tokenizer_name: str, tokenizer: Tokenizer, splits: dict[str, SplitInfo]
) -> Manifest:
    """The manifest of a corpus."""
    return Manifest(
        tokenizer=BYTE if tokenizer_name == BYTE else TOKENIZER_FILE,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        dtype=token_dtype(tokenizer.vocab_size).str,
        splits=splits,
        document_prefix=tokenizer.special.document_prefix,
    )
