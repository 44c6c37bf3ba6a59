"""Files of text: what is read of each format, and the name of what is wrong in one."""

import bz2
import gzip
import itertools
import lzma

import pyarrow
import pyarrow.parquet
import pytest

from gqe_jax.data import (
    DataError,
)
from gqe_jax.data.documents import read_documents
from tests.gqe_jax.texts import ROWS, TEXTS


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


class TestDocuments:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.jsonl", ROWS),
            ("a.jsonl.gz", gzip.compress(ROWS)),
            ("a.json.zst", zstd(ROWS[:5000]) + zstd(ROWS[5000:])),
            ("a.jsonl.bz2", bz2.compress(ROWS[:5000]) + bz2.compress(ROWS[5000:])),
            ("a.jsonl.xz", lzma.compress(ROWS)),
            ("a.jsonl", b"\xef\xbb\xbf" + ROWS),
        ],
    )
    def test_json_lines(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        read = list(read_documents(tmp_path / name, "text"))
        assert [text for text, _ in read] == TEXTS
        assert read[-1][1] == 1.0
        assert all(a[1] <= b[1] for a, b in itertools.pairwise(read))

    def test_parquet(self, tmp_path):
        table = pyarrow.table({"body": TEXTS, "n": list(range(300))})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
        assert [t for t, _ in read_documents(tmp_path / "a.parquet", "body")] == TEXTS

    @pytest.mark.parametrize(
        ("suffix", "pack"),
        [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
    )
    def test_text_is_one_document(self, tmp_path, suffix, pack):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(pack("".join(TEXTS).encode()))
        assert list(read_documents(path, "text")) == [("".join(TEXTS), 1.0)]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2 is not JSON"),
            ("a.jsonl", b'{"body": "x"}\n', "line 1: text_field is 'text'; the row has body"),
            ("a.jsonl", b'{"text": 3}\n', "line 1: text is 3; it must be a string"),
            ("a.jsonl", b"[1]\n", "line 1: text_field is 'text'; the row has list"),
            ("a.jsonl.gz", gzip.compress(ROWS)[:-200], "a.jsonl.gz cannot be read"),
            ("a.jsonl.zst", zstd(ROWS)[:-200], "a.jsonl.zst cannot be read"),
            ("a.jsonl.bz2", bz2.compress(ROWS)[:-20], "a.jsonl.bz2 cannot be read"),
            ("a.jsonl.bz2", ROWS, "a.jsonl.bz2 cannot be read"),
            ("a.jsonl.xz", lzma.compress(ROWS)[:-20], "a.jsonl.xz cannot be read"),
            ("a.jsonl.xz", ROWS, "a.jsonl.xz cannot be read"),
            ("a.jsonl", gzip.compress(ROWS), "line 1 is not UTF-8 .*looks like gzip"),
            ("a.tar", b"", "a.tar: .tar files are not read; unpack it"),
            ("a.txt", b"caf\xe9", "a.txt is not UTF-8"),
            ("a.txt", b"one\ntwo\ncaf\xe9", "a.txt is not UTF-8, line 3"),
            ("a.parquet", b"no parquet", "a.parquet cannot be read"),
        ],
    )
    def test_damaged_input_is_named(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            list(read_documents(tmp_path / name, "text"))

    BAD = (
        (b'{"text": null}', "text is None; it must be a string"),
        (b'{"id": 1}', "text_field is 'text'; the row has id"),
        (b'{"text": "caf\xe9"}', "is not UTF-8"),
        (b'{"text": "\\ud800 alone"}', "half of a surrogate pair, '.ud800', at character 0"),
        (b'{"text": "x"', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "is not JSON"),
    )

    @pytest.mark.parametrize(("line", "message"), BAD)
    def test_a_bad_record_is_named_with_its_line_and_can_be_skipped(self, tmp_path, line, message):
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
        with pytest.raises(DataError, match=rf"a\.jsonl, line 3.*{message}.*--on-error skip"):
            list(read_documents(path, "text"))
        skipped = []
        assert [t for t, _ in read_documents(path, "text", skipped.append)] == ["one", "two"]
        (error,) = skipped
        assert "a.jsonl, line 3" in str(error)

    def test_bad_rows_of_parquet_are_named_and_can_be_skipped(self, tmp_path):
        path = tmp_path / "a.parquet"
        raw = pyarrow.array([b"one", b"caf\xe9", None, b"two"])
        column = pyarrow.StringArray.from_buffers(len(raw), *raw.buffers()[1:], raw.buffers()[0])
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
        with pytest.raises(DataError, match=r"a\.parquet, row 2 is not UTF-8"):
            list(read_documents(path, "text"))
        skipped = []
        assert [t for t, _ in read_documents(path, "text", skipped.append)] == ["one", "two"]
        assert ["row 2" in str(skipped[0]), "row 3" in str(skipped[1])] == [True, True]

    def test_a_missing_column_is_named(self, tmp_path):
        pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"text_field is 'text'.*columns body"):
            list(read_documents(tmp_path / "a.parquet", "text"))
