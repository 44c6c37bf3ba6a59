"""Tokenises conversations into a corpus for supervised fine-tuning.

    python -m gqe_jax.data.chat --input chats.jsonl --tokenizer DIR/tokenizer.json --output corpus

Each line of the input is `{"messages": [{"role": ..., "content": ...}, ...]}`. The tokenizer's own
chat template turns it into tokens, and only the assistant's answers have a loss. Conversations are
packed into windows of `sequence_length` tokens, and none is split over two.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from gqe_jax.commands import parse, run_command
from gqe_jax.data.chat_template import ChatTemplate
from gqe_jax.data.corpus import SPLITS, Manifest, token_dtype, write_manifest
from gqe_jax.data.documents import read_rows
from gqe_jax.data.prepare import OnError, choose_split, find_inputs
from gqe_jax.data.shards import ANSWER, FIRST, ShardWriter, make_manifest
from gqe_jax.data.special_tokens import companions
from gqe_jax.data.tokenizers import TOKENIZER_FILE, FileTokenizer
from gqe_jax.errors import DataError
from gqe_jax.storage import location, write_whole
from gqe_jax.whole_directory import written_whole

_OPEN_WINDOWS = 256  # that wait for a conversation which fits


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Tokenise conversations into a corpus for supervised fine-tuning."""

    input: tuple[str, ...]
    """Files or quoted glob patterns of JSON lines, local or in an object store; also with .gz,
    .zst, .bz2 or .xz."""
    output: str
    """Directory to create, local or in an object store."""
    tokenizer: str
    """Path of a tokenizer.json; its chat template is in a file beside it."""
    sequence_length: int
    """Tokens of a window: that of the runs that train on it."""
    validation_fraction: float = 0.01
    """Fraction of the conversations to hold out, selected by a hash of their text."""
    shard_tokens: int = 1 << 28
    """Maximum number of tokens in a shard."""
    on_error: OnError = "stop"
    """What a conversation does that is longer than a window or that the template refuses: `stop`,
    or `skip` to leave it out and count it."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise DataError(
                f"validation_fraction is {self.validation_fraction}; it must be between 0 and 1"
            )
        for field in ("sequence_length", "shard_tokens"):
            if getattr(self, field) < 1:
                raise DataError(f"{field} is {getattr(self, field)}; it must be positive")


@dataclasses.dataclass(frozen=True)
class Example:
    """A tokenised conversation."""

    tokens: np.ndarray
    marks: np.ndarray
    """Flags of each token: `ANSWER` if it has a loss, `FIRST` at the beginning."""
    answer_bytes: int
    """UTF-8 bytes of the answers."""


def tokenise(messages: Any, template: ChatTemplate, tokenizer: FileTokenizer) -> Example:
    """The tokens of a conversation; a token is an answer if any of its characters is.

    Raises:
      DataError: it is no conversation with an answer, or the template refuses it.
    """
    good = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    )
    if not good or not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            "messages must be a list of objects with role and content, one of the assistant's"
        )
    text, spans = template.render(messages)
    tokens, offsets = tokenizer.encode_with_offsets(text)
    marks = np.zeros(len(tokens), np.uint8)
    for begin, end in spans:
        marks[(offsets[:, 0] < end) & (offsets[:, 1] > begin)] = ANSWER
    if not len(tokens) or not marks[1:].any():
        raise DataError("the conversation has no token of an answer")
    marks[0] = FIRST  # its own prediction has no context
    answers = sum(len(text[begin:end].encode()) for begin, end in spans)
    return Example(tokens, marks, answers)


class _Packer:
    """Fills windows first-fit and writes each when it is full, or when too many are open."""

    def __init__(self, writer: ShardWriter, length: int, padding: int):
        self._writer, self._length, self._padding = writer, length, padding
        self._open: list[list[Example]] = []
        self._room: list[int] = []

    def add(self, example: Example) -> None:
        size = len(example.tokens)
        at = next((i for i, room in enumerate(self._room) if room >= size), None)
        if at is None:
            if len(self._open) == _OPEN_WINDOWS:
                self._write(0)
            at = len(self._open)
            self._open.append([])
            self._room.append(self._length)
        self._open[at].append(example)
        self._room[at] -= size
        if self._room[at] == 0:
            self._write(at)

    def close(self) -> None:
        """Writes the open windows, and the token that the last one's last position predicts."""
        while self._open:
            self._write(0)
        self._writer.pad(1, self._padding)

    def _write(self, at: int) -> None:
        for example in self._open.pop(at):
            self._writer.add(example.tokens, example.answer_bytes, example.marks)
        self._writer.pad(self._room.pop(at), self._padding)


