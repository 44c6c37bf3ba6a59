"""Changes files that are read, again and again, and looks at what reading them does.

    python -m tests.gqe_jax.fuzz --cases 10000 --seed 0

A file is accepted, or refused with a `UserError` within seconds. Nothing is executed, and nothing
outside the named directories is opened or written. A file that fails is printed as its first bytes,
and kept whole in --keep.
"""

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import hashlib
import io
import json
import os
import pathlib
import resource
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import jax
import numpy as np
import tokenizers
import tqdm
from flax import nnx
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from gqe_jax.config import AttentionConfig, DataConfig, MeshConfig, ModelConfig, RunConfig
from gqe_jax.config_json import to_dict
from gqe_jax.data.corpus import Corpus
from gqe_jax.data.prepare import PrepareConfig, prepare
from gqe_jax.data.special_tokens import companions
from gqe_jax.data.stdlib import open_corpus
from gqe_jax.data.tokenizers import encode_prompt, load_tokenizer
from gqe_jax.errors import UserError
from gqe_jax.interop import hf_config
from gqe_jax.interop.import_weights import ImportConfig, import_weights, read_model
from gqe_jax.interop.layout import torch_reader, torch_shapes
from gqe_jax.interop.tensors import write_tensors
from gqe_jax.model.transformer import Transformer
from gqe_jax.report.curves import Curves
from gqe_jax.runs import Run, find_config, load_config, restore_run, write_config
from gqe_jax.sharding import make_mesh
from gqe_jax.training.checkpoint import Checkpoints
from gqe_jax.training.lock import RunLock
from gqe_jax.training.state import lay_out_state
from gqe_jax.training.telemetry import METRICS_FILE, read_metrics
from tests.gqe_jax import special
from tests.gqe_jax.mutations import changed_file

SECONDS = 10
"""That reading one file may take."""
MEMORY = 4 << 30
"""Bytes that reading all files may add to this process."""
REPOSITORY = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Kind:
    """Files of one kind, and how they are read."""

    name: str
    make: Callable[[pathlib.Path], list[str]]
    """Writes them into a directory and returns the names of those to change."""
    read: Callable[[pathlib.Path], Any]
    share: int = 4
    """Of the cases; less where reading takes longer."""


def run_config(corpus: str = "stdlib") -> RunConfig:
    model = ModelConfig(
        attention=AttentionConfig(embed_dim=8, num_query_experts=2, num_kv_heads=1),
        num_layers=1,
        mlp_dim=8,
        vocab_size=256,
        dtype="float32",
    )
    return RunConfig(model=model, data=DataConfig(corpus=corpus), batch_size=8, sequence_length=8)


def make_run_config(directory: pathlib.Path) -> list[str]:
    write_config(run_config(), directory)
    return ["config.json"]


def read_run_config(directory: pathlib.Path) -> None:
    config = load_config(directory)
    find_config(str(directory))
    with contextlib.suppress(UserError):
        config.mesh.resolve(jax.device_count())


def hugging_face_fields() -> dict[str, Any]:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    return {
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": scaling,
        "tie_word_embeddings": True,
        "max_position_embeddings": 128,
        "eos_token_id": [3, 4],
        "bos_token_id": 1,
        "initializer_range": 0.02,
    }


def make_model(directory: pathlib.Path, max_shard_bytes: int = 1 << 30) -> None:
    directory.mkdir()
    fields = hugging_face_fields()
    (directory / "config.json").write_text(json.dumps(fields))
    config = hf_config.to_model_config(fields, dtype="float32")
    params = nnx.state(Transformer(config, rngs=nnx.Rngs(0)), nnx.Param)
    read = torch_reader(config, params)
    shapes = torch_shapes(config)
    write_tensors(directory, shapes, read, np.dtype("f4"), max_shard_bytes=max_shard_bytes)


def make_hugging_face_config(directory: pathlib.Path) -> list[str]:
    make_model(directory)
    return ["config.json"]


def make_routed_config(directory: pathlib.Path) -> list[str]:
    """As an export of a routed model has it."""
    directory.mkdir()
    model = run_config().model
    params = nnx.state(Transformer(model, rngs=nnx.Rngs(0)), nnx.Param)
    fields = {"model_type": "gqe", "model": to_dict(model), "max_position_embeddings": 8}
    (directory / "config.json").write_text(json.dumps(fields))
    read = torch_reader(model, params)
    write_tensors(directory, torch_shapes(model), read, np.dtype("f4"), max_shard_bytes=1 << 30)
    return ["config.json"]


def make_safetensors(directory: pathlib.Path) -> list[str]:
    make_model(directory)
    return ["model.safetensors"]


