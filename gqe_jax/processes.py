"""The processes of one job: initialisation, and values on which all processes agree."""

import contextlib
import glob
import json
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqe_jax.config import ConfigError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HEARTBEAT_SECONDS = 30
"""After this long without a heartbeat a process counts as dead, and the others exit."""
JOIN_SECONDS = 300
"""The processes of a job wait for each other for so long at the start."""
_REPORT_SECONDS = 30
_LAUNCHER_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def has_tpu() -> bool:
    """Whether this machine has TPU chips, from its device files; loads no library."""
    return bool(glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"))


def join(seconds: int = JOIN_SECONDS) -> None:
    """Initialises `jax.distributed` if the job has several processes; call before other JAX calls.

    On TPU pods, on GKE, and under Slurm and Open MPI, JAX detects the processes. Elsewhere three
    environment variables define them: JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. An empty variable counts as not set.

    Args:
      seconds: how long to wait for the other processes.

    Raises:
      ConfigError: a variable is missing or invalid, or the processes cannot be joined.
    """
    if jax.distributed.is_initialized():
        return
    for name in (ADDRESS, COUNT, INDEX, *_LAUNCHER_COUNTS):
        if not os.environ.get(name, "set").strip():
            del os.environ[name]  # JAX reads them too
    named = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if name in os.environ}
    launched = max(map(_launcher_count, _LAUNCHER_COUNTS)) > 1
    on_tpu = has_tpu() and "tpu" in (jax.config.jax_platforms or "tpu")
    if not (named or launched or on_tpu):
        return
    if not (launched or on_tpu):
        _check_complete(named)
    # JAX's SIGTERM handler would replace ours, which also serves single-process runs.
    jax.config.update("jax_enable_preemption_service", False)
    address = named.get(ADDRESS)
    where = f" at {ADDRESS} {address}" if address else ""
    deadline = time.monotonic() + seconds
    if address and int(named.get(INDEX, 0)):
        _wait_for_coordinator(address, seconds)
    try:
        with _reporting(f"waiting for the job's other processes{where}", seconds):
            jax.distributed.initialize(
                coordinator_address=address,
                num_processes=int(named[COUNT]) if COUNT in named else None,
                process_id=int(named[INDEX]) if INDEX in named else None,
                initialization_timeout=max(round(deadline - time.monotonic()), 1),
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=2 * HEARTBEAT_SECONDS,
            )
    except (ValueError, RuntimeError) as error:
        if named or launched:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise ConfigError(
                f"the job's processes cannot be joined{where} within {seconds} s ({reason}); start "
                "all of them, with the same address"
            ) from None
        if isinstance(error, RuntimeError):
            raise
        # otherwise: a single machine with TPUs that are not part of a pod


def _launcher_count(name: str) -> int:
    value = os.environ.get(name, "1")
    if not value.isdecimal():
        raise ConfigError(f"{name} is {value!r}; launchers set it to a number: correct or unset it")
    return int(value)


def _wait_for_coordinator(address: str, seconds: float) -> None:
    """Waits until something listens at the address of process 0.

    Raises:
      ConfigError: nothing did in time; names the address and the reason.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    with _reporting(f"waiting for process 0 at {ADDRESS} {address}", seconds):
        while True:
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
                return
            except (OSError, OverflowError) as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"{ADDRESS} is {address!r}; nothing answered there within {seconds} s "
                        f"({error}): start process 0 on that host, or correct the address"
                    ) from None
            time.sleep(min(1.0, seconds / 10))


@contextlib.contextmanager
def _reporting(text: str, seconds: float) -> Iterator[None]:
    """Prints what this process waits for, now and again."""
    done, begun = threading.Event(), time.monotonic()

    def report() -> None:
        while not done.wait(_REPORT_SECONDS):
            waited = time.monotonic() - begun
            print(f"{text}: {waited:.0f} of {seconds:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _check_complete(named: dict[str, str]) -> None:
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in named]
    if missing:
        raise ConfigError(
            f"{' and '.join(named)} is set and {' and '.join(missing)} is not; set all three for "
            "several processes, none for one"
        )
    count, index = named[COUNT], named[INDEX]
    if not (count.isdecimal() and int(count) > 0):
        raise ConfigError(f"{COUNT} is {count!r}; it must be a positive integer")
    if not (index.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"{INDEX} is {index!r}; it must be from 0 to {int(count) - 1}")
    if not named[ADDRESS].rpartition(":")[2].isdecimal():
        raise ConfigError(f"{ADDRESS} is {named[ADDRESS]!r}; it must be HOST:PORT of process 0")


def process_began() -> float:
    """When this process began, as of `time.time`; where the system does not tell, now."""
    now = time.time()
    try:
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (AttributeError, IndexError, OSError, ValueError):
        return now
    return now - max(age, 0.0)


def is_first() -> bool:
    """Whether this is process 0, which writes files and messages for the job."""
    return jax.process_index() == 0


def describe() -> str:
    """A prefix for messages that names this process; empty in a job of one process."""
    count = jax.process_count()
    return f"process {jax.process_index()} of {count}: " if count > 1 else ""


def from_first(value: Any) -> Any:
    """Broadcasts process 0's `value`, which must be JSON-serialisable, to every process."""
    if jax.process_count() == 1:
        return value
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
    mine = content if is_first() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(mine)).tobytes())


def gather(flag: bool) -> list[bool]:
    """The flags of all processes, in the order of their numbers."""
    if jax.process_count() == 1:
        return [flag]
    flags = multihost_utils.process_allgather(np.array([flag], np.int32))
    return [bool(value) for value in np.ravel(flags)]


class Vote:
    """Reduces a local flag to whether any process has set it; all get one answer at each call.

    A single process gets its own flag at once. With several, a call starts a max-reduction of the
    flags over the mesh and returns the result of the previous call's reduction, which is done by
    then, so that no step waits for it. Every process must call equally often. Once the answer is
    True it stays True, until `reset`.

    Args:
      mesh: the mesh over the devices of all processes.
      flag: returns this process's flag.
    """

    def __init__(self, mesh: Mesh, flag: Callable[[], bool]):
        self._flag = flag
        self._agreed = False
        self._pending: jax.Array | None = None
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jax.numpy.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def reset(self) -> None:
        """Forgets the answer; all processes call it at the same point."""
        self._agreed, self._pending = False, None

    def __call__(self) -> bool:
        if jax.process_count() == 1:
            return self._flag()
        if not self._agreed:
            self._agreed = self._pending is not None and bool(self._pending)
            mine = np.array([self._flag()], np.int32)
            shape = (self._sharding.mesh.size,)
            self._pending = self._any(
                jax.make_array_from_callback(shape, self._sharding, lambda _: mine)
            )
        return self._agreed
