"""Tokenises text, JSON lines or Parquet files into a corpus for training.

    python -m gqe_jax.data.prepare --input 'texts/*.jsonl.zst' --tokenizer byte --output corpus

Documents keep their order, and each is followed by the end-of-document token. The result depends
only on the input, the tokenizer and the shard size, not on the number of processes.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Callable, Iterable

import tqdm

from gqe_jax.commands import parse, run_command
from gqe_jax.data.corpus import Manifest, SplitInfo, write_manifest, written_whole
from gqe_jax.data.documents import read_documents
from gqe_jax.data.shards import make_manifest, merge_splits, write_documents
from gqe_jax.data.tokenizers import BYTE, TOKENIZER_FILE, load_tokenizer
from gqe_jax.errors import DataError
from gqe_jax.storage import find, location, write_whole

_TASK_BYTES = 64 << 20  # small input files are grouped into tasks of this size


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Tokenise files into a corpus."""

    input: tuple[str, ...]
    """Files or quoted glob patterns, local or in an object store (gs://, s3://, hf://): .parquet,
    .jsonl, or any other text; all but Parquet also with .gz or .zst."""
    output: str
    """Directory to create, local or in an object store."""
    tokenizer: str = BYTE
    """`byte`, or the path of a tokenizer.json."""
    end_of_document: str | None = None
    """Special token that ends a document; None: a common one that the tokenizer has."""
    text_field: str = "text"
    """Column or key that holds the text in Parquet and JSON lines."""
    validation_fraction: float = 0.005
    """Fraction of the documents to hold out, selected by a hash of their text."""
    shard_tokens: int = 1 << 28
    """Maximum number of tokens in a shard."""
    processes: int = os.cpu_count() or 1
    """Number of worker processes."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise DataError(
                f"validation_fraction is {self.validation_fraction}; it must be between 0 and 1"
            )
        for field in ("shard_tokens", "processes"):
            if getattr(self, field) < 1:
                raise DataError(f"{field} is {getattr(self, field)}; it must be positive")


def choose_split(text: str, validation_fraction: float) -> str:
    """The split of a document by a hash of its text, so that duplicates share a split."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest) < validation_fraction * 2.0**64 else "train"


def _find_inputs(patterns: Iterable[str]) -> list[pathlib.Path]:
    paths = []
    for pattern in patterns:
        files = find(pattern)
        if not files:
            raise DataError(f"input is {pattern!r}; it matches no file")
        paths += files
    return list(dict.fromkeys(paths))


def _group(paths: list[pathlib.Path]) -> list[list[pathlib.Path]]:
    """Consecutive files, grouped into tasks of at least `_TASK_BYTES`."""
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
    """Writes the corpus and returns its manifest; an interrupted or failed run leaves no output.

    Raises:
      DataError: the input matches nothing, the input or the tokenizer cannot be read, the output
        exists, or a split is empty.
    """
    tokenizer = load_tokenizer(config.tokenizer, config.end_of_document)
    paths = _find_inputs(config.input)
    tasks = _group(paths)
    total = sum(path.stat().st_size for path in paths)
    with (
        written_whole(location(config.output)) as directory,
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
            write_whole(directory / TOKENIZER_FILE, location(config.tokenizer).read_bytes())
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
    """Runs the command line."""
    config = parse(PrepareConfig, sys.argv[1:], prog="prepare", description=__doc__)
    manifest = run_command(lambda: prepare(config))
    for split, info in manifest.splits.items():
        print(
            f"{split}: {info.num_documents} documents, {info.num_tokens} tokens, "
            f"{info.num_bytes} bytes in {len(info.shards)} shards"
        )


if __name__ == "__main__":
    main()
