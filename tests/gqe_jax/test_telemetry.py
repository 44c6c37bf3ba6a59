"""What a run writes down, and what is drawn from it."""

import io
import json
import types

import jax
import matplotlib.image
import numpy as np
import pytest

from gqe_jax import report
from gqe_jax.training.telemetry import Telemetry, read_metrics
from gqe_kernels.chips import peak_flops


def device(kind):
    return types.SimpleNamespace(device_kind=kind)


def telemetry(run_dir, stream=None, **kwargs):
    options = {"start": 0, "steps": 100, "flops_per_token": 1e9, "devices": jax.devices()[:1]}
    return Telemetry(run_dir, stream=stream or io.StringIO(), **{**options, **kwargs})


def metrics(step):
    load = np.array([[[0.25, 0.75], [0.5, 0.5]]], np.float32)
    return {
        "loss": 5.0 / step,
        "learning_rate": 1e-3,
        "grad_norm": 2.0,
        "clipped_grad_norm": 1.0,
        "expert_load": load,
        "router_entropy": np.array([[0.5, 0.6]], np.float32),
    }


def test_lines_are_json_and_flushed_at_once(tmp_path):
    with telemetry(tmp_path) as log:
        log.training(1, metrics(1), tokens_per_step=64)
        line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["step"] == 1
    assert line["expert_load"] == [[[0.25, 0.75], [0.5, 0.5]]]
    assert line["tokens_per_second"] > 0


def test_going_on_drops_the_lines_that_will_come_again(tmp_path):
    with telemetry(tmp_path) as log:
        for step in range(1, 8):
            log.training(step, metrics(step), 64)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # cut off by a crash
    with telemetry(tmp_path, start=5) as log:
        log.training(6, metrics(6), 64)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.wrong_types
def test_utilisation_is_flops_over_the_peak(tmp_path):
    devices = [device("TPU v5 lite")] * 2
    with telemetry(tmp_path, devices=devices) as log:
        log.training(1, metrics(1), 64)
    (line,) = read_metrics(tmp_path)
    assert line["mfu"] == pytest.approx(line["tokens_per_second"] * 1e9 / (2 * 197e12))


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(device(kind)) == peak


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(tmp_path):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    for name, stream in (("bar", terminal), ("lines", io.StringIO())):
        (tmp_path / name).mkdir()
        with telemetry(tmp_path / name, stream=stream, steps=3) as log:
            for step in (1, 2, 3):
                log.advance()
                log.training(step, metrics(step), 64)
        shown = stream.getvalue()
        assert "3/3" in shown
        assert "loss 1.6667" in shown
        assert ("\r" in shown) == (name == "bar")


def test_tensorboard_events_are_written(tmp_path):
    with telemetry(tmp_path) as log:
        log.training(1, metrics(1), 64)
        log.evaluation(1, {"eval_loss": 2.0, "eval_bits_per_byte": 3.0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    for tag in (b"loss", b"grad_norm", b"eval_loss", b"max_expert_load/layer_0"):
        assert tag in content


def test_the_report_draws_what_there_is(tmp_path):
    with telemetry(tmp_path) as log:
        for step in range(1, 6):
            log.training(step, metrics(step), 64)
        log.evaluation(5, {"eval_loss": 2.0, "eval_bits_per_byte": 3.0})
    paths = report.draw(tmp_path)
    assert [path.name for path in paths] == [
        "loss.png",
        "optimizer.png",
        "expert_load.png",
        "router_entropy.png",
    ]
    for path in paths:
        image = matplotlib.image.imread(path)
        assert image.shape[0] > 100
        assert image.std() > 0.01


def test_no_metrics_no_report(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no metrics of training steps"):
        report.draw(tmp_path)
