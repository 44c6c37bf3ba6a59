"""A clock that all processes of a job read alike: that of process 0."""

import time

from jax.sharding import Mesh

from gqe_jax import processes


class Timer:
    """Whether so many minutes have passed since it was made or reset; all processes get one answer.

    Every process must call it equally often, and reset it at the same points.

    Args:
      mesh: the mesh over the devices of all processes.
      minutes: None: it never has.
    """

    def __init__(self, mesh: Mesh, minutes: float | None):
        self._seconds = None if minutes is None else 60 * minutes
        self._begun = time.monotonic()
        self._vote = processes.Vote(mesh, self._has_passed)

    def __call__(self) -> bool:
        return self._seconds is not None and self._vote()

    def reset(self) -> None:
        """Begins to count anew."""
        self._begun = time.monotonic()
        self._vote.reset()

    def _has_passed(self) -> bool:
        passed = time.monotonic() - self._begun
        return processes.is_first() and self._seconds is not None and passed >= self._seconds
