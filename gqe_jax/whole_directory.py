"""A directory that appears whole or not at all, and that one process writes at a time."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator

from gqe_jax.errors import DataError
from gqe_jax.storage import Location, is_remote

PARTS = "parts"


@contextlib.contextmanager
def written_whole(
    directory: Location,
    key: str | None = None,
    keep: Callable[[Location], bool] = lambda partial: False,
) -> Iterator[Location]:
    """Yields a temporary directory that is renamed to `directory` on success, deleted on failure.

    Those that killed processes left for the same `directory` are deleted. Object stores cannot
    rename, so there the caller writes to `directory` itself and must write last the file that marks
    it as complete, such as `manifest.json`.

    Args:
      directory: the directory to make.
      key: the same for calls that write the same; what one of them left is then yielded again. None
        for an empty directory. In an object store the caller writes a file `PARTS/KEY` first and
        deletes `PARTS` last.
      keep: called after an `Exception`: whether what was written is kept for a later call.

    Raises:
      DataError: `directory` already exists or cannot be made, or another process writes the same.
    """
    try:
        used = directory.exists() and (not is_remote(directory) or any(directory.iterdir()))
        if used and not (key and is_remote(directory) and (directory / PARTS / key).exists()):
            raise DataError(f"output {directory} exists; name a new directory, or delete it")
        if is_remote(directory):
            partial, lock = directory, None
        else:
            _remove_stale(directory, key)
            partial = directory.with_name(_partial_prefix(directory) + (key or uuid.uuid4().hex))
            lock = _make_locked(partial)
    except OSError as error:
        raise DataError(f"output {directory} cannot be made ({error}); name another") from None
    try:
        yield partial
        if not is_remote(partial):
            _rename(partial, directory)
    except BaseException as error:
        if not (isinstance(error, Exception) and keep(partial)):
            _remove(partial)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _partial_prefix(directory: pathlib.Path) -> str:
    return f".{directory.name}.partial-"


def _rename(partial: pathlib.Path, directory: Location) -> None:
    try:
        partial.rename(str(directory))
    except OSError as error:
        raise DataError(
            f"output {directory} cannot be made ({error}); name a new directory, or delete it"
        ) from None


def _remove(directory: Location) -> None:
    if not is_remote(directory):
        shutil.rmtree(directory, ignore_errors=True)
        return
    with contextlib.suppress(FileNotFoundError):
        directory.fs.rm(directory.path, recursive=True)


def _remove_stale(directory: pathlib.Path, key: str | None) -> None:
    """Deletes temporary directories that no process holds, except that of `key`."""
    prefix = _partial_prefix(directory)
    siblings = directory.parent.iterdir() if directory.parent.is_dir() else ()
    for path in siblings:
        if path.name.startswith(prefix) and path.name != f"{prefix}{key}":
            try:
                lock = os.open(path, os.O_RDONLY)
            except OSError:
                continue
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            os.close(lock)


def _make_locked(partial: pathlib.Path) -> int:
    """Creates a directory if it does not exist; an open file that locks it until it is closed.

    The lock ends with its process. A file system without locks gives none.

    Raises:
      DataError: another process has locked it.
    """
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise DataError(
                f"{partial} is being written by another process; wait for it, or name another "
                "output"
            ) from None
        except OSError:
            return lock
        try:
            if os.path.samestat(os.fstat(lock), partial.stat()):
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)  # another process deleted it as stale in between
