"""Reads documents from text, JSON lines and Parquet files, plain or compressed."""

import bz2
import io
import lzma
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from gqe_jax.config_json import parse_json
from gqe_jax.errors import DataError
from gqe_jax.storage import Location, is_remote

_ARROW_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_COMPRESSION = {".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile}
_UNREADABLE = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".lz4", ".br", ".z")
_SIGNATURES = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}

Skip = Callable[[DataError], None]


def read_documents(
    path: Location, text_field: str, skip: Skip | None = None
) -> Iterator[tuple[str, float]]:
    """Yields each document of a file with the fraction of the file read so far.

    Args:
      path: Parquet (.parquet) and JSON lines (.jsonl, .json, .ndjson) hold one document per row;
        any other file is one document of UTF-8 text. All but Parquet may also end in .gz, .zst,
        .bz2 or .xz.
      text_field: the column or key that holds the text.
      skip: called with the error of each row that has no text, which is left out; None: the error
        is raised.

    Raises:
      DataError: the file is not of its format, or a row has no text; names the file and the row.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _UNREADABLE:
        raise DataError(f"{path}: {suffixes[-1]} files are not read; unpack it, or leave it out")
    packed = suffixes[-1] if suffixes and suffixes[-1] in _ARROW_COMPRESSION | _COMPRESSION else ""
    suffixes = suffixes[:-1] if packed else suffixes
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet" and packed:
        raise DataError(f"{path}: compressed Parquet files are not read; unpack it")
    if kind == ".parquet":
        rows = _parquet_rows(path, text_field)
    elif kind in (".jsonl", ".json", ".ndjson"):
        rows = _lines(path, packed, text_field)
    else:
        rows = _whole(path, packed)
    try:
        for where, read, share in rows:
            try:
                text = read()
            except _BadRecord as error:
                bad = DataError(f"{where}{error}. --on-error skip leaves such records out")
                if skip is None:
                    raise bad from None
                skip(bad)
                continue
            yield text, share
    except (OSError, EOFError, lzma.LZMAError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({error})") from None


def read_rows(path: Location) -> Iterator[tuple[str, Any]]:
    """Yields the place and the value of each line of a file of JSON lines, also compressed.

    Raises:
      DataError: the file cannot be read, or a line is no JSON; names the file and the line.
    """
    packed = path.suffix.lower()
    packed = packed if packed in _ARROW_COMPRESSION | _COMPRESSION else ""
    number = 0
    try:
        for number, line in enumerate(_open(path, packed)[0], 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield f"{path}, line {number}", _parse(line)
    except _BadRecord as error:
        raise DataError(f"{path}, line {number}{error}") from None
    except (OSError, EOFError, lzma.LZMAError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({error})") from None


class _BadRecord(Exception):
    """A record has no text; the message says why, and follows the record's place."""


# Place, function that returns the text, and fraction of the file read, of a record.
_Record = tuple[str, Callable[[], str], float]


def _open(path: Location, packed: str) -> tuple[io.BufferedReader, Any]:
    """The decompressed stream, and the underlying file, whose position measures progress."""
    if packed in _COMPRESSION:
        raw = path.open("rb")
        return io.BufferedReader(_COMPRESSION[packed](raw), buffer_size=1 << 20), raw
    raw = pyarrow.PythonFile(path.open("rb")) if is_remote(path) else pyarrow.OSFile(str(path))
    stream = raw
    if packed:
        stream = pyarrow.CompressedInputStream(raw, _ARROW_COMPRESSION[packed])
    return io.BufferedReader(stream, buffer_size=1 << 20), raw


def _whole(path: Location, packed: str) -> Iterator[_Record]:
    data = _open(path, packed)[0].read()
    yield f"{path}", lambda: _decode(data, lines=True), 1.0


def _lines(path: Location, packed: str, text_field: str) -> Iterator[_Record]:
    stream, raw = _open(path, packed)
    size = max(path.stat().st_size, 1)
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line  # byte order mark
        if line.strip():
            read = lambda line=line: _text(_parse(line), text_field)  # noqa: E731
            yield f"{path}, line {number}", read, min(raw.tell() / size, 1.0)


def _parquet_rows(path: Location, text_field: str) -> Iterator[_Record]:
    file = pyarrow.parquet.ParquetFile(path.open("rb") if is_remote(path) else path)
    names = file.schema_arrow.names
    if text_field not in names:
        raise DataError(f"text_field is {text_field!r}; {path} has the columns {', '.join(names)}")
    rows, done = max(file.metadata.num_rows, 1), 0
    for batch in file.iter_batches(batch_size=256, columns=[text_field]):
        for scalar in batch.column(0):
            done += 1
            read = lambda scalar=scalar: _text({text_field: _python(scalar)}, text_field)  # noqa: E731
            yield f"{path}, row {done}", read, done / rows


def _python(scalar: pyarrow.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise _BadRecord(f" is not UTF-8 ({error}); convert it") from None


def _decode(data: bytes, *, lines: bool = False) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = f", line {data.count(b'\n', 0, error.start) + 1}" if lines else ""
        names = [name for start, name in _SIGNATURES.items() if data.startswith(start)]
        found = f"; it looks like {names[0]}" if names else ""
        raise _BadRecord(
            f" is not UTF-8{line} ({error.reason} at byte {error.start}){found}; convert it"
        ) from None


def _parse(line: bytes) -> Any:
    try:
        return parse_json(_decode(line))
    except ValueError as error:
        raise _BadRecord(f" is not JSON ({error}); each line must be an object") from None


def _text(row: Any, text_field: str) -> str:
    """The text of a row.

    Raises:
      _BadRecord: it has none, or text that UTF-8 cannot hold.
    """
    if not isinstance(row, dict) or text_field not in row:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise _BadRecord(f": text_field is {text_field!r}; the row has {found or 'no field'}")
    text = row[text_field]
    if not isinstance(text, str):
        shown = repr(text)[:80]
        raise _BadRecord(f": {text_field} is {shown}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _BadRecord(
            f": {text_field} has half of a surrogate pair, {text[error.start]!r}, at character "
            f"{error.start}; it is no text"
        ) from None
    return text
