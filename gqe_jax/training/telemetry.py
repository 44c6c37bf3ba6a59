"""Metrics of a run, their writers (`writers.py`), and progress on the terminal."""

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import tqdm
from upath import UPath

from gqe_jax.config_json import parse_json
from gqe_jax.storage import copy_tree, is_remote, local_scratch, location
from gqe_jax.training.writers import JsonLines, TensorBoard, Writer
from gqe_kernels.chips import peak_flops

METRICS_FILE = "metrics.jsonl"


def read_metrics(run_dir: str | os.PathLike | UPath) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`, without lines that a crash damaged."""
    path = location(run_dir) / METRICS_FILE
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = parse_json(line)
        except ValueError:  # also of bytes that are no UTF-8
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            lines.append(record)
    return lines


@runtime_checkable
class Stream(Protocol):
    """What progress is printed to: a text file."""

    def write(self, text: str, /) -> int: ...

    def flush(self) -> None: ...

    def isatty(self) -> bool: ...

    def fileno(self) -> int: ...


class Terminal:
    """A stream for progress whose reader may go away, as in `2>&1 | head`: training goes on.

    After a write fails, the stream's file descriptor leads to the null device, so that nothing else
    that writes there fails either.
    """

    def __init__(self, stream: Stream):
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None)  # by which tqdm draws its bar

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()
        return len(text)

    def flush(self) -> None:
        """Does nothing: `write` flushes."""

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        return self._stream.fileno()

    def _give_up(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            descriptor = self.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)


class Silent:
    """A Telemetry whose methods do nothing, for all processes of a job but process 0."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_: None


class Telemetry:
    """Writes a run's metrics; a context manager.

    Args:
      run_dir: the run's directory. The files are written on a local disk; `sync` copies them if
        the directory is in an object store.
      start: the step that the run resumes from. Records of later steps, written before a crash,
        are removed, since those steps run again.
      steps: the run's last step.
      flops_per_token: model FLOPs of a training step per token, for the utilisation.
      devices: the devices that train.
      stream: the stream for progress, a bar on a terminal and lines elsewhere; None: stderr.
      more: makes further writers, which keep their files in the directory that it is given.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        *,
        start: int,
        steps: int,
        flops_per_token: float,
        devices: list[jax.Device],
        stream: Stream | None = None,
        more: Callable[[pathlib.Path], Sequence[Writer]] = lambda _: (),
    ):
        self._run_dir, self._more = location(run_dir), more
        self._start, self._steps = start, steps
        self._flops_per_token = flops_per_token
        peaks = [peak for peak in map(peak_flops, devices) if peak is not None]
        self._peak = sum(peaks) if len(peaks) == len(devices) else None
        self._stream = Terminal(sys.stderr if stream is None else stream)
        self._digits = len(str(steps))

    def __enter__(self) -> "Telemetry":
        self._kept = kept = [
            line for line in read_metrics(self._run_dir) if line["step"] <= self._start
        ]
        self._scratch = contextlib.ExitStack()
        self._local = self._scratch.enter_context(local_scratch(self._run_dir))
        lines = "".join(json.dumps(line) + "\n" for line in kept)
        self._writers = [
            JsonLines(self._local / METRICS_FILE, lines),
            TensorBoard(self._local / "tensorboard", self._start),
            *self._more(self._local),
        ]
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm.tqdm(
                total=self._steps, initial=self._start, unit="step", file=self._stream
            )
        self._last_time, self._last_step = time.perf_counter(), self._start
        self._paused = 0.0
        self._copy()  # removes the later records from an object store too
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        for writer in self._writers:
            writer.close()
        with self._scratch:
            self._copy()

    def say(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def advance(self) -> None:
        """Advances the progress bar by one step."""
        if self._bar is not None:
            self._bar.update()

    def training(self, step: int, metrics: dict[str, Any], tokens_per_step: int) -> None:
        """Records the metrics of a training step, and the speed since the last call."""
        now = time.perf_counter()
        elapsed = max(now - self._last_time - self._paused, 1e-9)
        tokens_per_second = (step - self._last_step) * tokens_per_step / elapsed
        self._last_time, self._last_step, self._paused = now, step, 0.0
        record = {"step": step, **metrics, "tokens_per_second": tokens_per_second}
        if self._peak is not None:
            record["mfu"] = tokens_per_second * self._flops_per_token / self._peak
        self._write(record)
        shown = f"loss {record['loss']:.4f}, {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(shown)
        else:
            mfu = f", MFU {record['mfu']:.1%}" if "mfu" in record else ""
            self.say(
                f"step {step:>{self._digits}}/{self._steps}  {shown}{mfu}, "
                f"grad norm {record['grad_norm']:.3f}, lr {record['learning_rate']:.2e}"
            )

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics on held-out text."""
        self._write({"step": step, **metrics})
        for name in (key.removeprefix("eval_loss") for key in metrics if "eval_loss" in key):
            self.say(
                f"step {step:>{self._digits}}/{self._steps}  {name[1:] or 'held-out'} loss "
                f"{metrics[f'eval_loss{name}']:.4f}, "
                f"{metrics[f'eval_bits_per_byte{name}']:.4f} bits per byte"
            )

    def changed(self, step: int, record: dict[str, Any]) -> None:
        """Records what differs from `step` on, unless it is recorded already."""
        record = json.loads(json.dumps({"step": step, **record}))
        if record not in self._kept:
            self._write(record)

    def clock(self, step: int, record: dict[str, Any]) -> None:
        """Records what the run's time was spent on (`goodput.Goodput.record`)."""
        self._write({"step": step, **record})

    def outside(self, seconds: float) -> None:
        """Excludes the time of an evaluation or checkpoint from the speed."""
        self._paused += seconds

    def sync(self) -> None:
        """Flushes the records so far to the disk, and copies them to an object store."""
        for writer in self._writers:
            writer.flush()
        self._copy()

    def _copy(self) -> None:
        if is_remote(self._run_dir):
            copy_tree(self._local, self._run_dir)

    def _write(self, record: dict[str, Any]) -> None:
        record = {
            name: np.asarray(value).tolist() if isinstance(value, np.ndarray) else value
            for name, value in record.items()
        }
        step = record.pop("step")
        for writer in self._writers:
            writer.write(step, record)
