"""Files on local disks and in object stores (`gs://`, `s3://`, `hf://`, ...), the latter by fsspec.

Object stores have no appending, no renaming and no half-written objects: what a run appends to is
kept on a local disk and copied whole from time to time.
"""

import contextlib
import glob
import os
import pathlib
import tempfile
from collections.abc import Iterator

import fsspec
from upath import UPath

from gqe_jax.config import ConfigError

_EXTRAS = {"gs": "gcs", "gcs": "gcs"}


def location(name: str | os.PathLike) -> pathlib.Path | UPath:
    """The path that a name means: local, `file://` too, or an object store's URL.

    Raises:
      ConfigError: nothing is installed that speaks the URL's protocol.
    """
    if isinstance(name, UPath | pathlib.Path):
        return name
    text = os.fspath(name)
    protocol, separator, rest = text.partition("://")
    if not separator:
        return pathlib.Path(text)
    if protocol == "file":
        return pathlib.Path(rest)
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'gqe-jax[{extra}]'" if extra else str(error)
        raise ConfigError(f"{text!r} needs what is not installed: {remedy}") from error
    return UPath(text)


def is_remote(path: pathlib.Path | UPath) -> bool:
    """Whether a path of `location` is in an object store."""
    return isinstance(path, UPath)


def find(pattern: str) -> list[pathlib.Path | UPath]:
    """The files that a glob pattern matches, in order."""
    if "://" not in pattern or pattern.startswith("file://"):
        found = sorted(glob.glob(pattern.removeprefix("file://"), recursive=True))
        return [path for path in map(pathlib.Path, found) if path.is_file()]
    location(pattern)
    system, path = fsspec.core.url_to_fs(pattern)
    details = system.glob(path, detail=True)
    names = sorted(name for name, info in details.items() if info["type"] == "file")
    return [location(system.unstrip_protocol(name)) for name in names]


def file_sizes(directory: pathlib.Path | UPath) -> dict[str, int]:
    """Bytes of each file of a directory, by name; of an object store in one request."""
    if not is_remote(directory):
        return {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}
    found = directory.fs.ls(directory.path, detail=True)
    return {info["name"].rpartition("/")[2]: info["size"] for info in found}


def write_whole(path: pathlib.Path | UPath, content: str | bytes) -> None:
    """Writes a file so that no reader ever finds a part of it; makes its directory."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def copy_tree(source: pathlib.Path, target: pathlib.Path | UPath) -> None:
    """Copies the files below a local directory to `target`."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            write_whole(target / path.relative_to(source).as_posix(), path.read_bytes())


@contextlib.contextmanager
def local_scratch(path: pathlib.Path | UPath) -> Iterator[pathlib.Path]:
    """A local directory: `path` itself, or for an object store one that is deleted at the end."""
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="gqe-jax-") as scratch:
            yield pathlib.Path(scratch)
    else:
        path.mkdir(parents=True, exist_ok=True)
        yield path
