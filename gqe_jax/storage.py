"""Files on local disks and, through fsspec, in object stores (`gs://`, `s3://`, `hf://`, ...).

Object stores can neither append nor rename, and they never show a partly written object. Files that
a run appends to are therefore written on a local disk and copied whole.
"""

import contextlib
import errno
import glob
import os
import pathlib
import tempfile
from collections.abc import Iterator

import fsspec
from typing_extensions import TypeIs
from upath import UPath

from gqe_jax.config import ConfigError

Location = pathlib.Path | UPath
"""A path on a local disk, or in an object store."""

_EXTRAS = {"gs": "gcs", "gcs": "gcs"}
# Failures of files that a user can mend, and what to do.
_REMEDIES = {
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space in the quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EACCES: "name a directory that this user can read and write",
    errno.EPERM: "name a directory that this user can read and write",
    errno.EROFS: "name a directory on a disk that can be written",
    errno.ENOTDIR: "a part of that path is a file; name a directory",
    errno.EISDIR: "name a file, not a directory",
    errno.EEXIST: "it exists already; name another path",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ELOOP: "its links lead in a circle",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ESTALE: "mount that disk again",
    errno.EIO: "the disk or its connection failed",
}
_IN_WORDS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)


def location(name: str | os.PathLike | UPath) -> Location:
    """Parses a path or URL: a `pathlib.Path` for local files and `file://`, else a `UPath`.

    A local path that begins with `~` or `~user` begins with that home directory.

    Raises:
      ConfigError: no installed package implements the URL's protocol.
    """
    if isinstance(name, UPath):
        return name
    text = os.fspath(name)
    protocol, separator, rest = text.partition("://")
    if not separator:
        return pathlib.Path(os.path.expanduser(text))
    if protocol == "file":
        return pathlib.Path(rest)
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'gqe-jax[{extra}]'" if extra else str(error)
        raise ConfigError(f"{text!r} needs a missing package: {remedy}") from error
    return UPath(text)


def cache_directory() -> pathlib.Path:
    """The directory of what is made on first use and kept: `$XDG_CACHE_HOME/gqe_jax`."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "gqe_jax"


def explain(error: BaseException) -> str | None:
    """A line on a failure of files or disks that a user can mend; None for another error.

    It also finds failures that a library wraps, by the cause or by the system's words for them.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        if isinstance(cause, OSError) and cause.errno in _REMEDIES:
            named = f"{cause.filename}: " if cause.filename else ""
            return f"{named}{os.strerror(cause.errno)}; {_REMEDIES[cause.errno]}"
        cause = cause.__cause__
    for cause in seen:
        for number in _IN_WORDS:
            for line in str(cause).splitlines():
                if os.strerror(number) in line:
                    return f"{line.strip()[:300]}; {_REMEDIES[number]}"
    return None


def is_remote(path: Location) -> TypeIs[UPath]:
    """Whether a path returned by `location` is in an object store."""
    return isinstance(path, UPath)


def find(pattern: str) -> list[Location]:
    """The files that match a glob pattern, sorted by name.

    What exists under the very name, a file or the first directories of the pattern, is that file or
    directory, also if its name has characters that mean something in a pattern.
    """
    named = location(pattern)
    if not is_remote(named):
        exists = next(filter(os.path.exists, (named, *named.parents)), None)
        if exists is None:
            return []
        if exists.is_file():
            return [named] if exists == named else []
        rest = named.relative_to(exists).as_posix()
        found = sorted(glob.glob(os.path.join(glob.escape(str(exists)), rest), recursive=True))
        return [path for path in map(pathlib.Path, found) if path.is_file()]
    system, path = fsspec.core.url_to_fs(pattern)
    if glob.has_magic(path) and system.isfile(path):
        return [named]
    details = system.glob(path, detail=True)
    names = sorted(name for name, info in details.items() if info["type"] == "file")
    return [location(system.unstrip_protocol(name)) for name in names]


def file_sizes(directory: Location) -> dict[str, int]:
    """Size in bytes of each file in a directory, by name; one request for an object store."""
    if not is_remote(directory):
        return {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}
    found = directory.fs.ls(directory.path, detail=True)
    return {info["name"].rpartition("/")[2]: info["size"] for info in found}


def write_whole(path: Location, content: str | bytes) -> None:
    """Writes a file atomically, and creates its directory: no reader sees a part of it."""
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


def copy_tree(source: pathlib.Path, target: Location) -> None:
    """Copies all files in a local directory tree to `target`."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            write_whole(target / path.relative_to(source).as_posix(), path.read_bytes())


@contextlib.contextmanager
def local_scratch(path: Location) -> Iterator[pathlib.Path]:
    """Yields a local directory: `path` itself, or for an object store a temporary one."""
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="gqe-jax-") as scratch:
            yield pathlib.Path(scratch)
    else:
        path.mkdir(parents=True, exist_ok=True)
        yield path