def make_index(directory: pathlib.Path) -> list[str]:
    make_model(directory, max_shard_bytes=2000)
    shutil.copytree(directory, directory.parent / "outside", dirs_exist_ok=True)
    return ["model.safetensors.index.json"]


def read_weights(directory: pathlib.Path) -> None:
    read_model(directory, "float32")


def read_model_directory(directory: pathlib.Path) -> None:
    shutil.rmtree(directory / "run", ignore_errors=True)
    import_weights(ImportConfig(directory, directory / "run"))


def make_manifest(directory: pathlib.Path) -> list[str]:
    source = directory.parent / "texts.jsonl"
    texts = (json.dumps({"text": f"the group of query {i}"}) for i in range(40))
    source.write_text("\n".join(texts))
    config = PrepareConfig(
        (str(source),), str(directory), validation_fraction=0.3, processes=1, shard_tokens=200
    )
    prepare(config, progress=False)
    return ["manifest.json"]


def read_corpus(directory: pathlib.Path) -> None:
    corpus: Corpus = open_corpus(str(directory))
    for split in (corpus.train, corpus.validation):
        split.read_many([0, len(split) // 2], 50)
    corpus.check(vocab_size=256, sequence_length=8)
    corpus.tokenizer()


def make_metrics(directory: pathlib.Path) -> list[str]:
    directory.mkdir()
    shared = {"learning_rate": 1e-3, "grad_norm": 1.0, "clipped_grad_norm": 1.0}
    shared |= {"expert_load": [[[0.5, 0.5]]], "router_entropy": [[0.6]]}
    lines: list[dict] = [{"step": step, "loss": 5.0 - step, **shared} for step in range(1, 4)]
    lines.insert(2, {"step": 2, "eval_loss": 3.0, "eval_bits_per_byte": 4.0})
    (directory / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [METRICS_FILE]


def read_all_metrics(directory: pathlib.Path) -> None:
    read_metrics(directory)
    Curves.read(directory)


def make_checkpoint(directory: pathlib.Path) -> list[str]:
    config = dataclasses.replace(run_config(), run_dir=str(directory))
    layout = lay_out_state(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(layout.init(), config, "none", 2.0, 64)
    (step,) = (directory / "checkpoints").iterdir()
    names = ["run/metadata", "metrics/metrics"] * 3 + ["_CHECKPOINT_METADATA", "params/_METADATA"]
    return [str((step / name).relative_to(directory)) for name in names]


def read_checkpoint(directory: pathlib.Path) -> None:
    with contextlib.suppress(UserError):
        Run.find(directory, "best")
    restore_run(directory)


def make_tokenizer(directory: pathlib.Path) -> list[str]:
    special.write(
        directory,
        config=hugging_face_fields(),
        tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>"}},
        generation_config={"eos_token_id": [3, 4], "do_sample": True, "temperature": 0.5},
        huggingface={"eos_token_id": 3, "bos_token_id": 1, "max_position_embeddings": 64},
    )
    write_other_tokenizers(directory)
    return ["tokenizer.json", *(f"{name}/tokenizer.json" for name in TOKENIZERS)]


TOKENIZERS = ("bpe", "unigram", "wordpiece")


def write_other_tokenizers(directory: pathlib.Path) -> None:
    """One of each other model, with as many of the library's other parts as fit together."""
    letters = " </s>abcdefghijklmnopqrstuvwxyzPQRĠĊ▁"
    vocabulary = {text: i for i, text in enumerate(["<s>", "</s>", "[UNK]", *letters, "##e", "th"])}
    bpe = tokenizers.Tokenizer(models.BPE(vocabulary, [("t", "h")], unk_token="[UNK]"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("Q", "q")])
    pattern = tokenizers.Regex(r"\w+|\s+|[^\w\s]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    bpe.enable_truncation(8, stride=2)
    scores = [(text, -float(i)) for text, i in vocabulary.items()]
    unigram = tokenizers.Tokenizer(models.Unigram(scores, unk_id=2, byte_fallback=False))
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("▁")])
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip()]
    )
    unigram.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    unigram.enable_padding(length=16, pad_id=1, pad_token="</s>")
    wordpiece = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece()
    wordpiece.post_processor = processors.BertProcessing(("</s>", 1), ("<s>", 0))
    for name, made in zip(TOKENIZERS, (bpe, unigram, wordpiece), strict=True):
        made.add_special_tokens(["<s>", "</s>"])
        (directory / name).mkdir()
        made.save(str(directory / name / "tokenizer.json"))


def make_companions(directory: pathlib.Path) -> list[str]:
    make_tokenizer(directory)
    return ["tokenizer_config.json", "generation_config.json", "huggingface.json", "config.json"]


def read_tokenizer(directory: pathlib.Path) -> None:
    companions(directory)
    for path in sorted(directory.rglob("tokenizer.json")):
        tokenizer = load_tokenizer(path)
        texts = ["the query expert of Paris", "is </s> a group\n", "", "aaaaaaaaaaaaaaaaaaaaaaaa é"]
        documents = tokenizer.encode_documents(texts)
        tokenizer.decode_documents(documents)
        tokenizer.decode(encode_prompt(tokenizer, texts[1]))


def make_lock(directory: pathlib.Path) -> list[str]:
    directory.mkdir()
    with RunLock(directory):
        (lock,) = directory.glob("*.lock")
        content = json.loads(lock.read_text())
    lock.write_text(json.dumps(content | {"pid": 2**22 + 1}))
    return [lock.name]


def read_lock(directory: pathlib.Path) -> None:
    with RunLock(directory, lease=0.01):
        pass


KINDS = [
    Kind("config.json of a run", make_run_config, read_run_config),
    Kind("config.json of Hugging Face", make_hugging_face_config, read_model_directory, 2),
    Kind("config.json of an export", make_routed_config, read_model_directory, 2),
    Kind("safetensors", make_safetensors, read_weights),
    Kind("safetensors index", make_index, read_weights),
    Kind("manifest of a corpus", make_manifest, read_corpus),
    Kind("metrics.jsonl", make_metrics, read_all_metrics),
    Kind("JSON of a checkpoint", make_checkpoint, read_checkpoint, 1),
    Kind("tokenizer.json", make_tokenizer, read_tokenizer),
    Kind("files beside tokenizer.json", make_companions, read_tokenizer),
    Kind("lock of a run", make_lock, read_lock),
]


class Hang(BaseException):
    """Reading takes too long."""


class Watch:
    """Sees what this process opens and executes while files are read; Python cannot remove it."""

    def __init__(self) -> None:
        self.directory: pathlib.Path | None = None
        self.found: list[str] = []
        names = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib")]
        code = [REPOSITORY, sys.prefix, sys.base_prefix, *names, *filter(None, sys.path)]
        self._code = tuple({os.path.realpath(path) + os.sep for path in code})
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.directory is None:
            return
        if event in ("open", "os.listdir", "os.scandir"):
            self._opened(event, *arguments[:1], *arguments[2:3])
        elif event == "os.rename":
            for path, folder in zip(arguments[:2], arguments[2:], strict=True):
                self._opened(event, self._absolute(path, folder), os.O_WRONLY)
        elif event in ("os.remove", "os.mkdir", "os.rmdir", "os.chmod"):
            self._opened(event, self._absolute(arguments[0], arguments[-1]), os.O_WRONLY)
        elif event == "exec" and arguments[0].co_filename == "<string>":
            # Libraries define functions so, as dataclasses do.
            if not any(isinstance(each, types.CodeType) for each in arguments[0].co_consts):
                self.found.append(f"{event} {arguments[0].co_names}")
        elif event.startswith(("pickle.", "os.system", "os.exec", "subprocess.", "socket.connect")):
            self.found.append(f"{event} {arguments[:1]}")

    def _absolute(self, path: Any, folder: int) -> str:
        """The path of an operation that may be relative to an open directory."""
        base = os.getcwd() if folder < 0 else os.readlink(f"/proc/self/fd/{folder}")
        return os.path.join(base, os.fsdecode(path))

    def _opened(self, event: str, path: Any, flags: int = 0) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a file descriptor
        real = os.path.realpath(os.fsdecode(path)) + os.sep
        if real.startswith(str(self.directory) + os.sep):
            return
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not writes and real.startswith((*self._code, "/proc/", "/sys/", "/dev/")):
            return
        self.found.append(f"{event} {real}")

    @contextlib.contextmanager
    def on(self, directory: pathlib.Path) -> Iterator[None]:
        self.directory, self.found = directory.resolve(), []
        try:
            yield
        finally:
            self.directory = None


WATCH: list[Watch] = []


@dataclasses.dataclass
class Tally:
    """What became of the cases of one kind."""

    kind: Kind
    refused: int = 0
    accepted: int = 0
    failures: dict[str, tuple[int, str, bytes]] = dataclasses.field(default_factory=dict)
    """Number, name of the file and shortest content of each failure."""
    messages: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    @property
    def failed(self) -> int:
        return sum(number for number, _, _ in self.failures.values())


def attempt(kind: Kind, directory: pathlib.Path) -> tuple[str, str]:
    """`accepted`, `refused` or a failure, and the message."""

    def hang(*_: Any) -> None:
        raise Hang(f"more than {SECONDS} s")

    earlier = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    outcome, message = "accepted", ""
    try:
        with (
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
            WATCH[0].on(directory),
        ):
            kind.read(directory)
    except UserError as error:
        outcome, message = "refused", str(error)
        if any(line.startswith("Traceback (") for line in message.splitlines()):
            outcome = "a traceback in the message"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also of Rust, which panics with one of its own
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if frame.filename.startswith(str(REPOSITORY))]
        place = f"{pathlib.Path(ours[-1].filename).name}:{ours[-1].lineno}"
        outcome = f"{type(error).__name__} at {place}: {str(error)[:100]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    if WATCH[0].found:
        outcome = f"outside the directory: {WATCH[0].found[0]}"
    return outcome, message


