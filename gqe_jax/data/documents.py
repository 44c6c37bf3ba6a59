"""Reads documents from text, JSON lines and Parquet files, plain or compressed."""

import io
import json
from collections.abc import Iterator

import pyarrow
import pyarrow.parquet

from gqe_jax.errors import DataError
from gqe_jax.storage import Location, is_remote

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


def read_documents(path: Location, text_field: str) -> Iterator[tuple[str, float]]:
    """Yields each document of a file with the fraction of the file read so far.

    Args:
      path: Parquet (.parquet) and JSON lines (.jsonl, .json, .ndjson) hold one document per row;
        any other file is one document of UTF-8 text. All but Parquet may also end in .gz or .zst.
      text_field: the column or key that holds the text.

    Raises:
      DataError: the file is not of its format, or a row has no text; names the file and the row.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSION.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    try:
        if kind == ".parquet":
            yield from _parquet(path, text_field)
        elif kind in (".jsonl", ".json", ".ndjson"):
            yield from _json_lines(path, compression, text_field)
        else:
            yield _open(path, compression)[0].read().decode(), 1.0
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); convert it, or leave it out") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({error})") from None


def _open(path: Location, compression: str | None) -> tuple[io.BufferedReader, pyarrow.NativeFile]:
    """The decompressed stream, and the underlying file, whose position measures progress."""
    raw = pyarrow.PythonFile(path.open("rb")) if is_remote(path) else pyarrow.OSFile(str(path))
    stream = raw if compression is None else pyarrow.CompressedInputStream(raw, compression)
    return io.BufferedReader(stream, buffer_size=1 << 20), raw


def _json_lines(path, compression, text_field) -> Iterator[tuple[str, float]]:
    stream, raw = _open(path, compression)
    size = max(raw.size(), 1)
    for number, line in enumerate(stream, 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON ({error})") from None
        yield _text(row, text_field, where), min(raw.tell() / size, 1.0)


def _parquet(path, text_field) -> Iterator[tuple[str, float]]:
    file = pyarrow.parquet.ParquetFile(path.open("rb") if is_remote(path) else path)
    names = file.schema_arrow.names
    if text_field not in names:
        raise DataError(f"text_field is {text_field!r}; {path} has the columns {', '.join(names)}")
    rows, done = max(file.metadata.num_rows, 1), 0
    for batch in file.iter_batches(batch_size=256, columns=[text_field]):
        for text in batch.column(0).to_pylist():
            done += 1
            yield _text({text_field: text}, text_field, f"{path}, row {done}"), done / rows


def _text(row, text_field: str, where: str) -> str:
    if not isinstance(row, dict) or text_field not in row:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where}: text_field is {text_field!r}; the row has {found}")
    if not isinstance(row[text_field], str):
        raise DataError(f"{where}: {text_field} is {row[text_field]!r}; it must be a string")
    return row[text_field]
