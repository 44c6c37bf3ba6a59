"""What models cost, by hand; branches of a run; tables. The runs are of a tiny model."""

import dataclasses

import numpy as np
import pytest

from configs import CONFIGS
from experiments import ablation, contenders
from experiments.quality import DECAY, Job, QualityConfig, branch, jobs, plot, run_study, table
from gqe_jax.commands import run_command
from gqe_jax.config import ConfigError
from gqe_jax.data import open_corpus, training_batches
from gqe_jax.model.flops import matmul_flops_per_token
from gqe_jax.training.telemetry import read_metrics
from tests.gqe_jax.runs import make_corpus, small_config

TINY = CONFIGS["tiny"]


def test_costs_are_those_by_hand():
    """d 128, 8 query heads in 4 groups of head_dim 16, 4 layers, MLP 384, 256 bytes."""
    models = contenders.of_equal_cost(TINY)
    d, head, mlp, layers, vocab = 128, 16, 384, 4, 256
    weights = {  # of a layer: queries, keys, values, output; shared query and router
        contenders.GQE: d * head * (8 + 4 + 4 + 6 + 1) + d * 8,
        contenders.DENSE: d * head * (8 + 4 + 4 + 8),
        contenders.FEWER_HEADS: d * head * (4 + 4 + 4 + 4),
    }
    heads = {contenders.GQE: 5, contenders.DENSE: 8, contenders.FEWER_HEADS: 4}
    for name, attention in weights.items():
        cost = contenders.cost(models[name])
        norms = d * (2 * layers + 1)
        assert cost.parameters == layers * (attention + 3 * d * mlp) + vocab * d + norms
        for length, flops in zip((2048, 32_768), cost.flops, strict=True):
            of_layer = 2 * (attention + 3 * d * mlp) + 2 * heads[name] * head * length
            assert flops == layers * of_layer + 2 * vocab * d


def test_widened_models_cost_as_much_and_are_as_large_to_a_column():
    models = contenders.of_equal_cost(TINY)
    of = {name: contenders.cost(run) for name, run in models.items()}
    a_column = 3 * 128 * 4
    lacks = of[contenders.DENSE].parameters - of[contenders.AS_LARGE].parameters
    assert abs(lacks) <= a_column / 2
    assert models[contenders.WIDER_MLP].model.mlp_dim > 384
    flops = [
        matmul_flops_per_token(models[name].model, TINY.sequence_length)
        for name in (contenders.GQE, contenders.WIDER_MLP)
    ]
    assert abs(flops[0] - flops[1]) <= 2 * a_column / 2


def test_more_experts_cost_their_weights_alone():
    models = contenders.of_experts(TINY)
    extra = 4 * 2 * 128 * (24 * 16 + 24)  # projections and router columns of 24 experts
    for recipe in ("", f", {contenders.TIED_HARD}"):
        assert matmul(models[f"M = 8{recipe}"]) - matmul(models[f"M = 2{recipe}"]) == extra
    assert models["M = 2"] == contenders.attention_of(TINY)
    fewer = contenders.of_equal_cost(TINY)[contenders.FEWER_HEADS]
    assert models[contenders.FEWER_HEADS] == fewer
    length, a_column = TINY.sequence_length, 2 * 3 * 128 * 4
    for m in (2, 4, 8):
        wider = models[f"{contenders.WIDER_MLP}, as M = {m}"]
        hard = models[f"M = {m}, {contenders.TIED_HARD}"]
        flops = [matmul_flops_per_token(run.model, length) for run in (wider, hard)]
        assert abs(flops[0] - flops[1]) <= a_column / 2


