"""The lock of a run directory: one job trains a run at a time.

The lock is the file `train-N.lock` with the largest N. It names the host and process of its job,
and a thread of that job renews it. A lock of a process that has ended on this host, or that was not
renewed during a lease, is taken over by creating the file N + 1, which only one process can do. On
buckets the file is created under the condition that it does not exist.

The token in the file also shows whether all hosts of a job see one directory.
"""

import contextlib
import json
import os
import pathlib
import re
import socket
import sys
import threading
import time
import uuid
from typing import Any

from gqe_jax import processes
from gqe_jax.config import ConfigError
from gqe_jax.config_json import parse_json
from gqe_jax.errors import UserError
from gqe_jax.storage import Location, explain, is_remote, location

LEASE_SECONDS = 60.0
"""A lock of another host that is not renewed for so long is taken over."""
SIGHT_SECONDS = 10.0
"""Time in which the other hosts of a job must see the lock of process 0."""
_NAME = re.compile(r"train-(\d+)\.lock")
_RENEWALS = 6  # per lease


class RunLockedError(UserError, RuntimeError):
    """Another job trains this run."""


class RunLock:
    """Holds the lock of a run directory; a context manager for all processes of a job.

    Args:
      run_dir: the run's directory, created if it does not exist.
      lease: seconds without a renewal after which a lock counts as abandoned.

    Raises, on entry:
      RunLockedError: another job holds the lock; names its host and process.
      ConfigError: the directory cannot be written, or the hosts do not share it.
    """

    def __init__(self, run_dir: str | os.PathLike | Location, *, lease: float = LEASE_SECONDS):
        self._directory = location(run_dir)
        self._lease = lease
        self._path: Location | None = None
        self._owner = _this_process() | {"token": uuid.uuid4().hex}
        self._lost = threading.Event()
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "RunLock":
        locked, error = None, None
        if processes.is_first():
            try:
                self._path = self._acquire()
                locked = {"name": self._path.name, "token": self._owner["token"]}
            except UserError as caught:
                error = caught
            except OSError as caught:
                error = ConfigError(_cannot_write(self._directory, caught))
        outcome = processes.from_first({"locked": locked, "error": str(error)})
        if outcome["locked"] is None:
            raise error or RunLockedError(outcome["error"])
        try:
            self._check_shared(**outcome["locked"])
        except BaseException:
            self._release()
            raise
        if self._path is not None:
            self._thread = threading.Thread(target=self._renew, args=(self._path,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._released.set()
        if self._thread is not None:
            self._thread.join()
        self._release()

    def check(self) -> None:
        """Raises RunLockedError if another job has taken the lock over from this process."""
        if self._path is not None and (self._lost.is_set() or not self._is_ours(self._path)):
            raise RunLockedError(
                f"run_dir {self._directory} was taken over by another job, because this one did "
                f"not renew its lock for {self._lease:.0f} s; this job ends without saving"
            )

    def _acquire(self) -> Location:
        if not is_remote(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
        while True:
            locks = _locks(self._directory)
            for path in locks.values():
                self._check_abandoned(path)
            path = self._directory / f"train-{max(locks, default=0) + 1}.lock"
            if not _create(path, self._content()):
                continue  # another job was faster: look at its lock
            for number, other in _locks(self._directory).items():
                if number in locks:
                    _remove(other)
                elif other.name != path.name:
                    # Another job started from an older listing.
                    _remove(path)
                    raise RunLockedError(self._in_use(other, _read(other)))
            return path

    def _check_abandoned(self, path: Location) -> None:
        """Raises RunLockedError unless the owner of this lock has ended."""
        first = _read(path)
        if first is None:
            return
        owner = _parse(first)
        if owner.get("machine") == self._owner["machine"]:
            if _is_running(owner):
                raise RunLockedError(self._in_use(path, first))
            return
        print(
            f"run_dir {self._directory} is locked by {_describe(owner)}; waiting {self._lease:.0f} "
            "s for a sign of life",
            file=sys.stderr,
            flush=True,
        )
        deadline = time.monotonic() + self._lease
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._lease / 10))
            now = _read(path)
            if now is None:
                return
            if now != first:
                raise RunLockedError(self._in_use(path, now if _parse(now) else first))

    def _in_use(self, path: Location, content: tuple[bytes, int] | None) -> str:
        return (
            f"run_dir {self._directory} is in use by {_describe(_parse(content))}; wait for that "
            f"job, stop it, or give another run_dir (its lock is {path.name})"
        )

    def _check_shared(self, name: str, token: str) -> None:
        seen = self._path is not None or self._sees(name, token)
        blind = [index for index, sees in enumerate(processes.gather(seen)) if not sees]
        if blind:
            raise ConfigError(
                f"run_dir {self._directory} is not shared: process {', '.join(map(str, blind))} "
                f"does not see the file {name} that process 0 wrote there; give all hosts a "
                "directory on one shared disk or in a bucket"
            )

    def _sees(self, name: str, token: str) -> bool:
        deadline = time.monotonic() + SIGHT_SECONDS
        while True:
            with contextlib.suppress(OSError):
                if _parse(_read(self._directory / name)).get("token") == token:
                    return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)

    def _content(self) -> bytes:
        return json.dumps(self._owner | {"renewed": time.time()}).encode()

    def _is_ours(self, path: Location) -> bool:
        """Whether the lock is this job's; True also where the directory cannot be read now."""
        try:
            ours = _parse(_read(path)).get("token") == self._owner["token"]
            return ours and path.name == max(_locks(self._directory).items())[1].name
        except OSError:
            return True

    def _renew(self, path: Location) -> None:
        while not self._released.wait(self._lease / _RENEWALS):
            if not self._is_ours(path):
                self._lost.set()
                return
            with contextlib.suppress(OSError):
                if is_remote(path):
                    path.write_bytes(self._content())
                else:
                    os.utime(path)  # needs no space on a full disk

    def _release(self) -> None:
        path = self._path
        if path is not None and not self._lost.is_set() and self._is_ours(path):
            _remove(path)


