"""A window of a run's steps, recorded by JAX's profiler in the layout of xprof and TensorBoard."""

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator

import jax

from gqe_jax import processes
from gqe_jax.config import ProfileConfig
from gqe_jax.storage import copy_tree, location

DIRECTORY = "profile"


class Profile:
    """Records the steps that `config` names; a context manager, which ends a recording.

    A profile is written on a local disk and copied to `profile/plugins/profile/step_N/` in the
    run's directory, one file a host.

    Args:
      config: the window.
      run_dir: the run's directory.
      wait: waits until all steps that were started have ended, so that the window has whole steps.
    """

    def __init__(self, config: ProfileConfig, run_dir: str, wait: Callable[[], None]):
        recorded = config.start is not None and (config.all_hosts or processes.is_first())
        first = config.start if recorded and config.start is not None else 0
        self._window = range(first, first + config.steps) if first else range(0)
        self._run_dir, self._wait = run_dir, wait
        self._recording: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Names the step that runs inside, and begins the recording before the first one."""
        if self._recording is None and number in self._window:
            self._start()
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def ends_with(self, number: int) -> bool:
        """Whether the recording ends with this step."""
        return self._recording is not None and number + 1 not in self._window

    def finish(self) -> None:
        """Waits for the steps that were started, and writes the recording."""
        self._wait()
        self._stop()

    def _start(self) -> None:
        self._wait()
        self._recording = tempfile.TemporaryDirectory(prefix="gqe-jax-profile-")
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of Python would hide what the devices do
        options.session_id = f"step_{self._window.start}"
        jax.profiler.start_trace(self._recording.name, profiler_options=options)

    def _stop(self) -> None:
        if self._recording is None:
            return
        with self._recording as directory:
            jax.profiler.stop_trace()
            if jax.process_count() > 1:  # several may be on one host, after which a file is named
                for path in list(pathlib.Path(directory).rglob("*.*")):
                    path.rename(path.with_name(f"{jax.process_index()}-{path.name}"))
            copy_tree(pathlib.Path(directory), location(self._run_dir) / DIRECTORY)
        self._recording = None
