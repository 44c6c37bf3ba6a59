"""The processes of one job: joining them, and what they must agree on."""

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
"""A process that was silent for so long is dead, and the others end."""
_LAUNCHER_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def has_tpu() -> bool:
    """Whether this machine has TPU chips, found without loading anything."""
    return bool(glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"))


def join() -> None:
    """Joins the job's other processes, if there are any; to be called before JAX sees a device.

    On TPU pods, on GKE, and under Slurm and Open MPI, JAX finds them itself. Elsewhere three
    environment variables name them: JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      ConfigError: a variable is missing or has a value that cannot be.
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
    # JAX's handler of SIGTERM would replace ours, which is there for one process also.
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
        # else one machine with TPUs that are no part of a pod


def _check_complete(named: dict[str, str]) -> None:
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in named]
    if missing:
        raise ConfigError(
            f"{' and '.join(named)} is set and {' and '.join(missing)} is not: several processes "
            "need all three, one process none"
        )
    count, index = named[COUNT], named[INDEX]
    if not (count.isdecimal() and int(count) > 0):
        raise ConfigError(f"{COUNT} is {count!r}; it must be a positive integer")
    if not (index.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"{INDEX} is {index!r}; it must be from 0 to {int(count) - 1}")
    if not named[ADDRESS].rpartition(":")[2].isdecimal():
        raise ConfigError(f"{ADDRESS} is {named[ADDRESS]!r}; it must be HOST:PORT of process 0")


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return jax.process_index() == 0


def describe() -> str:
    """Which process this is, to begin a message with; empty for the only one."""
    count = jax.process_count()
    return f"process {jax.process_index()} of {count}: " if count > 1 else ""


def from_first(value: Any) -> Any:
    """The first process's `value`, anything that JSON holds, on every process."""
    if jax.process_count() == 1:
        return value
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
    mine = content if is_first() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(mine)).tobytes())


class Vote:
    """Whether any process wishes something; all get the same answer at the same call.

    Alone, a process gets its wish at once. Several answer one call late: a call starts a sum of the
    wishes over the mesh, a scalar that is reduced between two steps, and returns the one before,
    which is done by then, so that nobody waits. Every process must call equally often. What was
    once agreed stays.

    Args:
      mesh: over the devices of all processes.
      wish: of this process.
    """

    def __init__(self, mesh: Mesh, wish: Callable[[], bool]):
        self._wish = wish
        self._agreed = False
        self._pending: jax.Array | None = None
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jax.numpy.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self) -> bool:
        if jax.process_count() == 1:
            return self._wish()
        if not self._agreed:
            self._agreed = self._pending is not None and bool(self._pending)
            mine = np.array([self._wish()], np.int32)
            shape = (self._sharding.mesh.size,)
            self._pending = self._any(
                jax.make_array_from_callback(shape, self._sharding, lambda _: mine)
            )
        return self._agreed
