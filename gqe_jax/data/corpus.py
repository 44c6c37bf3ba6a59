"""A prepared corpus: a manifest, and for each split one flat stream of tokens in shards.

`manifest.json` names the tokenizer and lists each split's shards with their lengths and SHA-256
checksums. A shard holds little-endian uint16 or uint32 tokens and no header. Local shards are
memory-mapped; from an object store the rows of a batch are fetched concurrently, as byte ranges.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from gqe_jax.config import ConfigError
from gqe_jax.config_json import from_dict, parse_json
from gqe_jax.data.special_tokens import SpecialTokens
from gqe_jax.data.tokenizers import BYTE, TOKENIZER_FILE, Tokenizer, load_tokenizer
from gqe_jax.errors import DataError
from gqe_jax.storage import Location, file_sizes, is_remote, location, write_whole

MANIFEST = "manifest.json"
FORMAT = "gqe-jax token shards, version 1"
SPLITS = ("train", "validation")
MARKS_SUFFIX = ".marks"
"""What follows a shard's name in that of its file of marks, one byte a token (`data.shards`)."""
_DTYPES = ("<u2", "<u4")
_OPEN_SHARDS = 64  # of each split; a process may open some hundred files


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """Name, length and checksum of one shard file."""

    file: str
    num_tokens: int
    sha256: str
    marks_sha256: str | None = None
    """Checksum of the file of marks; None: every token has a loss."""


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """Sizes of one split; `num_bytes` is UTF-8 text without the tokens between documents."""

    num_tokens: int
    num_documents: int
    num_bytes: int
    max_token: int
    shards: tuple[ShardInfo, ...]
    num_answers: int | None = None
    """Number of tokens that have a loss, where the text is conversations: `num_bytes` is then the
    size of the answers. None: every token has a loss."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    tokenizer: str
    vocab_size: int
    end_of_document: int
    dtype: str
    splits: dict[str, SplitInfo]
    document_prefix: tuple[int, ...] = ()
    """Tokens before the text of each document."""
    sequence_length: int | None = None
    """Tokens of the windows into which conversations are packed; None: the text is documents."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of a shard: uint16 if every token id fits, else uint32; little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def sha256(path: Location) -> str:
    """The SHA-256 of a file's content, as hexadecimal digits."""
    if is_remote(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Location, manifest: Manifest) -> None:
    """Writes `manifest.json`."""
    content: dict[str, Any] = {"format": FORMAT, **dataclasses.asdict(manifest)}
    # As without the fields that a corpus does not need, so that its fingerprint is the same.
    if not manifest.document_prefix:
        del content["document_prefix"]
    if manifest.sequence_length is None:
        del content["sequence_length"]
    for split in content["splits"].values():
        if split["num_answers"] is None:
            del split["num_answers"]
            for shard in split["shards"]:
                del shard["marks_sha256"]
    write_whole(directory / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(directory: Location) -> Manifest:
    """Reads and checks `manifest.json`.

    Raises:
      DataError: the file is missing, damaged or of another format.
    """
    path = directory / MANIFEST
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"corpus {directory} has no {MANIFEST}; it must be 'stdlib' or a directory written by "
            "python -m gqe_jax.data.prepare"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); name a corpus directory") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); prepare the corpus again") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise DataError(f"{path} is not of the format {FORMAT!r}; prepare the corpus again")
    try:
        manifest = from_dict(Manifest, content)
    except ConfigError as error:
        raise DataError(f"{path} is damaged ({error}); prepare the corpus again") from None
    if (problem := _problem(manifest)) is not None:
        raise DataError(f"{path} is damaged ({problem}); prepare the corpus again")
    for shard in itertools.chain(*(split.shards for split in manifest.splits.values())):
        if pathlib.PurePath(shard.file).name != shard.file:
            raise DataError(f"{path} names the shard {shard.file!r}; it must be a plain file name")
    return manifest


