"""The processes of one job: initialisation, and values on which all processes agree."""

import glob
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqe_jax.config import ConfigError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HEARTBEAT_SECONDS = 30
"""After this long without a heartbeat a process counts as dead, and the others exit."""
_LAUNCHER_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def has_tpu() -> bool:
    """Whether this machine has TPU chips, from its device files; loads no library."""
    return bool(glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"))


def join() -> None:
    """Initialises `jax.distributed` if the job has several processes; call before other JAX calls.

    On TPU pods, on GKE, and under Slurm and Open MPI, JAX detects the processes. Elsewhere three
    environment variables define them: JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      ConfigError: a variable is missing or invalid, or the processes cannot be joined.
    """
    if jax.distributed.is_initialized():
        return
    named = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if name in os.environ}
    launched = any(int(os.environ.get(name, 1)) > 1 for name in _LAUNCHER_COUNTS)
    on_tpu = has_tpu() and "tpu" in (jax.config.jax_platforms or "tpu")
    if not (named or launched or on_tpu):
        return
    if not (launched or on_tpu):
        _check_complete(named)
    # JAX's SIGTERM handler would replace ours, which also serves single-process runs.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address=named.get(ADDRESS),
            num_processes=int(named[COUNT]) if COUNT in named else None,
            process_id=int(named[INDEX]) if INDEX in named else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=2 * HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        if named or launched:
            raise ConfigError(f"the job's processes cannot be joined ({error})") from None
        # otherwise: a single machine with TPUs that are not part of a pod


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


class Vote:
    """Reduces a local flag to whether any process has set it; all get one answer at each call.

    A single process gets its own flag at once. With several, a call starts a max-reduction of the
    flags over the mesh and returns the result of the previous call's reduction, which is done by
    then, so that no step waits for it. Every process must call equally often. Once the answer is
    True it stays True.

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
