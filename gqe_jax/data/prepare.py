"""Tokenises text, JSON lines or Parquet into a corpus to train on.

    python -m gqe_jax.data.prepare --input 'texts/*.jsonl.zst' --tokenizer byte --output corpus

Documents keep their order, each followed by the end-of-document token. The result depends on the
input, the tokenizer and the shard size alone, not on the number of processes.
"""

import concurrent.futures
import dataclasses
import functools
import glob
import hashlib
import itertools
import multiprocessing
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tqdm
import tyro

from gqe_jax.data.corpus import (
    SPLITS,
    DataError,
    Manifest,
    ShardInfo,
    SplitInfo,
    token_dtype,
    write_manifest,
    written_whole,
)
from gqe_jax.data.documents import read_documents
from gqe_jax.data.tokenizers import BYTE, TOKENIZER_FILE, Tokenizer, load_tokenizer

_TASK_BYTES = 64 << 20  # small input files are taken together up to here
_ENCODE_BYTES = 1 << 20  # text handed to the tokenizer at once


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Tokenise files into a corpus."""

    input: tuple[str, ...]
    """Files or glob patterns (quote them): .txt and other text, .jsonl, each also .gz or .zst,
    .parquet."""
    output: pathlib.Path
    """Directory to create."""
    tokenizer: str = BYTE
    """`byte`, or the path of a tokenizer.json."""
    end_of_document: str | None = None
    """Special token that ends a document; None: the tokenizer's usual one."""
    text_field: str = "text"
    """Column or key that holds the text in Parquet and JSON lines."""
    validation_fraction: float = 0.005
    """Share of the documents held out, picked by a hash of their text."""
    shard_tokens: int = 1 << 28
    """Most tokens in a shard."""
    processes: int = os.cpu_count() or 1
    """Worker processes."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise DataError(
                f"validation_fraction is {self.validation_fraction}; it must be between 0 and 1"
            )
        for field in ("shard_tokens", "processes"):
            if getattr(self, field) < 1:
                raise DataError(f"{field} is {getattr(self, field)}; it must be positive")


class ShardWriter:
    """Writes one split's tokens to files of at most `shard_tokens` tokens."""

    def __init__(self, directory: pathlib.Path, prefix: str, dtype: np.dtype, shard_tokens: int):
        self._directory, self._prefix = directory, prefix
        self._dtype, self._shard_tokens = dtype, shard_tokens
        self._file, self._hash, self._room = None, None, 0
        self._shards: list[ShardInfo] = []
        self._documents = self._bytes = 0
        self._max_token = 0

    def add(self, tokens: np.ndarray, num_bytes: int) -> None:
        """Appends a document; its last token is the end of it."""
        self._documents += 1
        self._bytes += num_bytes
        self._max_token = max(self._max_token, int(tokens.max()))
        tokens = tokens.astype(self._dtype)
        while len(tokens):
            if self._room == 0:
                self._finish_shard()
                name = f"{self._prefix}-{len(self._shards):03d}.bin"
                self._file, self._hash = (self._directory / name).open("xb"), hashlib.sha256()
                self._room = self._shard_tokens
            piece, tokens = tokens[: self._room], tokens[self._room :]
            self._file.write(piece.tobytes())
            self._hash.update(piece.tobytes())
            self._room -= len(piece)

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        name = pathlib.Path(self._file.name).name
        self._file.close()
        count = self._shard_tokens - self._room
        self._shards.append(ShardInfo(name, count, self._hash.hexdigest()))
        self._file = None

    def close(self) -> SplitInfo:
        """Ends the last shard; what was written."""
        self._finish_shard()
        tokens = sum(shard.num_tokens for shard in self._shards)
        return SplitInfo(tokens, self._documents, self._bytes, self._max_token, tuple(self._shards))


def write_documents(
    directory: pathlib.Path,
    name: str,
    documents: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    shard_tokens: int,
) -> dict[str, SplitInfo]:
    """Tokenises (split, text) pairs into shards `SPLIT-NAME-NNN.bin` of `directory`."""
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {
        split: ShardWriter(directory, f"{split}-{name}", dtype, shard_tokens) for split in SPLITS
    }
    end = np.array([tokenizer.end_of_document], dtype)
    for part in _parts(documents):
        encoded = tokenizer.encode_batch([text for _, text in part])
        for (split, text), tokens in zip(part, encoded, strict=True):
            tokens = np.concatenate([tokens, end], dtype=dtype, casting="same_kind")
            writers[split].add(tokens, len(text.encode()))
    return {split: writer.close() for split, writer in writers.items()}