def _problem(manifest: Manifest) -> str | None:
    """What cannot be in a manifest; None if it is sound."""
    if manifest.dtype not in _DTYPES:
        return f"dtype is {manifest.dtype!r}; it must be one of {', '.join(_DTYPES)}"
    limit = np.iinfo(manifest.dtype).max
    if not 0 <= manifest.end_of_document <= limit:
        return f"end_of_document is {manifest.end_of_document}; {manifest.dtype} cannot hold it"
    if not all(0 <= token <= limit for token in manifest.document_prefix):
        return f"document_prefix is {manifest.document_prefix}; {manifest.dtype} cannot hold it"
    for name, split in manifest.splits.items():
        lengths = [shard.num_tokens for shard in split.shards]
        if min(lengths, default=0) < 0 or sum(lengths) != split.num_tokens:
            return f"splits.{name}.num_tokens is {split.num_tokens}; its shards' are {lengths[:8]}"
        has_marks = {shard.marks_sha256 is not None for shard in split.shards}
        if has_marks - {split.num_answers is not None and manifest.sequence_length is not None}:
            return f"splits.{name}.num_answers is {split.num_answers}, unlike its shards"
        if not 0 <= split.max_token <= limit:
            return f"splits.{name}.max_token is {split.max_token}; {manifest.dtype} cannot hold it"
    return None


class Split:
    """One split's tokens as a flat stream.

    Args:
      directory: the corpus directory.
      name: `train` or `validation`.
      manifest: the corpus's manifest.
      verify: compare the shards' checksums as well as their sizes. Ignored for an object store,
        which keeps its own checksums; every host would have to download the whole corpus.

    Raises:
      DataError: the split is empty, or a shard is missing, truncated or altered.
    """

    def __init__(self, directory: Location, name: str, manifest: Manifest, *, verify: bool):
        info = manifest.splits.get(name)
        if info is None or info.num_tokens == 0:
            raise DataError(f"corpus {directory} has no {name} split; prepare it with more text")
        self.name = name
        self.info = info
        self.end_of_document = manifest.end_of_document
        self._dtype = dtype = np.dtype(manifest.dtype)
        remote = is_remote(directory)
        self._store: Any = directory.fs if is_remote(directory) else None
        sizes = file_sizes(directory)
        files = [(x.file, x.num_tokens * dtype.itemsize, x.sha256) for x in info.shards]
        if info.num_answers is not None:
            files += [(x.file + MARKS_SUFFIX, x.num_tokens, x.marks_sha256) for x in info.shards]
        self._files: list[Any] = []  # paths, or keys of the object store: shards, then their marks
        for file, expected, checksum in files:
            path = directory / file
            actual = sizes.get(file)
            if actual != expected:
                state = "is missing" if actual is None else f"has {actual} bytes"
                raise DataError(
                    f"shard {path} {state}, the manifest says {expected} bytes; copy or prepare "
                    "the corpus again"
                )
            if verify and not remote and sha256(path) != checksum:
                raise DataError(
                    f"shard {path} does not match its checksum in the manifest; copy or prepare "
                    "the corpus again"
                )
            self._files.append(path.path if is_remote(path) else path)
        self._map = functools.lru_cache(_OPEN_SHARDS)(self._open)
        self._starts = [0, *itertools.accumulate(shard.num_tokens for shard in info.shards)]

    def __len__(self) -> int:
        return self.info.num_tokens

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens `start` to `start + length`, int32; fewer at the end of the split."""
        return self.read_many([start], length)[0]

    def read_many(self, starts: Sequence[int] | np.ndarray, length: int) -> list[np.ndarray]:
        """Reads `length` tokens from each start; from an object store concurrently."""
        return self._read(starts, length, 0, self._dtype)

    @property
    def is_marked(self) -> bool:
        """Whether the text is of conversations, with a byte of marks for each token."""
        return self.info.num_answers is not None

    def read_marks(self, starts: Sequence[int] | np.ndarray, length: int) -> list[np.ndarray]:
        """Reads the marks of `length` tokens from each start, as `read_many` reads the tokens."""
        return self._read(starts, length, len(self.info.shards), np.dtype(np.uint8))

    def _read(
        self, starts: Sequence[int] | np.ndarray, length: int, first: int, dtype: np.dtype
    ) -> list[np.ndarray]:
        pieces = [self._pieces(int(start), length) for start in starts]
        read = iter(self._read_pieces(list(itertools.chain(*pieces)), first, dtype))
        rows = [list(itertools.islice(read, len(piece))) for piece in pieces]
        empty = np.zeros(0, np.int32)
        return [np.concatenate(row, dtype=np.int32) if row else empty for row in rows]

    def _open(self, index: int, dtype: np.dtype) -> np.ndarray:
        return np.memmap(self._files[index], dtype, mode="r")

    def _pieces(self, start: int, length: int) -> list[tuple[int, int, int]]:
        """(shard number, start, stop within the shard) for each shard that the range touches."""
        stop = min(start + length, len(self))
        pieces = []
        index = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            end = min(stop, self._starts[index + 1])
            pieces.append((index, start - self._starts[index], end - self._starts[index]))
            start, index = end, index + 1
        return pieces

    def _read_pieces(
        self, pieces: list[tuple[int, int, int]], first: int, dtype: np.dtype
    ) -> list[np.ndarray]:
        """Reads the pieces, whose shards' files are those from `first` on."""
        if self._store is None:
            # A copy, so that no more shards stay open than the cache holds.
            return [np.array(self._map(first + i, dtype)[start:stop]) for i, start, stop in pieces]
        paths = [self._files[first + index] for index, _, _ in pieces]
        starts, stops = ([dtype.itemsize * piece[i] for piece in pieces] for i in (1, 2))
        found = self._store.cat_ranges(paths, starts, stops, on_error="raise")
        return [np.frombuffer(data, dtype) for data in found]