def fuzz(kind: Kind, cases: int, seed: int, scratch: pathlib.Path, bar: Any = None) -> Tally:
    """Reads `cases` changed files of a kind."""
    if not WATCH:
        WATCH.append(Watch())
    root = scratch / hashlib.sha256(kind.name.encode()).hexdigest()[:8]
    original, directory = root / "original", root / "changed"
    root.mkdir()
    names = kind.make(original)
    contents = {name: (original / name).read_bytes() for name in names}
    tally = Tally(kind)

    def fresh() -> None:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(original, directory)

    fresh()
    for _ in range(2):  # whatever is imported or compiled first
        outcome, message = attempt(kind, directory)
    assert outcome == "accepted", (kind.name, outcome, message)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.data())
    def case(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(names))
        content = data.draw(changed_file(name, contents[name]))
        if not (directory / name).exists() or kind.read is read_lock:
            fresh()
        (directory / name).write_bytes(content)
        faulthandler.dump_traceback_later(10 * SECONDS, exit=True)  # a hang in native code
        outcome, message = attempt(kind, directory)
        faulthandler.cancel_dump_traceback_later()
        (directory / name).write_bytes(contents[name])
        tally.accepted += outcome == "accepted"
        tally.refused += outcome == "refused"
        tally.messages[message.replace(str(directory), "")[:160]] += 1
        if outcome not in ("accepted", "refused"):
            number, _, shortest = tally.failures.get(outcome, (0, "", content))
            tally.failures[outcome] = (number + 1, name, min(shortest, content, key=len))
        if bar is not None:
            bar.update()

    case()
    return tally


