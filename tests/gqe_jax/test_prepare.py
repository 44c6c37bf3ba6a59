"""Preparation: the tokens it stores, and what it leaves when it is stopped."""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers

from gqe_jax.data import (
    Corpus,
    DataError,
)
from gqe_jax.data.prepare import PrepareConfig, choose_split, prepare
from gqe_jax.data.tokenizers import load_tokenizer
from gqe_jax.whole_directory import written_whole
from tests.gqe_jax.signalled import PREPARE
from tests.gqe_jax.texts import ROWS, TEXTS, write_corpus

END = "<|endoftext|>"


def train_bpe() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def words(vocabulary: dict[str, int], unknown: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tokenizer


def write_lines(path: pathlib.Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


class TestTokens:
    """The tokens of a corpus hold the text of every document, and nothing else."""

    def prepare(self, tmp_path, tokenizer, texts, **fields):
        path = tmp_path / "tokenizer.json"
        text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
        path.write_text(text)
        source = write_lines(tmp_path / "texts.jsonl", texts)
        options = {"tokenizer": str(path), "processes": 1, "validation_fraction": 0.2} | fields
        prepare(PrepareConfig((source,), str(tmp_path / "corpus"), **options), progress=False)
        return Corpus.open(tmp_path / "corpus")

    def documents(self, corpus: Corpus) -> list[list[int]]:
        """The ids of all documents of both splits, each without its end."""
        found = []
        for split in (corpus.train, corpus.validation):
            ids = split.read(0, len(split))
            ends = np.flatnonzero(ids == split.end_of_document)
            found += [part[:-1].tolist() for part in np.split(ids, ends + 1)[:-1]]
        return found

    def test_truncation_and_padding_of_the_file_are_off(self, tmp_path):
        tokenizer = train_bpe()
        due = sum(len(each.ids) for each in tokenizer.encode_batch(TEXTS))
        tokenizer.enable_truncation(5)
        tokenizer.enable_padding(length=8)
        corpus = self.prepare(tmp_path, tokenizer, TEXTS)
        documents = self.documents(corpus)
        assert sum(map(len, documents)) == due
        (prompt,) = load_tokenizer(tmp_path / "tokenizer.json").encode_batch([TEXTS[6]])
        assert len(prompt) > 8
        tokenizer.no_truncation()
        tokenizer.no_padding()
        texts = tokenizer.decode_batch(documents, skip_special_tokens=False)
        assert sorted(texts) == sorted(TEXTS)
        num_bytes = corpus.train.info.num_bytes + corpus.validation.info.num_bytes
        assert num_bytes == len("".join(TEXTS).encode()) == len("".join(texts).encode())

    @pytest.mark.parametrize("largest", [65535, 65536, 70000])
    def test_the_largest_id_sizes_the_shards(self, tmp_path, largest):
        tokenizer = words({"a": 0, "<eos>": 1, "z": largest}, "a")
        corpus = self.prepare(tmp_path, tokenizer, [f"{'z ' * i}a" for i in range(40)])
        assert corpus.manifest.vocab_size == largest + 1
        assert corpus.train.info.max_token == largest
        ids = collections.Counter(itertools.chain(*self.documents(corpus)))
        assert ids == {largest: sum(range(40)), 0: 40}

    def test_an_id_that_no_batch_can_hold_is_refused(self, tmp_path):
        path = tmp_path / "tokenizer.json"
        content = json.loads(words({"a": 0, "<eos>": 1, "z": 2}, "a").to_str())
        content["model"]["vocab"]["z"] = (1 << 32) - 1
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match="has the token id 4294967295; ids must be less than"):
            load_tokenizer(path)

    @pytest.mark.parametrize("special", [True, False])
    def test_text_that_spells_the_end_of_document_is_text(self, tmp_path, special):
        content = json.loads(train_bpe().to_str())
        content["added_tokens"][0]["special"] = special
        texts = [f"about {END} and{END}, number {i}" for i in range(40)]
        corpus = self.prepare(tmp_path, json.dumps(content), texts)
        found = self.documents(corpus)
        assert corpus.train.info.num_documents + corpus.validation.info.num_documents == 40
        decoded = [tokenizers.Tokenizer.from_str(json.dumps(content)).decode(ids) for ids in found]
        assert sorted(decoded) == sorted(texts)
        # A prompt may still give the token by its name.
        (prompt,) = corpus.tokenizer().encode_batch([f"a{END}"])
        assert prompt[-1] == corpus.manifest.end_of_document

    def test_a_tokenizer_that_makes_the_end_of_other_text_is_refused(self, tmp_path, capsys):
        tokenizer = words({"a": 0, "<eos>": 1}, "<eos>")
        texts = ["a", "a b", *(["a " * i + "a" for i in range(40)])]
        with pytest.raises(DataError, match=r"texts\.jsonl, document 2: .*end-of-document token"):
            self.prepare(tmp_path, tokenizer, texts)
        corpus = self.prepare(tmp_path, tokenizer, texts, on_error="skip")
        assert len(self.documents(corpus)) == 41
        assert "skipped 1 records" in capsys.readouterr().err

    def test_documents_that_the_tokenizer_changes_are_counted(self, tmp_path, capsys):
        tokenizer = train_bpe()
        self.prepare(tmp_path, tokenizer, TEXTS)
        assert capsys.readouterr().err == ""
        tokenizer.normalizer = tokenizers.normalizers.Replace("7", "")
        (tmp_path / "corpus").rename(tmp_path / "whole")
        self.prepare(tmp_path, tokenizer, TEXTS)
        changed = sum("7" in text for text in TEXTS)
        shown = capsys.readouterr().err
        assert f"the tokens of {changed} of 300 documents do not decode to their text" in shown
        assert "texts.jsonl, document 8" in shown


@pytest.mark.slow
class TestInterruptedPreparation:
    @pytest.fixture
    def source(self, tmp_path):
        for number in range(4):
            (tmp_path / f"part-{number}.jsonl").write_bytes(ROWS)
        (tmp_path / "part-4.jsonl").write_bytes(ROWS * 300)  # long enough to be killed in
        return tmp_path

    def start(self, source):
        arguments = ["--input", "part-*.jsonl", "--output", "corpus", "--processes", "2"]
        return subprocess.Popen(
            [sys.executable, "-c", PREPARE, *arguments, "--validation-fraction", "0.2"],
            cwd=source,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finished(self, source) -> list[str]:
        found = source.glob(".corpus.partial-*/parts/*.json")
        return sorted(path.name for path in found)

    def interrupt(self, source, number):
        """Sends a signal when four parts are done and the fifth is not."""
        process = self.start(source)
        while len(self.finished(source)) < 4 and process.poll() is None:
            time.sleep(0.02)
        workers = self.children(process.pid)
        process.send_signal(number)
        _, shown = process.communicate()
        assert process.returncode != 0, "it was not interrupted in the last part"
        deadline = time.monotonic() + 60
        while any(map(self.runs, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(workers) >= 2
        assert not any(map(self.runs, workers))
        return process.returncode, shown

    def children(self, pid: int) -> list[int]:
        tasks = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
        return [int(child) for path in tasks for child in path.read_text().split()]

    def runs(self, pid: int) -> bool:
        try:
            return (
                pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
            )
        except OSError:
            return False

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_ends_it_and_leaves_nothing(self, source, number):
        before = {path.name for path in source.iterdir()}
        status, shown = self.interrupt(source, number)
        assert status == 128 + number
        assert f"{number.name}: stopping\n" in shown
        assert "Traceback" not in shown
        assert {path.name for path in source.iterdir()} == before

    def test_a_killed_worker_is_named(self, source):
        process = self.start(source)
        while len(self.finished(source)) < 4 and process.poll() is None:
            time.sleep(0.02)
        for child in self.children(process.pid):
            if b"spawn_main" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(child, signal.SIGKILL)  # not the tracker of resources
        _, shown = process.communicate()
        assert process.returncode == 1
        assert "error: processes is 2; a worker was killed" in shown
        assert "Traceback" not in shown

    def test_it_goes_on_after_a_kill(self, source):
        self.interrupt(source, signal.SIGKILL)
        (partial,) = source.glob(".corpus.partial-*")
        before = {p.name: p.stat().st_mtime_ns for p in partial.glob("*-0000[0-3]-*.bin")}
        assert len(before) == 8
        process = self.start(source)
        _, shown = process.communicate()
        assert process.returncode == 0, shown
        corpus = source / "corpus"
        after = {p.name: p.stat().st_mtime_ns for p in corpus.iterdir()}
        assert before.items() <= after.items()
        assert not list(source.glob(".corpus*"))
        inputs = tuple(str(path) for path in sorted(source.glob("part-*")))
        config = PrepareConfig(inputs, source / "once", validation_fraction=0.2, processes=1)
        prepare(config, progress=False, task_bytes=1)
        assert {p.name: p.read_bytes() for p in corpus.iterdir()} == {
            p.name: p.read_bytes() for p in (source / "once").iterdir()
        }

    def test_an_error_keeps_what_is_finished(self, tmp_path, capsys):
        (tmp_path / "1.jsonl").write_bytes(ROWS)
        (tmp_path / "2.jsonl").write_bytes(b'{"text": null}\n{"text": "x"}\n')
        config = PrepareConfig(
            (f"{tmp_path}/*.jsonl",), tmp_path / "corpus", validation_fraction=0.2, processes=1
        )
        with pytest.raises(DataError, match=r"2\.jsonl, line 1.*finished is kept"):
            prepare(config, progress=False, task_bytes=1)
        (partial,) = tmp_path.glob(".corpus*")
        kept = {p.name: p.stat().st_mtime_ns for p in partial.glob("*-00000-*.bin")}
        config = dataclasses.replace(config, on_error="skip")
        manifest = prepare(config, progress=False, task_bytes=1)
        assert sum(split.num_documents for split in manifest.splits.values()) == 301
        assert "skipped 1 records" in capsys.readouterr().err
        made = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "corpus").iterdir()}
        assert kept.items() <= made.items()
        assert not list(tmp_path.glob(".corpus*"))

    def test_what_another_preparation_left_is_removed_unless_it_runs(self, tmp_path):
        left = tmp_path / ".corpus.partial-0123"
        left.mkdir()
        (left / "train-00000-000.bin").touch()
        with written_whole(tmp_path / "corpus", "key"):
            assert not left.exists()
            with (
                pytest.raises(DataError, match="is being written by another process"),
                written_whole(tmp_path / "corpus", "key"),
            ):
                pass
        assert [path.name for path in tmp_path.iterdir()] == ["corpus"]

    def test_an_output_that_cannot_be_made_is_named(self, tmp_path):
        source = write_lines(tmp_path / "a.jsonl", TEXTS)
        with pytest.raises(DataError, match=r"output .*a\.jsonl/corpus cannot be made"):
            prepare(PrepareConfig((source,), f"{source}/corpus"), progress=False)


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

    def test_more_shards_than_a_process_may_open_files(self, tmp_path):
        whole = Corpus.open(write_corpus(tmp_path))
        cut = write_corpus(tmp_path, "cut", shard_tokens=80)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = len(os.listdir("/proc/self/fd"))
        assert len(list(cut.iterdir())) > 200
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 130, hard))
        try:
            corpus = Corpus.open(cut)
            for ours, theirs in (
                (corpus.train, whole.train),
                (corpus.validation, whole.validation),
            ):
                read, due = ours.read(0, len(ours)), theirs.read(0, len(theirs))
                np.testing.assert_array_equal(read, due)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

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
        tokenizer = train_bpe()
        path = tmp_path / "bpe.json"
        tokenizer.save(str(path))
        corpus = Corpus.open(write_corpus(tmp_path, tokenizer=str(path)))
        ids = corpus.train.read(0, len(corpus.train))
        assert ids.max() > 255
        assert corpus.train.end_of_document == tokenizer.token_to_id(END)
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
            ({"input": ("/tmp",)}, "matches no file; for its files, name '/tmp/"),
        ],
    )
    def test_failures_leave_nothing_behind(self, tmp_path, fields, message):
        (tmp_path / "a.jsonl").write_bytes(ROWS)
        options = {"input": (str(tmp_path / "a.jsonl"),), "processes": 1, **fields}
        with pytest.raises(ValueError, match=message):
            prepare(PrepareConfig(output=tmp_path / "corpus", **options), progress=False)
        assert {p.name for p in tmp_path.iterdir()} == {"a.jsonl"}

    @pytest.mark.parametrize(
        "fields", [{"validation_fraction": 1.5}, {"processes": 0}, {"on_error": "go"}]
    )
    def test_bad_fields_are_named(self, tmp_path, fields):
        with pytest.raises(DataError, match=next(iter(fields))):
            PrepareConfig(("a",), tmp_path / "corpus", **fields)
