"""Corpora: what is read, how it is written, and the order in which it is seen."""

import gzip
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

from gqe_jax.config import DataConfig
from gqe_jax.data import (
    Corpus,
    DataError,
    evaluation_batches,
    open_corpus,
    training_batches,
    window_indices,
)
from gqe_jax.data.documents import read_documents
from gqe_jax.data.prepare import PrepareConfig, choose_split, prepare
from gqe_jax.data.stdlib import stdlib_documents
from gqe_jax.data.tokenizers import ByteTokenizer, load_tokenizer

TEXTS = [f"Document {i}: " + "äöü word " * (i % 7 + 1) + "\n" for i in range(300)]
ROWS = b"".join(
    json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(TEXTS)
)


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


def write_corpus(tmp_path, name="corpus", **fields):
    source = tmp_path / "texts.jsonl"
    source.write_bytes(ROWS)
    options = {"validation_fraction": 0.2, "processes": 1} | fields
    output = tmp_path / name
    prepare(PrepareConfig((str(source),), output, **options), progress=False)
    return output


class TestDocuments:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.jsonl", ROWS),
            ("a.jsonl.gz", gzip.compress(ROWS)),
            ("a.json.zst", zstd(ROWS[:5000]) + zstd(ROWS[5000:])),
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

    @pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress)])
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
            ("a.txt", b"caf\xe9", "a.txt is not UTF-8"),
            ("a.parquet", b"no parquet", "a.parquet cannot be read"),
        ],
    )
    def test_damaged_input_is_named(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            list(read_documents(tmp_path / name, "text"))

    def test_a_missing_column_is_named(self, tmp_path):
        pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"text_field is 'text'.*columns body"):
            list(read_documents(tmp_path / "a.parquet", "text"))


class TestPrepare:
    def test_the_stream_is_the_documents_in_order(self, tmp_path):
        corpus = Corpus.open(write_corpus(tmp_path))
        for split in (corpus.train, corpus.validation):
            texts = [text for text in TEXTS if choose_split(text, 0.2) == split.name]
            expected = b"".join(text.encode() + b"\xff" for text in texts)
            assert split.read(0, len(split)).tolist() == list(expected)
            assert split.info.num_documents == len(texts)
            assert split.info.num_bytes == len(expected) - len(texts)
            assert split.info.max_token == 255
        assert 0.1 < corpus.validation.info.num_documents / 300 < 0.3

    def test_shards_are_cut_anywhere_and_read_across(self, tmp_path):
        whole = Corpus.open(write_corpus(tmp_path))
        cut = Corpus.open(write_corpus(tmp_path, "cut", shard_tokens=100))
        assert len(cut.train.info.shards) > 50
        tokens = whole.train.read(0, len(whole.train))
        for start, length in [(0, 5), (95, 10), (99, 302), (100, 100), (len(tokens) - 3, 10)]:
            np.testing.assert_array_equal(
                cut.train.read(start, length), tokens[start : start + length]
            )

    def test_processes_do_not_change_the_result(self, tmp_path):
        for i in range(6):
            (tmp_path / f"part-{i}.jsonl").write_bytes(ROWS[: ROWS.find(b"\n", 3000 * (i + 1)) + 1])
        made = []
        for processes in (1, 2):
            output = tmp_path / f"with-{processes}"
            pattern = str(tmp_path / "part-*.jsonl")
            config = PrepareConfig((pattern,), output, validation_fraction=0.2, processes=processes)
            prepare(config, progress=False, task_bytes=2000)
            made.append({p.name: p.read_bytes() for p in output.iterdir()})
        assert made[0] == made[1]
        assert len(made[0]) == 13  # six tasks of two splits, and the manifest

    def test_tokenizer_file(self, tmp_path):
        special = ["<|endoftext|>"]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(TEXTS, trainer)
        path = tmp_path / "bpe.json"
        tokenizer.save(str(path))
        corpus = Corpus.open(write_corpus(tmp_path, tokenizer=str(path)))
        ids = corpus.train.read(0, len(corpus.train))
        assert ids.max() > 255
        assert corpus.train.end_of_document == tokenizer.token_to_id("<|endoftext|>")
        texts = [text for text in TEXTS if choose_split(text, 0.2) == "train"]
        assert corpus.tokenizer().decode(ids) == "".join(texts)
        with pytest.raises(ValueError, match="has none of <end>; name the token"):
            load_tokenizer(path, "<end>")

    def test_command_line_shows_what_it_made(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(ROWS)
        command = [sys.executable, "-m", "gqe_jax.data.prepare", "--input", "a.json*"]
        command += ["--validation-fraction", "0.1", "--output", "corpus"]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        assert "train: " in run.stdout
        assert "100%" in run.stderr
        again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert again.returncode == 1
        assert again.stderr.startswith("error: output corpus exists")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"input": ("nothing*",)}, "input is 'nothing\\*'; it matches no file"),
            ({"tokenizer": "none.json"}, "tokenizer is 'none.json'; it must be 'byte' or"),
            ({"validation_fraction": 1e-12}, "no document of the input fell into the validation"),
            ({"text_field": "body"}, "text_field is 'body'"),
        ],
    )
    def test_failures_leave_nothing_behind(self, tmp_path, fields, message):
        (tmp_path / "a.jsonl").write_bytes(ROWS)
        options = {"input": (str(tmp_path / "a.jsonl"),), "processes": 1, **fields}
        with pytest.raises(ValueError, match=message):
            prepare(PrepareConfig(output=tmp_path / "corpus", **options), progress=False)
        assert {p.name for p in tmp_path.iterdir()} == {"a.jsonl"}

    @pytest.mark.parametrize("fields", [{"validation_fraction": 1.5}, {"processes": 0}])
    def test_bad_fields_are_named(self, tmp_path, fields):
        with pytest.raises(DataError, match=next(iter(fields))):
            PrepareConfig(("a",), tmp_path / "corpus", **fields)


