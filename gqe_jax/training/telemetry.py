"""Metrics of a run: `metrics.jsonl`, TensorBoard, and progress for whoever watches."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import jax
import numpy as np
import tensorboardX
import tqdm

from gqe_jax.storage import copy_tree, is_remote, local_scratch, location, write_whole
from gqe_kernels.chips import peak_flops

METRICS_FILE = "metrics.jsonl"


def read_metrics(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a last line cut off by a crash is left out."""
    path = location(run_dir) / METRICS_FILE
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


class Silent:
    """Has Telemetry's methods, which do nothing: for all processes of a job but the first."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_: None


class Telemetry:
    """Writes a run's metrics; use it as a context manager.

    Args:
      run_dir: the run's directory. In an object store the files are those of the last `sync`: they
        are written on a local disk, and copied whole.
      start: the step that the run goes on from. Lines of later steps, from before a crash, are
        taken out: they come again.
      steps: the run's last step.
      flops_per_token: model FLOPs of a training step, for the utilisation.
      devices: that share the work.
      stream: where progress goes: a bar on a terminal, lines elsewhere.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        *,
        start: int,
        steps: int,
        flops_per_token: float,
        devices: list[jax.Device],
        stream: TextIO | None = None,
    ):
        self._run_dir = location(run_dir)
        self._start, self._steps = start, steps
        self._flops_per_token = flops_per_token
        peaks = [peak_flops(device) for device in devices]
        self._peak = None if None in peaks else sum(peaks)
        self._stream = sys.stderr if stream is None else stream
        self._digits = len(str(steps))

    def __enter__(self) -> "Telemetry":
        kept = [line for line in read_metrics(self._run_dir) if line["step"] <= self._start]
        self._scratch = contextlib.ExitStack()
        self._local = self._scratch.enter_context(local_scratch(self._run_dir))
        path = self._local / METRICS_FILE
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self._board = tensorboardX.SummaryWriter(
            str(self._local / "tensorboard"),
            purge_step=self._start + 1,
            flush_secs=30,
            filename_suffix=f".from-{self._start}",
        )
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm.tqdm(
                total=self._steps, initial=self._start, unit="step", file=self._stream
            )
        self._last_time, self._last_step = time.perf_counter(), self._start
        self._paused = 0.0
        self._copy()  # so that nobody reads the lines that were taken out
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        self._board.close()
        self._file.close()
        with self._scratch:
            self._copy()

    def say(self, text: str) -> None:
        """A line to whoever watches."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def advance(self) -> None:
        """One more step is under way."""
        if self._bar is not None:
            self._bar.update()

    def training(self, step: int, metrics: dict[str, Any], tokens_per_step: int) -> None:
        """Metrics of a training step, with the speed since the last call."""
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
        """Metrics on held-out text."""
        self._write({"step": step, **metrics})
        self.say(
            f"step {step:>{self._digits}}/{self._steps}  held-out loss {metrics['eval_loss']:.4f}, "
            f"{metrics['eval_bits_per_byte']:.4f} bits per byte"
        )

    def outside(self, seconds: float) -> None:
        """Time that is no training: evaluations and checkpoints stay out of the speed."""
        self._paused += seconds

    def sync(self) -> None:
        """Makes sure that the lines so far outlive the machine."""
        os.fsync(self._file.fileno())
        self._board.flush()
        self._copy()

    def _copy(self) -> None:
        if is_remote(self._run_dir):
            copy_tree(self._local, self._run_dir)

    def _write(self, record: dict[str, Any]) -> None:
        record = {
            name: np.asarray(value).tolist() if isinstance(value, np.ndarray) else value
            for name, value in record.items()
        }
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        step = record["step"]
        for name, value in record.items():
            if isinstance(value, float) and math.isfinite(value):
                self._board.add_scalar(name, value, step)
        if "expert_load" in record:
            self._routing_to_board(record, step)

    def _routing_to_board(self, record: dict[str, Any], step: int) -> None:
        """Of each layer: the largest load of an expert, and the mean entropy."""
        for layer, load in enumerate(record["expert_load"]):
            self._board.add_scalar(f"max_expert_load/layer_{layer}", np.max(load), step)
        for layer, entropy in enumerate(record["router_entropy"]):
            self._board.add_scalar(f"router_entropy/layer_{layer}", np.mean(entropy), step)
