"""Corpora: how they are checked, and the order in which they are seen."""

import os

import numpy as np
import pytest

from gqe_jax.config import DataConfig
from gqe_jax.data import (
    Corpus,
    DataError,
    evaluation_batches,
    open_corpus,
    training_batches,
    window_indices,
)
from gqe_jax.data.stdlib import stdlib_documents
from gqe_jax.data.tokenizers import ByteTokenizer
from tests.gqe_jax.texts import write_corpus


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
                "dtype": text.replace('"<u2"', '"<f2"'),
                "largest": text.replace('"max_token": 255', '"max_token": 65536'),
                "sum": text.replace('"num_tokens": ', '"num_tokens": 1', 1),
                "nested": "[" * 100_000,
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
            ("dtype", "manifest.json is damaged .dtype is '<f2'; it must be one of <u2, <u4"),
            ("largest", "splits.train.max_token is 65536; <u2 cannot hold it"),
            ("sum", r"splits.train.num_tokens is 1\d+; its shards' are"),
            ("nested", "manifest.json is not JSON"),
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
