"""Tokenises text, JSON lines or Parquet files into a corpus for training.

    python -m gqe_jax.data.prepare --input 'texts/*.jsonl.zst' --tokenizer byte --output corpus

Documents keep their order, and each is followed by the end-of-document token. The result depends
only on the input, the tokenizer and the shard size, not on the number of processes. After a kill or
an error the same command goes on from the finished parts; a signal stops it and leaves nothing.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, Literal, get_args

import tqdm

from gqe_jax.commands import parse, run_command
from gqe_jax.config_json import from_dict, parse_json
from gqe_jax.data.corpus import (
    FORMAT,
    Manifest,
    SplitInfo,
    token_dtype,
    write_manifest,
)
from gqe_jax.data.documents import read_documents
from gqe_jax.data.shards import Document, make_manifest, merge_splits, write_documents
from gqe_jax.data.tokenizers import BYTE, TOKENIZER_FILE, Tokenizer, load_tokenizer
from gqe_jax.errors import DataError
from gqe_jax.storage import Location, file_sizes, find, is_remote, location, write_whole
from gqe_jax.whole_directory import PARTS, written_whole

OnError = Literal["stop", "skip"]
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_EXAMPLES = 3  # of skipped records, shown at the end
_TASK_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Tokenise files into a corpus."""

    input: tuple[str, ...]
    """Files or quoted glob patterns, local or in an object store (gs://, s3://, hf://): .parquet,
    .jsonl, or any other text; all but Parquet also with .gz, .zst, .bz2 or .xz. A name that exists
    is no pattern."""
    output: str
    """Directory to create, local or in an object store."""
    tokenizer: str = BYTE
    """`byte`, or the path of a tokenizer.json."""
    end_of_document: str | None = None
    """Special token that ends a document; None: the `eos_token_id` or `eos_token` of the files
    beside the tokenizer, or a common one that it has."""
    text_field: str = "text"
    """Column or key that holds the text in Parquet and JSON lines."""
    validation_fraction: float = 0.005
    """Fraction of the documents to hold out, selected by a hash of their text."""
    shard_tokens: int = 1 << 28
    """Maximum number of tokens in a shard."""
    processes: int = os.cpu_count() or 1
    """Number of worker processes."""
    on_error: OnError = "stop"
    """What a record does that has no text or text that is not UTF-8: `stop`, or `skip` to leave it
    out and count it."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise DataError(
                f"validation_fraction is {self.validation_fraction}; it must be between 0 and 1"
            )
        if self.on_error not in get_args(OnError):
            raise DataError(f"on_error is {self.on_error!r}; it must be stop or skip")
        for field in ("shard_tokens", "processes"):
            if getattr(self, field) < 1:
                raise DataError(f"{field} is {getattr(self, field)}; it must be positive")


def choose_split(text: str, validation_fraction: float) -> str:
    """The split of a document by a hash of its text, so that duplicates share a split."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest) < validation_fraction * 2.0**64 else "train"


def find_inputs(patterns: Iterable[str]) -> list[Location]:
    """The files of names and patterns.

    Raises:
      DataError: one matches no file.
    """
    paths = []
    for pattern in patterns:
        files = find(pattern)
        if not files:
            named = location(pattern)
            hint = f"; for its files, name '{named}/*'" if named.is_dir() else ""
            raise DataError(f"input is {pattern!r}; it matches no file{hint}")
        paths += files
    return list(dict.fromkeys(paths))


def _group(paths: list[Location], task_bytes: int) -> list[list[Location]]:
    """Consecutive files, grouped into tasks of at least `task_bytes`."""
    tasks, size = [[]], 0
    for path in paths:
        if size >= task_bytes:
            tasks.append([])
            size = 0
        tasks[-1].append(path)
        size += path.stat().st_size
    return tasks