def _locks(directory: Location) -> dict[int, Location]:
    """The lock files of a directory by their numbers."""
    if is_remote(directory):
        directory.fs.invalidate_cache()
        try:
            names = [info["name"] for info in directory.fs.ls(directory.path, detail=True)]
        except FileNotFoundError:
            return {}
    else:
        names = os.listdir(directory)
    names = [name.rpartition("/")[2] for name in names]
    return {int(m[1]): directory / name for name in names if (m := _NAME.fullmatch(name))}


def _create(path: Location, content: bytes) -> bool:
    """Creates a file; False if it exists."""
    try:
        if is_remote(path):
            path.fs.pipe_file(path.path, content, mode="create")
        else:
            with path.open("xb") as file:
                file.write(content)
    except FileExistsError:
        return False
    return True


def _read(path: Location) -> tuple[bytes, int] | None:
    """Content and time of change of a file; None if it is gone."""
    try:
        if is_remote(path):
            content: Any = path.fs.cat_file(path.path)  # UPath's reading can use an old listing
            return content, 0  # every renewal changes the content
        with path.open("rb") as file:  # opening a file makes a network disk look at its server
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _remove(path: Location) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _parse(content: tuple[bytes, int] | None) -> dict[str, Any]:
    """The owner that a lock names; empty while it is being written."""
    try:
        owner = parse_json(content[0]) if content else {}
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "a job that is starting"
    pid, host, since = (owner.get(name, "?") for name in ("pid", "host", "started"))
    return f"process {pid} on host {host} (since {since})"


def _cannot_write(directory: Location, error: OSError) -> str:
    return (
        f"run_dir {directory} cannot be written ({explain(error) or error}); name a directory in "
        "which this user can create files"
    )


def _this_process() -> dict[str, Any]:
    """This process, and the machine on which its number means something."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        # Containers of one host can have one name and, each, their own process numbers.
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return {
        "host": parts[0],
        "pid": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "machine": " ".join(parts),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def _process_start(pid: int) -> str | None:
    """A process's start time in clock ticks; None if it has ended, empty without /proc."""
    if not pathlib.Path("/proc/self/stat").exists():
        return ""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _is_running(owner: dict[str, Any]) -> bool:
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    start = _process_start(pid)
    if start:
        return start == owner.get("process_start")
    if start is None:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