def corpus_tokenizer(
    directory: Location, manifest: Manifest, end_of_document: str | None = None
) -> Tokenizer:
    """Loads the tokenizer that a corpus was made with; texts begin and end as its documents do.

    Args:
      directory, manifest: the corpus.
      end_of_document: another token that ends a text, before that of the documents, or None.

    Raises:
      DataError: the tokenizer is gone, or has no such token.
    """
    end, prefix = manifest.end_of_document, manifest.document_prefix
    name = BYTE if manifest.tokenizer == BYTE else directory / TOKENIZER_FILE
    tokenizer = load_tokenizer(name, end if end_of_document is None else end_of_document)
    first = tokenizer.end_of_document
    tokenizer.special = SpecialTokens(
        first, ends=tuple(dict.fromkeys((first, end))), prefix=prefix, start=(*prefix, end)[0]
    )
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An open corpus."""

    directory: Location
    manifest: Manifest
    fingerprint: str
    """Hash of the manifest; it covers every token, since the manifest holds the checksums."""
    train: Split
    validation: Split

    @classmethod
    def open(cls, directory: str | os.PathLike, *, verify: bool = True) -> "Corpus":
        """Opens a directory written by `gqe_jax.data.prepare`.

        Raises:
          DataError: the manifest or a shard is missing, truncated or altered.
        """
        found = location(directory)
        manifest = read_manifest(found)
        train, validation = (Split(found, name, manifest, verify=verify) for name in SPLITS)
        return cls(found, manifest, sha256(found / MANIFEST)[:16], train, validation)

    def tokenizer(self) -> Tokenizer:
        """Loads the tokenizer that the corpus was made with."""
        return corpus_tokenizer(self.directory, self.manifest)

    def check(self, *, vocab_size: int, sequence_length: int) -> None:
        """Checks that a model of this vocabulary can be trained on windows of this length.

        Raises:
          DataError: a token id exceeds the vocabulary, or a split is shorter than one window.
        """
        packed = self.manifest.sequence_length
        if packed not in (None, sequence_length):
            raise DataError(
                f"sequence_length is {sequence_length}; the conversations of {self.directory} are "
                f"packed into windows of {packed}: train with that, or prepare them again"
            )
        for split in (self.train, self.validation):
            if split.info.max_token >= vocab_size:
                raise DataError(
                    f"model.vocab_size is {vocab_size}; the {split.name} split of "
                    f"{self.directory} has token id {split.info.max_token}, so it must be at "
                    f"least {self.manifest.vocab_size}, the tokenizer's vocabulary"
                )
            if len(split) < sequence_length + 1:
                raise DataError(
                    f"sequence_length is {sequence_length}; the {split.name} split of "
                    f"{self.directory} has only {len(split)} tokens; a window needs "
                    "sequence_length + 1"
                )