@dataclasses.dataclass
class Part:
    """What one task has written, and what it left out."""

    splits: dict[str, SplitInfo]
    skipped: int = 0
    """Number of records left out."""
    changed: int = 0
    """Number of documents whose tokens decode to another text."""
    examples: tuple[str, ...] = ()
    """Messages of the first records left out, and the place of the first changed document."""


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The records of finished tasks, from which a preparation goes on that was killed."""

    directory: Location
    key: str
    itemsize: int

    def begin(self) -> None:
        write_whole(self.directory / PARTS / self.key, "")

    def write(self, number: int, part: Part) -> None:
        write_whole(self._path(number), json.dumps(dataclasses.asdict(part)))

    def read(self, number: int, config: PrepareConfig, sizes: dict[str, int]) -> Part | None:
        """What task `number` has written; None if it has to run."""
        with contextlib.suppress(OSError, ValueError):  # ConfigError is one
            part = from_dict(Part, parse_json(self._path(number).read_bytes()))
            shards = [shard for split in part.splits.values() for shard in split.shards]
            whole = all(
                sizes.get(shard.file) == self.itemsize * shard.num_tokens for shard in shards
            )
            if whole and (part.skipped == 0 or config.on_error == "skip"):
                return part
        return None

    def remove(self) -> None:
        for path in (self.directory / PARTS).iterdir():
            path.unlink()
        if not is_remote(self.directory):
            (self.directory / PARTS).rmdir()

    def _path(self, number: int) -> Location:
        return self.directory / PARTS / f"{number:05d}.json"


def _has_parts(directory: Location) -> bool:
    parts = directory / PARTS
    return parts.is_dir() and any(path.suffix == ".json" for path in parts.iterdir())


def _key(config: PrepareConfig, tasks: list[list[Location]], tokenizer: Tokenizer) -> str:
    """A hash of all that decides the content of the parts."""
    content: list[Any] = [FORMAT, config.text_field, config.validation_fraction]
    content += [config.shard_tokens, tokenizer.end_of_document, tokenizer.special.document_prefix]
    for task in tasks:
        found = [(str(path), path.stat()) for path in task]
        # The times of objects in a store differ between its interfaces.
        content.append(
            [(name, stat.st_size, 0 if "://" in name else stat.st_mtime_ns) for name, stat in found]
        )
    if config.tokenizer != BYTE:
        content.append(hashlib.sha256(location(config.tokenizer).read_bytes()).hexdigest())
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


_bytes_read: Any = None  # shared by the workers of a pool


def _initialise_worker(counter, alive: Connection) -> None:
    global _bytes_read
    _bytes_read = counter
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already fill the machine
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the parent gets them too, and ends the workers
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()


def _end_with_parent(alive: Connection) -> None:
    """Ends this process when the parent closes its end of the pipe, or is killed."""
    with contextlib.suppress(EOFError, OSError):
        alive.recv()
    os._exit(1)


def _count(num_bytes: int) -> None:
    with _bytes_read.get_lock():
        _bytes_read.value += num_bytes


def _run_task(
    config: PrepareConfig,
    parts: _Parts,
    number: int,
    paths: list[Location],
    count: Callable[[int], Any] = _count,
) -> Part:
    part = Part({})

    def skip(error: DataError) -> None:
        part.skipped += 1
        if part.skipped <= _EXAMPLES:
            part.examples += (str(error),)

    def changed(where: str) -> None:
        part.changed += 1
        if part.changed == 1:
            part.examples += (f"{where}: its tokens decode to another text",)

    def documents() -> Iterator[Document]:
        for path in paths:
            size, counted = path.stat().st_size, 0
            read = read_documents(path, config.text_field, on_error)
            for index, (text, share) in enumerate(read, 1):
                split = choose_split(text, config.validation_fraction)
                yield Document(split, text, f"{path}, document {index}")
                if (done := int(share * size)) - counted > 1 << 16:
                    count(done - counted)
                    counted = done
            count(size - counted)

    on_error = skip if config.on_error == "skip" else None
    tokenizer = load_tokenizer(config.tokenizer, config.end_of_document)
    try:
        part.splits = write_documents(
            parts.directory,
            f"{number:05d}",
            documents(),
            tokenizer,
            config.shard_tokens,
            skip=on_error,
            changed=changed,
        )
        parts.write(number, part)
    except OSError as error:
        raise DataError(
            f"output {config.output} cannot be written ({error}); free space, or name another"
        ) from None
    return part


def prepare(
    config: PrepareConfig, *, progress: bool = True, task_bytes: int = _TASK_BYTES
) -> Manifest:
    """Writes the corpus and returns its manifest; an interrupted or failed run leaves no output.

    After a kill or an error, the finished tasks are kept beside the output, and a call with the
    same configuration goes on from them.

    Args:
      config: what to prepare.
      progress: whether to show a bar.
      task_bytes: consecutive input files are grouped into tasks of at least this size.

    Raises:
      DataError: the input matches nothing, the input or the tokenizer cannot be read, the output
        exists or cannot be written, or a split is empty.
    """
    tokenizer = load_tokenizer(config.tokenizer, config.end_of_document)
    paths = find_inputs(config.input)
    tasks = _group(paths, task_bytes)
    total = sum(path.stat().st_size for path in paths)
    key = _key(config, tasks, tokenizer)
    with (
        written_whole(location(config.output), key, keep=_has_parts) as directory,
        tqdm.tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        parts = _Parts(directory, key, token_dtype(tokenizer.vocab_size).itemsize)
        try:
            parts.begin()
            done = _run_tasks(config, parts, tasks, bar)
            merged = merge_splits([part.splits for part in done])
            empty = [name for name, info in merged.items() if info.num_documents == 0]
            if empty or not is_remote(directory):
                parts.remove()
            if empty:
                raise DataError(
                    f"validation_fraction is {config.validation_fraction} and no document of the "
                    f"input fell into the {empty[0]} split; change it, or give more documents"
                )
            if config.tokenizer != BYTE:
                write_whole(directory / TOKENIZER_FILE, location(config.tokenizer).read_bytes())
            manifest = make_manifest(config.tokenizer, tokenizer, merged)
            write_manifest(directory, manifest)
            if is_remote(directory):
                parts.remove()
        except OSError as error:
            raise DataError(f"output {config.output} cannot be written ({error})") from None
        except DataError as error:
            if not _has_parts(directory):
                raise
            raise DataError(
                f"{error}. What is finished is kept: the same command goes on from there"
            ) from None
    _tell(done, sum(info.num_documents for info in merged.values()))
    return manifest


def _tell(parts: list[Part], documents: int) -> None:
    """Prints what was left out or changed."""
    examples = [example for part in parts for example in part.examples][:_EXAMPLES]
    if skipped := sum(part.skipped for part in parts):
        print(f"skipped {skipped} records without text", file=sys.stderr)
    if changed := sum(part.changed for part in parts):
        print(
            f"the tokens of {changed} of {documents} documents do not decode to their text: the "
            "tokenizer drops or changes characters",
            file=sys.stderr,
        )
    for example in examples:
        print(f"  {example}", file=sys.stderr)


def _run_tasks(
    config: PrepareConfig, parts: _Parts, tasks: list[list[Location]], bar: tqdm.tqdm
) -> list[Part]:
    """What each task has written; those of an earlier call are not run again."""
    sizes = file_sizes(parts.directory)
    made: dict[int, Part] = {}
    for number, task in enumerate(tasks):
        if (part := parts.read(number, config, sizes)) is not None:
            made[number] = part
            bar.update(sum(path.stat().st_size for path in task))
    run = functools.partial(_run_task, config, parts)
    due = {number: task for number, task in enumerate(tasks) if number not in made}
    if config.processes == 1 or len(due) <= 1:
        made |= {number: run(number, task, count=bar.update) for number, task in due.items()}
    else:
        made |= _run_in_processes(run, due, config.processes, bar)
    return [made[number] for number in range(len(tasks))]


def _run_in_processes(
    run: Callable[[int, list[Location]], Part],
    tasks: dict[int, list[Location]],
    processes: int,
    bar: tqdm.tqdm,
) -> dict[int, Part]:
    context = multiprocessing.get_context("spawn")  # the parent may have threads
    counter, begun = context.Value("q", 0), bar.n
    alive, closing = context.Pipe(duplex=False)
    workers = min(processes, len(tasks))
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=_initialise_worker, initargs=(counter, alive)
    ) as pool:
        try:
            futures = {number: pool.submit(run, number, task) for number, task in tasks.items()}
            pending = set(futures.values())
            while pending:
                done, pending = concurrent.futures.wait(
                    pending, timeout=0.5, return_when=concurrent.futures.FIRST_EXCEPTION
                )
                bar.update(begun + counter.value - bar.n)
                for future in done:
                    future.result()
            return {number: future.result() for number, future in futures.items()}
        except BrokenProcessPool:
            raise DataError(
                f"processes is {processes}; a worker was killed, perhaps for want of memory: name "
                "fewer"
            ) from None
        finally:
            closing.close()  # ends the workers, for which the pool waits


def _stop(number: int, _: Any) -> None:
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_DFL)  # a second one ends the process at once
    print(f"{signal.Signals(number).name}: stopping", file=sys.stderr, flush=True)
    sys.exit(128 + number)


def main(*, task_bytes: int = _TASK_BYTES) -> None:
    """Runs the command line; `task_bytes` as of `prepare`."""
    config = parse(PrepareConfig, sys.argv[1:], prog="prepare", description=__doc__)
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _stop)
    manifest = run_command(lambda: prepare(config, task_bytes=task_bytes))
    for split, info in manifest.splits.items():
        print(
            f"{split}: {info.num_documents} documents, {info.num_tokens} tokens, "
            f"{info.num_bytes} bytes in {len(info.shards)} shards"
        )


if __name__ == "__main__":
    main()