def table(tallies: list[Tally]) -> str:
    rows = [("file", "cases", "refused", "accepted", "failures")]
    for tally in tallies:
        cases = tally.refused + tally.accepted + tally.failed
        figures = (cases, tally.refused, tally.accepted, tally.failed)
        rows.append((tally.kind.name, *map(str, figures)))
    total = (str(sum(int(row[i]) for row in rows[1:])) for i in range(1, 5))
    rows.append(("all", *total))
    return "\n".join(f"| {a:<27} | {b:>6} | {c:>7} | {d:>8} | {e:>8} |" for a, b, c, d, e in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.gqe_jax.fuzz")
    parser.add_argument("--cases", type=int, default=10_000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="only those whose name contains this")
    parser.add_argument("--keep", type=pathlib.Path, help="directory for the files that failed")
    parser.add_argument("--messages", action="store_true", help="print the refusals")
    arguments = parser.parse_args()
    kinds = [kind for kind in KINDS if arguments.kind is None or arguments.kind in kind.name]
    tallies = []
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as scratch,
        tqdm.tqdm(total=arguments.cases, unit="case", mininterval=5) as bar,
    ):
        for number, kind in enumerate(kinds):
            done = sum(each.share for each in kinds[:number]), sum(each.share for each in kinds)
            first, last = (arguments.cases * n // done[1] for n in (done[0], done[0] + kind.share))
            bar.set_description(kind.name)
            tallies.append(fuzz(kind, last - first, arguments.seed, pathlib.Path(scratch), bar))
            if number == 0:  # after XLA has its threads
                used = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
                limit = used * resource.getpagesize() + MEMORY
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(table(tallies))
    print(f"{time.monotonic() - began:.0f} s, seed {arguments.seed}")
    for tally in tallies:
        if arguments.messages:
            for message, number in tally.messages.most_common():
                print(f"{tally.kind.name}: {number} × {message!r}")
        for failure, (number, name, content) in tally.failures.items():
            print(f"{tally.kind.name}: {number} × {failure}\n    {name}: {content[:300]!r}")
            if arguments.keep:
                path = arguments.keep / hashlib.sha256(content).hexdigest()[:8]
                path.mkdir(parents=True, exist_ok=True)
                (path / pathlib.Path(name).name).write_bytes(content)
    return int(any(tally.failures for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
