"""A run with every option on, killed again and again, beside one that nothing disturbed."""

import importlib.util

import numpy as np
import pytest

from gqe_jax.training.telemetry import read_metrics
from tests.gqe_jax.jobs import finish, kill_one, reach, start_job
from tests.gqe_jax.runs import make_corpus, saved_state, small_config

STEPS, KILLED_AT = 24, (6, 12, 19)


@pytest.mark.slow
def test_a_run_with_everything_on_ends_as_one_undisturbed(tmp_path, monkeypatch):
    corpora = {}
    for name in ("web", "code"):
        (tmp_path / name).mkdir()
        corpora[name] = make_corpus(tmp_path / name)
    web, code = corpora.values()
    flags = [
        *("--data.mixture", f"web={web}:0.7", f"code={code}:0.3"),
        *("--data.decay-mixture", f"web={web}:0.2", f"code={code}:0.8"),
        *("--held-out", f"one={web}", f"two={code}"),
        *("--optimizer.name", "muon", "--optimizer.skip-spikes", "20"),
        *("--optimizer.average-decay", "0.9"),
        *("--profile.start", "3", "--profile.steps", "2"),
        *("--checkpoint-minutes", "0.02", "--compilation-cache", str(tmp_path / "programs")),
    ]
    if importlib.util.find_spec("wandb") is not None:
        monkeypatch.setenv("WANDB_MODE", "offline")
        flags += ["--wandb", "everything"]

    undisturbed, killed = (
        small_config(web, tmp_path / name, steps=STEPS, checkpoint_every=4)
        for name in ("undisturbed", "killed")
    )

    def start(config):
        return start_job(config, 1, flags=tuple(flags), cache=tmp_path / "environment")

    [(status, output)] = finish(start(undisturbed))
    assert status == 0, output
    for step in KILLED_AT:
        job = start(killed)
        reach(job, killed, step)
        kill_one(job, 0)
        [(status, output)] = finish(job)
        assert status == -9, output
    [(status, output)] = finish(start(killed))
    assert status == 0, output
    assert "resuming" in output

    for ours, theirs in zip(saved_state(killed), saved_state(undisturbed), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    scored = [
        {name: value for name, value in line.items() if name.startswith("eval_")}
        for config in (killed, undisturbed)
        for line in read_metrics(config.run_dir)
        if line["step"] == STEPS and "eval_loss" in line
    ]
    assert len(scored) == 2
    assert scored[0] == scored[1]
    assert {"eval_loss", "eval_loss/one", "eval_loss/two"} <= scored[0].keys()
    assert list((tmp_path / "killed" / "profile").rglob("*.xplane.pb"))
    assert list((tmp_path / "programs").iterdir())