def prepare_chats(config: ChatConfig) -> Manifest:
    """Writes the corpus and returns its manifest; a failed run leaves no output.

    Raises:
      DataError: the input or the tokenizer cannot be read, a conversation is refused, the output
        exists, or a split is empty.
    """
    path = location(config.tokenizer)
    if not path.is_file():
        raise DataError(f"tokenizer is {config.tokenizer!r}; it must be a tokenizer.json")
    tokenizer, template = FileTokenizer(path), ChatTemplate(path.parent)
    skipped: list[str] = []
    with written_whole(location(config.output)) as directory:
        dtype = token_dtype(tokenizer.vocab_size)
        writers = {
            split: ShardWriter(directory, f"{split}-00000", dtype, config.shard_tokens, marked=True)
            for split in SPLITS
        }
        end = tokenizer.end_of_document
        packers = {
            split: _Packer(writer, config.sequence_length, end) for split, writer in writers.items()
        }
        for where, row in _rows(config):
            try:
                messages = row.get("messages") if isinstance(row, dict) else None
                example = tokenise(messages, template, tokenizer)
                if len(example.tokens) > config.sequence_length:
                    raise DataError(
                        f"the conversation has {len(example.tokens)} tokens, more than "
                        f"sequence_length ({config.sequence_length})"
                    )
            except DataError as error:
                if config.on_error == "stop":
                    raise DataError(f"{where}: {error}. --on-error skip leaves it out") from None
                skipped.append(f"{where}: {error}")
                continue
            split = choose_split(json.dumps(messages), config.validation_fraction)
            packers[split].add(example)
        for packer in packers.values():
            packer.close()
        splits = {split: writer.close() for split, writer in writers.items()}
        for split, info in splits.items():
            if info.num_documents == 0:
                raise DataError(
                    f"validation_fraction is {config.validation_fraction} and no conversation fell "
                    f"into the {split} split; change it, or give more conversations"
                )
        for name, content in companions(path.parent).items():
            write_whole(directory / name, content)
        write_whole(directory / TOKENIZER_FILE, path.read_bytes())
        manifest = make_manifest(config.tokenizer, tokenizer, splits)
        manifest = dataclasses.replace(
            manifest, document_prefix=(), sequence_length=config.sequence_length
        )
        write_manifest(directory, manifest)
    if skipped:
        print(f"skipped {len(skipped)} conversations, such as", file=sys.stderr)
        print("\n".join(f"  {each}" for each in skipped[:3]), file=sys.stderr)
    return manifest


def _rows(config: ChatConfig) -> Iterator[tuple[str, Any]]:
    for path in find_inputs(config.input):
        yield from read_rows(path)


def main() -> None:
    """The command line."""
    config = parse(ChatConfig, sys.argv[1:], prog="gqe_jax.data.chat", description=__doc__ or "")
    manifest = run_command(lambda: prepare_chats(config))
    for split, info in manifest.splits.items():
        windows = (info.num_tokens - 1) // config.sequence_length
        print(
            f"{split}: {info.num_documents:,} conversations in {windows:,} windows, "
            f"{info.num_answers:,} of {info.num_tokens:,} tokens with loss"
        )


if __name__ == "__main__":
    main()