class TestCorpus:
    def damage(self, corpus, how):
        shard = next(corpus.glob("train-*.bin"))
        if how == "truncated":
            os.truncate(shard, shard.stat().st_size - 2)
        elif how == "missing":
            shard.unlink()
        elif how == "altered":
            content = bytearray(shard.read_bytes())
            content[40] ^= 1
            shard.write_bytes(content)
        else:
            manifest = corpus / "manifest.json"
            text = manifest.read_text()
            manifest.write_text({
                "not JSON": text[:-30],
                "other format": text.replace("version 1", "version 9"),
                "no tokenizer": text.replace('"tokenizer"', '"tokeniser"'),
                "outside": text.replace('"file": "', '"file": "../'),
            }[how])  # fmt: skip

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ("truncated", r"train-.*bin has \d+ bytes, the manifest says \d+"),
            ("missing", "train-.*bin is missing"),
            ("altered", "train-.*bin does not match its checksum"),
            ("not JSON", "manifest.json is not JSON"),
            ("other format", "manifest.json is not of the format"),
            ("no tokenizer", "manifest.json is damaged.*tokeniser is no field"),
            ("outside", "names the shard '../.*plain file name"),
        ],
    )
    def test_damage_is_named(self, tmp_path, how, message):
        corpus = write_corpus(tmp_path)
        self.damage(corpus, how)
        with pytest.raises(DataError, match=message):
            Corpus.open(corpus)

    def test_unknown_corpus_is_named(self, tmp_path):
        with pytest.raises(DataError, match=r"has no manifest.json; it must be 'stdlib' or"):
            open_corpus(str(tmp_path / "nothing"))

    def test_a_model_it_does_not_fit_is_named(self, tmp_path):
        corpus = Corpus.open(write_corpus(tmp_path))
        with pytest.raises(DataError, match=r"vocab_size is 200; .* token id 255.*at least 256"):
            corpus.check(vocab_size=200, sequence_length=8)
        with pytest.raises(DataError, match="sequence_length is 1000000; the train split"):
            corpus.check(vocab_size=256, sequence_length=1_000_000)

    def test_fingerprint_follows_the_text(self, tmp_path):
        first = Corpus.open(write_corpus(tmp_path))
        same = Corpus.open(write_corpus(tmp_path, "same"))
        other = Corpus.open(write_corpus(tmp_path, "other", validation_fraction=0.3))
        assert first.fingerprint == same.fingerprint != other.fingerprint


def test_byte_tokenizer_round_trip():
    tokenizer = ByteTokenizer()
    (tokens,) = tokenizer.encode_batch(["héllo\n"])
    assert tokenizer.decode([*tokens, tokenizer.end_of_document]) == "héllo\n"


