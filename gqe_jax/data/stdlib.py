"""The default corpus: the installed Python standard library's source, one token per byte."""

import hashlib
import pathlib
import sysconfig
from collections.abc import Iterator

from gqe_jax.data.corpus import Corpus, write_manifest
from gqe_jax.data.shards import Document, make_manifest, write_documents
from gqe_jax.data.tokenizers import BYTE, ByteTokenizer
from gqe_jax.errors import DataError
from gqe_jax.storage import cache_directory
from gqe_jax.whole_directory import written_whole

STDLIB = "stdlib"
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def stdlib_documents() -> Iterator[tuple[str, str, str]]:
    """Yields (path, split, text) of each source file; a hash of the path holds out a tenth."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _LEFT_OUT & set(relative.parts):
            continue
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue  # a few files declare another encoding
        held_out = hashlib.sha256(relative.as_posix().encode()).digest()[0] % 10 == 0
        yield relative.as_posix(), "validation" if held_out else "train", text


def prepare_stdlib() -> pathlib.Path:
    """The corpus's cache directory, named by a hash of the text; written if it does not exist."""
    documents = list(stdlib_documents())
    digest = hashlib.sha256()
    for path, _, text in documents:
        digest.update(f"{path}\0{len(text)}\0{text}".encode())
    directory = cache_directory() / f"{STDLIB}-{digest.hexdigest()[:16]}"
    if not directory.exists():
        try:
            with written_whole(directory) as partial:
                tokenizer = ByteTokenizer()
                texts = [Document(split, text, path) for path, split, text in documents]
                splits = write_documents(partial, BYTE, texts, tokenizer, 1 << 28)
                write_manifest(partial, make_manifest(BYTE, tokenizer, splits))
        except (DataError, OSError):
            if not directory.exists():  # otherwise another process wrote the same corpus first
                raise
    return directory


def open_corpus(name: str, *, verify: bool = True) -> Corpus:
    """Opens `stdlib`, or a directory written by `python -m gqe_jax.data.prepare`.

    Raises:
      DataError: the corpus does not exist or is damaged.
    """
    return Corpus.open(prepare_stdlib() if name == STDLIB else name, verify=verify)