def matmul(run):
    return contenders.cost(run).flops[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quality")
    config = small_config(make_corpus(directory), directory / "run", eval_every=1000)
    model = dataclasses.replace(config.model, num_layers=1)
    return dataclasses.replace(config, model=model, checkpoint_every=1000)


@pytest.mark.parametrize("study", ["cost", "tokens", "sizes", "experts", "recipe"])
def test_all_models_of_a_seed_read_the_same_batches(study, base):
    config = QualityConfig(study, seeds=2)
    corpus = open_corpus(base.data.corpus)
    seen: dict[int, list] = {0: [], 1: []}
    directories = set()
    for job in jobs(config, base):
        run = job.run
        directories.add(run.run_dir)
        if study != "sizes":
            assert run.steps == base.steps
        batch = next(
            iter(
                training_batches(
                    corpus.train,
                    run.data,
                    start=5,
                    stop=6,
                    rows=range(run.batch_size),
                    batch_size=run.batch_size,
                    sequence_length=run.sequence_length,
                    seed=run.seed,
                )
            )
        )
        seen[job.seed].append(batch.inputs)
    for batches in seen.values():
        assert all(np.array_equal(batch, batches[0]) for batch in batches)
    assert not np.array_equal(seen[0][0], seen[1][0])
    assert len(directories) == sum(map(len, seen.values()))


def test_a_study_trains_the_models_that_are_named(base):
    config = QualityConfig("cost", models=(contenders.DENSE,), seeds=2)
    assert [job.name for job in jobs(config, base)] == [contenders.DENSE] * 2
    with pytest.raises(ConfigError, match="models has 'dens'; it must be among 'GQE'"):
        list(jobs(QualityConfig("cost", models=("dens",)), base))


def test_any_study_but_that_of_sizes_has_runs_by_tokens(base):
    per_step = base.batch_size * base.sequence_length
    for study in ("cost", "tokens", "experts", "recipe"):
        config = QualityConfig(study, tokens=(5 * per_step, 10 * per_step))
        assert {job.ends for job in jobs(config, base)} == {(5, 10)}
    ends = tuple(round(tokens / per_step) for tokens in (5e5, 1e6, 2e6, 4e6))
    assert {job.ends for job in jobs(QualityConfig("tokens"), base)} == {ends}
    assert {job.ends for job in jobs(QualityConfig("experts"), base)} == {()}


def test_a_study_has_its_own_text_and_learning_rate(base):
    (plain,) = jobs(QualityConfig("cost", models=(contenders.GQE,), seeds=1), base)
    given = QualityConfig(
        "cost", models=(contenders.GQE,), seeds=1, corpus="texts", learning_rate=0.002
    )
    (changed,) = jobs(given, base)
    assert changed.run.run_dir != plain.run.run_dir  # runs of another rate are other runs
    optimizer = dataclasses.replace(plain.run.optimizer, peak_learning_rate=0.002)
    data = dataclasses.replace(plain.run.data, corpus="texts")
    there = plain.run.run_dir
    assert dataclasses.replace(changed.run, run_dir=there) == dataclasses.replace(
        plain.run, optimizer=optimizer, data=data
    )


@pytest.mark.slow
def test_runs_branch_off_a_plateau_and_their_learning_rate_decays(base):
    ends = 10, 15
    todo = [Job("GQE", 0, base, ends)]
    scores, errors = run_study(todo)
    assert not errors
    assert list(scores["GQE"]) == [8 * 32 * end for end in ends]
    plateau = [line["learning_rate"] for line in read_metrics(base.run_dir) if "loss" in line]
    for end in ends:
        run = branch(base, end)
        start = end - round(DECAY * end)
        rates = [line["learning_rate"] for line in read_metrics(run.run_dir) if "loss" in line]
        assert rates[:start] == plateau[:start]  # one run up to there
        peak = run.optimizer.peak_learning_rate
        assert rates[start - 1] == pytest.approx(peak, rel=1e-6)
        assert rates[-1] == pytest.approx(run.optimizer.final_learning_rate, rel=1e-4)
        np.testing.assert_allclose(np.diff(rates[start:]), np.diff(rates[start:])[0], rtol=1e-3)
    before = [line["time"] for line in read_metrics(run.run_dir) if "time" in line]
    assert run_study(todo)[0] == scores  # trained once
    assert [line["time"] for line in read_metrics(run.run_dir) if "time" in line] == before
    longer, _ = run_study([Job("GQE", 0, base, (*ends, 20))])
    assert list(longer["GQE"].items())[:2] == list(scores["GQE"].items())  # it went on
    _, errors = run_study([Job("GQE", 0, base, (12, 20))])
    assert "is at step 16 already: give at least that" in errors["GQE, seed 0"]
    assert len(plot({"GQE": base}, scores).axes[0].containers) == 1


def test_tables_have_what_failed_and_differences_of_pairs(base):
    models = dict.fromkeys(("GQE", "dense", "not trained"), base)
    scores = {"GQE": {100: {0: 2.0, 1: 2.2}}, "dense": {100: {0: 1.9, 1: 2.0}}}
    cycles = dict.fromkeys(models, (1000.0, 2345.6))
    rows = table(models, scores, {"dense, seed 2": "the loss is nan"}, {}).splitlines()
    assert rows[2].split(" | ")[4:6] == ["2.1000 ± 0.1414", "+0.0000 ± 0.0000"]
    assert rows[3].split(" | ")[5:] == ["-0.1500 ± 0.0707", "1.9000, 2.0000 |"]
    assert rows[4].endswith(" | | | | |")
    assert "dense, seed 2 | failed: the loss is nan" in rows[5]
    rows = table(models, scores, {}, cycles).splitlines()
    assert {len(row.split(" | ")) for row in (rows[0], *rows[2:4])} == {8}
    assert rows[3].split(" | ")[3] == "1,000 and 2,346"


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_go_on(base):
    directory = base.run_dir + "-failing"
    wrong = dataclasses.replace(base, run_dir=directory, batch_size=7, steps=2)
    right = dataclasses.replace(base, run_dir=directory + "-not", steps=2)
    scores, errors = run_study([Job("wrong", 0, wrong), Job("right", 0, right)])
    assert list(scores) == ["right"]
    assert "is 7; it must be a multiple" in errors["wrong, seed 0"]


def test_a_study_that_is_stopped_says_that_it_goes_on(base, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "train", lambda run: None)
    monkeypatch.setattr(ablation, "read_metrics", lambda run_dir: [{"step": 3, "eval_loss": 1.0}])
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: run_study([Job("GQE", 0, base)]))
    assert exit_.value.code == 130
    assert capsys.readouterr().err == f"{base.run_dir} was stopped; the same command goes on\n"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"config": "gqa_250m"}, "its router must select"),
        ({"seeds": -1}, "seeds is -1"),
        ({"study": "tokens", "steps": 5}, "steps is 5; the runs end at the numbers of --tokens"),
        ({"tokens": (1, 2), "steps": 5}, "steps is 5"),
        ({"study": "sizes", "tokens": (1, 2)}, "in proportion"),
        ({"tokens": (2, 1)}, "ascending"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        QualityConfig(**({"study": "cost"} | fields))