class TestStdlib:
    def test_a_fixed_tenth_of_the_files_is_held_out(self):
        splits = {path: split for path, split, _ in stdlib_documents()}
        assert 0.05 < list(splits.values()).count("validation") / len(splits) < 0.15
        assert not any("test" in path.split("/") or "site-packages" in path for path in splits)

    def test_it_is_made_once_and_then_found(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        first = open_corpus("stdlib")
        modified = first.directory.stat().st_mtime_ns
        again = open_corpus("stdlib")
        assert (again.directory, again.fingerprint) == (first.directory, first.fingerprint)
        assert again.directory.stat().st_mtime_ns == modified
        assert len(first.train) > 5e6
        assert [p.name for p in (tmp_path / "gqe_jax").iterdir()] == [first.directory.name]


class TestOrder:
    def seen(self, steps, rows=slice(None), **kwargs):
        options = {"batch_size": 4, "windows": 13, "seed": 0, **kwargs}
        return np.concatenate([window_indices(step, rows, **options) for step in steps])

    def test_every_epoch_is_another_permutation(self):
        order = self.seen(range(13)).reshape(4, 13)  # 13 steps of 4 rows are 4 epochs of 13
        for epoch in order:
            assert sorted(epoch) == list(range(13))
        assert len({tuple(epoch) for epoch in order}) == 4

    def test_it_depends_on_the_seed(self):
        assert list(self.seen(range(3))) != list(self.seen(range(3), seed=1))

    def test_processes_share_a_step_without_overlap(self):
        halves = [self.seen([5], range(2)), self.seen([5], range(2, 4))]
        np.testing.assert_array_equal(np.concatenate(halves), self.seen([5]))

    def test_it_stays_what_it_was(self):
        """Resuming an old run must see the data it was due: a change here breaks every run."""
        assert self.seen([0, 100]).tolist() == [12, 8, 11, 7, 2, 9, 0, 4]


class TestBatches:
    def batches(self, corpus, start, stop, rows=range(4), **config):
        return list(
            training_batches(
                corpus.train,
                DataConfig(read_threads=2, prefetch=2, **config),
                start=start,
                stop=stop,
                rows=rows,
                batch_size=4,
                sequence_length=16,
                seed=3,
            )
        )

    def test_a_batch_is_a_function_of_the_step_alone(self, tmp_path):
        corpus = Corpus.open(write_corpus(tmp_path))
        through = self.batches(corpus, 0, 12)
        resumed = self.batches(corpus, 7, 12)
        assert len(through) == 12
        for a, b in zip(through[7:], resumed, strict=True):
            np.testing.assert_array_equal(a.inputs, b.inputs)
        first = self.batches(corpus, 7, 8, rows=range(2, 4))[0]
        np.testing.assert_array_equal(first.inputs, through[7].inputs[2:])

    def test_targets_are_the_next_tokens_of_the_stream(self, tmp_path):
        corpus = Corpus.open(write_corpus(tmp_path))
        stream = corpus.train.read(0, len(corpus.train))
        batch = self.batches(corpus, 2, 3)[0]
        windows = window_indices(
            2, slice(None), batch_size=4, windows=(len(stream) - 1) // 16, seed=3
        )
        for row, window in enumerate(windows):
            np.testing.assert_array_equal(batch.inputs[row], stream[16 * window :][:16])
            np.testing.assert_array_equal(batch.targets[row], stream[16 * window + 1 :][:16])
        assert batch.segment_ids is None
        assert batch.weights.all()

    def test_document_masking_numbers_the_documents_of_a_window(self, tmp_path):
        corpus = Corpus.open(write_corpus(tmp_path))
        batches = self.batches(corpus, 0, 5, document_masking=True)
        tokens = np.concatenate([batch.inputs for batch in batches])
        segments = np.concatenate([batch.segment_ids for batch in batches])
        assert (tokens == 255).any()
        for row, ids in zip(tokens, segments, strict=True):
            expected = 1
            for token, segment in zip(row, ids, strict=True):
                assert segment == expected
                expected += token == 255  # the end belongs to the document that it ends

    def test_evaluation_predicts_every_token_once(self, tmp_path):
        corpus = Corpus.open(write_corpus(tmp_path))
        split = corpus.validation
        options = {"rows": range(4), "batch_size": 4, "sequence_length": 16}
        count, batches = evaluation_batches(split, DataConfig(), **options)
        batches = list(batches)
        assert len(batches) == count
        scored = np.concatenate([b.targets[b.weights > 0] for b in batches])
        np.testing.assert_array_equal(scored, split.read(0, len(split))[1:])
        limited, some = evaluation_batches(split, DataConfig(), **options, limit=2)
        assert limited == len(list(some)) == 2