def _parts(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    part, size = [], 0
    for document in documents:
        part.append(document)
        size += len(document[1])
        if size >= _ENCODE_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def merge_splits(parts: list[dict[str, SplitInfo]]) -> dict[str, SplitInfo]:
    """The splits of a corpus from those of its tasks, in their order."""
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
    )


def choose_split(text: str, validation_fraction: float) -> str:
    """By a hash of the text: the same document always lands in the same split."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest) < validation_fraction * 2.0**64 else "train"


def _find_inputs(patterns: Iterable[str]) -> list[pathlib.Path]:
    paths = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True))
        files = [path for path in map(pathlib.Path, found) if path.is_file()]
        if not files:
            raise DataError(f"input is {pattern!r}; it matches no file")
        paths += files
    return list(dict.fromkeys(paths))


def _group(paths: list[pathlib.Path]) -> list[list[pathlib.Path]]:
    """Consecutive files, taken together until they are worth a task."""
    tasks, size = [[]], 0
    for path in paths:
        if size >= _TASK_BYTES:
            tasks.append([])
            size = 0
        tasks[-1].append(path)
        size += path.stat().st_size
    return tasks


_bytes_read: multiprocessing.Value = None  # shared by the workers of a pool


def _initialise_worker(counter) -> None:
    global _bytes_read
    _bytes_read = counter
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already fill the machine


def _count(num_bytes: int) -> None:
    with _bytes_read.get_lock():
        _bytes_read.value += num_bytes


def _run_task(
    config: PrepareConfig,
    directory: pathlib.Path,
    number: int,
    paths: list[pathlib.Path],
    count: Callable[[int], None] = _count,
) -> dict[str, SplitInfo]:
    def documents():
        for path in paths:
            size, counted = path.stat().st_size, 0
            for text, share in read_documents(path, config.text_field):
                yield choose_split(text, config.validation_fraction), text
                if (read := int(share * size)) - counted > 1 << 16 or share == 1.0:
                    count(read - counted)
                    counted = read

    tokenizer = load_tokenizer(config.tokenizer, config.end_of_document)
    return write_documents(directory, f"{number:05d}", documents(), tokenizer, config.shard_tokens)


def prepare(config: PrepareConfig, *, progress: bool = True) -> Manifest:
    """Writes the corpus; an interrupted or failed run leaves nothing behind.

    Raises:
      DataError: the input matches nothing or cannot be read, the output exists, or a split is
        empty.
      ValueError: the tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(config.tokenizer, config.end_of_document)
    paths = _find_inputs(config.input)
    tasks = _group(paths)
    total = sum(path.stat().st_size for path in paths)
    with (
        written_whole(config.output) as directory,
        tqdm.tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        run = functools.partial(_run_task, config, directory)
        if config.processes == 1 or len(tasks) == 1:
            splits = [run(i, task, count=bar.update) for i, task in enumerate(tasks)]
        else:
            splits = _run_in_processes(run, tasks, config.processes, bar)
        merged = merge_splits(splits)
        for split, info in merged.items():
            if info.num_documents == 0:
                raise DataError(
                    f"validation_fraction is {config.validation_fraction} and no document of the "
                    f"input fell into the {split} split; change it, or give more documents"
                )
        if config.tokenizer != BYTE:
            shutil.copyfile(config.tokenizer, directory / TOKENIZER_FILE)
        manifest = make_manifest(config.tokenizer, tokenizer, merged)
        write_manifest(directory, manifest)
    return manifest


def _run_in_processes(run, tasks, processes: int, bar) -> list[dict[str, SplitInfo]]:
    context = multiprocessing.get_context("spawn")  # the parent may have threads
    counter = context.Value("q", 0)
    workers = min(processes, len(tasks))
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=_initialise_worker, initargs=(counter,)
    ) as pool:
        futures = [pool.submit(run, number, task) for number, task in enumerate(tasks)]
        try:
            pending = set(futures)
            while pending:
                done, pending = concurrent.futures.wait(
                    pending, timeout=0.5, return_when=concurrent.futures.FIRST_EXCEPTION
                )
                bar.update(counter.value - bar.n)
                for future in done:
                    future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]


def main() -> None:
    """The command line."""
    try:
        config = tyro.cli(PrepareConfig, description=__doc__)
        manifest = prepare(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for split, info in manifest.splits.items():
        print(
            f"{split}: {info.num_documents} documents, {info.num_tokens} tokens, "
            f"{info.num_bytes} bytes in {len(info.shards)} shards"
        )


if __name__ == "__main__":
    main()
