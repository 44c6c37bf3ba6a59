"""Corpora and runs in an object store: fsspec's memory stands in for one."""

import dataclasses
import io
import json
import pathlib

import fsspec
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gqe_jax.commands import parse
from gqe_jax.config import ConfigError
from gqe_jax.data.corpus import Corpus, DataError
from gqe_jax.data.pipeline import read_windows
from gqe_jax.data.prepare import PrepareConfig, prepare
from gqe_jax.report.curves import draw
from gqe_jax.runs import load_config, write_config
from gqe_jax.storage import find, is_remote, location, write_whole
from gqe_jax.training.checkpoint import Checkpoints
from gqe_jax.training.telemetry import Telemetry, read_metrics
from tests.gqe_jax.runs import small_config


@pytest.fixture
def bucket():
    """The URL of an empty store."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield "memory://bucket"
    store.store.clear()


def write_parquet(url: str, texts: list[str]) -> None:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), buffer)
    write_whole(location(url), buffer.getvalue())


def test_a_corpus_in_a_store_is_that_on_a_disk(bucket, tmp_path):
    texts = [f"document {i} " + "word " * (i % 7) for i in range(60)]
    for part in range(3):
        write_parquet(f"{bucket}/raw/{part}.parquet", texts[part::3])
        write_parquet(str(tmp_path / f"raw/{part}.parquet"), texts[part::3])
    options = {"validation_fraction": 0.2, "shard_tokens": 100, "processes": 1}
    for source, output in (
        (f"{bucket}/raw/*.parquet", f"{bucket}/corpus"),
        (str(tmp_path / "raw/*.parquet"), str(tmp_path / "corpus")),
        (f"file://{tmp_path}/raw/*.parquet", f"file://{tmp_path}/again"),
    ):
        prepare(PrepareConfig((source,), output, **options), progress=False)
    stored, local = Corpus.open(f"{bucket}/corpus"), Corpus.open(tmp_path / "corpus")
    assert stored.fingerprint == local.fingerprint == Corpus.open(tmp_path / "again").fingerprint
    assert len(stored.train.info.shards) > 3
    windows = np.array([7, 0, 3, len(local.train) // 40])  # the last beyond the end
    for masking in (False, True):
        ours, theirs = (read_windows(c.train, windows, 40, masking) for c in (stored, local))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_corpus_in_a_store_is_opened_by_a_few_requests(bucket, monkeypatch):
    """The whole of FineWeb-Edu has thousands of shards, and every host opens it."""
    write_parquet(f"{bucket}/raw.parquet", [f"text {i}" for i in range(60)])
    config = PrepareConfig((f"{bucket}/raw.parquet",), f"{bucket}/corpus", shard_tokens=20)
    config = dataclasses.replace(config, validation_fraction=0.2)
    assert len(prepare(config, progress=False).splits["train"].shards) > 10
    asked, memory = [], fsspec.filesystem("memory")
    for request in ("info", "ls", "exists", "isfile"):
        method = getattr(type(memory), request)

        def counted(*args, method=method, **kwargs):
            asked.append(args)
            return method(*args, **kwargs)

        monkeypatch.setattr(type(memory), request, counted)
    Corpus.open(f"{bucket}/corpus")
    assert 0 < len(asked) < 10


def test_a_failed_preparation_leaves_nothing_in_the_store(bucket):
    write_parquet(f"{bucket}/raw/0.parquet", ["one", "two"])
    write_whole(location(f"{bucket}/raw/1.parquet"), b"no parquet")
    with pytest.raises(DataError, match="cannot be read"):
        prepare(PrepareConfig((f"{bucket}/raw/*",), f"{bucket}/corpus"), progress=False)
    assert not location(f"{bucket}/corpus").exists()
    assert len(find(f"{bucket}/raw/*")) == 2


def test_a_preparation_in_the_store_goes_on_from_its_finished_parts(bucket):
    texts = [f"text {i}" for i in range(50)]
    write_parquet(f"{bucket}/raw/0.parquet", texts)
    write_parquet(f"{bucket}/raw/1.parquet", [*texts, None])
    config = PrepareConfig((f"{bucket}/raw/*",), f"{bucket}/corpus", processes=1)
    config = dataclasses.replace(config, validation_fraction=0.2)
    with pytest.raises(DataError, match=r"1\.parquet, row 51.*finished is kept"):
        prepare(config, progress=False, task_bytes=1)
    (part,) = find(f"{bucket}/corpus/parts/*.json")
    begun = {path.name: path.stat().st_mtime for path in find(f"{bucket}/corpus/*-00000-*")}
    assert (part.name, len(begun)) == ("00000.json", 2)
    with pytest.raises(DataError, match=r"no manifest\.json"):
        Corpus.open(f"{bucket}/corpus")
    skip = dataclasses.replace(config, on_error="skip")
    manifest = prepare(skip, progress=False, task_bytes=1)
    assert sum(split.num_documents for split in manifest.splits.values()) == 100
    made = {path.name: path.stat().st_mtime for path in find(f"{bucket}/corpus/**")}
    assert begun.items() <= made.items()
    assert len(made) == 5
    assert len(Corpus.open(f"{bucket}/corpus").train) > 100


def test_a_shard_cut_short_in_the_store_is_named(bucket):
    write_parquet(f"{bucket}/raw.parquet", [f"text {i}" for i in range(50)])
    config = PrepareConfig((f"{bucket}/raw.parquet",), f"{bucket}/corpus", validation_fraction=0.2)
    manifest = prepare(config, progress=False)
    shard = location(f"{bucket}/corpus") / manifest.splits["train"].shards[0].file
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"memory://bucket/corpus/train.* bytes, the manifest says"):
        Corpus.open(f"{bucket}/corpus")


def test_metrics_reach_the_store_at_every_sync_and_are_taken_up_again(bucket):
    def telemetry(start):
        return Telemetry(
            f"{bucket}/run",
            start=start,
            steps=4,
            flops_per_token=1.0,
            devices=jax.devices()[:1],
            stream=io.StringIO(),
        )

    metrics = dict.fromkeys(("grad_norm", "clipped_grad_norm", "learning_rate"), 1.0) | {
        "loss": 2.0
    }
    with telemetry(0) as first:
        first.training(1, metrics, 10)
        assert read_metrics(f"{bucket}/run") == []
        first.sync()
        assert [line["step"] for line in read_metrics(f"{bucket}/run")] == [1]
        first.training(2, metrics, 10)
        first.training(3, metrics, 10)
    with telemetry(2) as second:
        # Nobody, `train` above all, takes the lines from before for those of steps to come.
        assert [line["step"] for line in read_metrics(f"{bucket}/run")] == [1, 2]
        second.training(3, metrics | {"loss": 1.0}, 10)
    lines = read_metrics(f"{bucket}/run")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 2.0), (2, 2.0), (3, 1.0)]
    events = find(f"{bucket}/run/tensorboard/*")
    assert len(events) == 2
    assert all(event.stat().st_size for event in events)
    for image in draw(f"{bucket}/run"):
        assert image.read_bytes().startswith(b"\x89PNG")


def test_a_configuration_in_the_store(bucket):
    config = small_config(f"{bucket}/corpus", f"{bucket}/run", steps=2)
    write_config(config)
    assert json.loads(location(f"{bucket}/run/config.json").read_text())["steps"] == 2
    assert load_config(f"{bucket}/run") == config


def test_what_cannot_be_reached_is_named(bucket, monkeypatch):
    with pytest.raises(ConfigError, match=r"run_dir is 'memory://.*a local or mounted directory"):
        Checkpoints(f"{bucket}/run")
    with pytest.raises(ConfigError, match="'nowhere://x' needs a missing package"):
        location("nowhere://x")

    def not_installed(protocol):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "get_filesystem_class", not_installed)
    with pytest.raises(ConfigError, match=r"'gs://b/run' needs .* pip install 'gqe-jax\[gcs\]'"):
        location("gs://b/run")


def test_a_name_that_exists_is_no_pattern(tmp_path, bucket):
    for name in ("data[1].jsonl", "data1.jsonl", "a[b]/1.jsonl", "a[b]/2.jsonl", "ab/3.jsonl"):
        write_whole(tmp_path / name, name)
        write_whole(location(f"{bucket}/{name}"), name)

    def found(pattern):
        return [path.relative_to(tmp_path).as_posix() for path in find(f"{tmp_path}/{pattern}")]

    assert found("data[1].jsonl") == ["data[1].jsonl"]
    assert found("data[12].js*") == ["data1.jsonl"]
    assert found("a[b]/*.jsonl") == ["a[b]/1.jsonl", "a[b]/2.jsonl"]
    assert found("a[bc]/*.jsonl") == ["ab/3.jsonl"]
    assert found("**/[23].jsonl") == ["a[b]/2.jsonl", "ab/3.jsonl"]
    assert found("data2.jsonl") == found("ab") == found("data1.jsonl/x") == []
    (path,) = find(f"{bucket}/data[1].jsonl")
    assert path.read_text() == "data[1].jsonl"


def test_home_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.txt").touch()
    assert location("~/x") == location(pathlib.Path("~/x")) == tmp_path / "x"
    assert find("~/*.txt") == [tmp_path / "x.txt"]
    assert location("x~/~") == pathlib.Path("x~/~")

    @dataclasses.dataclass(frozen=True)
    class Inner:
        files: tuple[pathlib.Path, ...] = ()

    @dataclasses.dataclass(frozen=True)
    class Options:
        text: str = ""
        output: pathlib.Path | None = None
        inner: Inner = Inner()

    arguments = ["--text=~/x", "--output=~/x", "--inner.files", "~/a", "b"]
    parsed = parse(Options, arguments, prog="test", description="")
    files = (tmp_path / "a", pathlib.Path("b"))
    assert parsed == Options("~/x", tmp_path / "x", Inner(files))


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "directory" / "file"
    write_whole(path, "first")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "second")
    assert path.read_text() == "first"
    assert not is_remote(path)
