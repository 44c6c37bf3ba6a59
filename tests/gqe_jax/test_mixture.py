"""Mixtures: the shares of corpora, who reads which row, and when a run may go on."""

import dataclasses
import io
from fractions import Fraction

import numpy as np
import pytest

from gqe_jax.config import ConfigError, DataConfig, OptimizerConfig, RunConfig
from gqe_jax.data import Corpus, DataError, training_batches
from gqe_jax.data.corpus import MANIFEST
from gqe_jax.data.mixture import Mixture, Part, Plan, pattern, plans
from gqe_jax.data.pipeline import num_windows, window_indices
from gqe_jax.data.sources import open_sources
from gqe_jax.training.loop import train
from gqe_jax.training.telemetry import read_metrics
from tests.gqe_jax.runs import comparable_metrics, make_corpus, saved_state, small_config
from tests.gqe_jax.texts import write_corpus


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two corpora of the same tokenizer."""
    directory = tmp_path_factory.mktemp("corpora")
    return make_corpus(directory), write_corpus(directory, "other")


def mixture(shares, batch_size=8):
    """One that reads nothing, of stages {first step: {name: weight}}."""
    found = [
        Plan(begin, tuple(Part(name, "", Fraction(w)) for name, w in weights.items()))
        for begin, weights in shares.items()
    ]
    return Mixture(found, {}, batch_size)


def test_every_prefix_of_a_pattern_is_within_a_row_of_its_weights():
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 5, 9, 17) * 3:
        parts = rng.integers(1, 40, count)
        weights = [Fraction(int(part), int(parts.sum())) for part in parts]
        rows = pattern(weights)
        counts = (rows[:, None] == np.arange(count)).cumsum(0)
        due = np.arange(1, len(rows) + 1)[:, None] * np.array(weights, float)
        assert np.abs(counts - due).max() < 1, weights
        np.testing.assert_array_equal(counts[-1] * parts.sum(), len(rows) * parts)


def test_shares_are_within_a_row_over_ten_thousand_steps():
    weights = {"web": "0.7", "code": "0.2", "books": "0.06", "wiki": "0.04"}
    mixed = mixture({0: weights})
    seen = dict.fromkeys(weights, 0)
    for step in range(10_000):
        for name, index in mixed.place(step, range(8)):
            assert index == seen[name]  # each row of a corpus comes once, in order
            seen[name] += 1
        if step % 997 == 0 or step == 9_999:
            for name, weight in weights.items():
                assert abs(seen[name] - float(weight) * 8 * (step + 1)) < 1
            assert mixed.counts(step + 1) == seen


def test_a_second_stage_goes_on_where_the_first_left_a_corpus():
    mixed = mixture({0: {"web": "0.7", "code": "0.3"}, 5: {"web": "0.2", "maths": "0.8"}})
    rows = [row for step in range(12) for row in mixed.place(step, range(8))]
    assert [index for name, index in rows if name == "web"] == list(range(28 + 11))
    assert {name for name, _ in rows[:40]} == {"web", "code"}
    assert {name for name, _ in rows[40:]} == {"web", "maths"}
    assert mixed.counts(12) == {"web": 39, "code": 12, "maths": 45}
    assert mixed.place(10**9, [3])[0][1] > 10**9  # no loop over the steps before


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_a_step_and_a_restart_reads_what_was_due(corpora, hosts):
    first, second = (Corpus.open(path).train for path in corpora)
    plan = Plan(0, (Part("a", "", Fraction(2, 3)), Part("b", "", Fraction(1, 3))))
    mixed = Mixture([plan], {"a": first, "b": second}, 8)
    options = {"batch_size": 8, "sequence_length": 32, "seed": 3}
    config = DataConfig(read_threads=1, prefetch=2, document_masking=True)
    seen, tokens = {"a": 0, "b": 0}, {}
    for number in range(72):
        name = "aab"[number % 3]
        split = mixed.splits[name]
        windows = num_windows(split, 32)
        [window] = window_indices(seen[name], [0], batch_size=1, windows=windows, seed=3)
        tokens[number] = split.read(32 * int(window), 32)
        seen[name] += 1
    for start in (0, 4):  # from the beginning, and after a kill
        for host in range(hosts):
            rows = np.arange(8)[host::hosts]
            read = training_batches(mixed, config, start=start, stop=9, rows=rows, **options)
            for step, batch in enumerate(read, start):
                due = [tokens[8 * step + row] for row in rows]
                np.testing.assert_array_equal(batch.inputs, due)
                assert batch.segment_ids.shape == batch.inputs.shape


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("corpora/web:0.7",), "data.mixture has 'corpora/web:0.7'; it must be NAME=DIRECTORY:W"),
        (("web=corpora/web",), "has 'web=corpora/web'; it must be"),
        (("web=gs://bucket/web",), "has 'web=gs://bucket/web'; it must be"),
        (("web=a:0",), "has 'web=a:0'; it must be .*, the weight positive"),
        (("web=a:nan",), "the weight positive"),
        (("web=a:1", "web=b:1"), "has the names web, web; they must differ"),
        (("web=a:0.333333", "b=b:0.666666667"), "repeats after .* give weights of fewer digits"),
    ],
)
def test_a_mixture_that_cannot_be_read_is_named(texts, message):
    with pytest.raises(ConfigError, match=message):
        plans(RunConfig(data=DataConfig(mixture=texts)))


def test_the_decay_mixture_begins_with_the_decay():
    data = DataConfig(mixture=("a=x:3", "b=gs://y/z:1"), decay_mixture=("a=x:1",))
    first, second = plans(RunConfig(data=data, steps=100))
    assert [part.weight for part in first.parts] == [Fraction(3, 4), Fraction(1, 4)]
    assert (first.parts[1].directory, second.begin) == ("gs://y/z", 80)
    cosine = OptimizerConfig(schedule="cosine")
    with pytest.raises(ConfigError, match=r"decay_mixture is .* needs optimizer.schedule wsd"):
        plans(RunConfig(data=data, optimizer=cosine))
    moved = dataclasses.replace(data, decay_mixture=("a=elsewhere:1",))
    with pytest.raises(ConfigError, match="has a=elsewhere; a is x before the decay"):
        plans(RunConfig(data=moved))


def test_another_tokenizer_is_refused(corpora, tmp_path):
    first, second = corpora
    other = tmp_path / "other"
    other.mkdir()
    for path in second.iterdir():
        text = path.read_bytes()
        changed = text.replace(b'"end_of_document": 255', b'"end_of_document": 254')
        (other / path.name).write_bytes(changed if path.name == MANIFEST else text)
    config = small_config(first, tmp_path / "run", held_out=(f"other={other}",))
    with pytest.raises(DataError, match=r"different tokenizers \(end_of_document 254 and 255\)"):
        open_sources(config)
    for field, message in (("other", "held_out has 'other'; it must be NAME=DIRECTORY"),):
        with pytest.raises(ConfigError, match=message):
            open_sources(dataclasses.replace(config, held_out=(field,)))


@pytest.fixture(scope="module")
def mixed_run(corpora, tmp_path_factory):
    """A whole run on a mixture, with another in the decay, and two held-out sets."""
    first, second = corpora
    config = small_config(
        first,
        tmp_path_factory.mktemp("mixed"),
        data=DataConfig(
            corpus=str(first),
            mixture=(f"words={first}:0.75", f"documents={second}:0.25"),
            decay_mixture=(f"documents={second}:1",),
            read_threads=1,
            prefetch=2,
        ),
        held_out=(f"documents={second}", f"again={first}"),
    )
    train(config, stream=io.StringIO())
    return config


@pytest.mark.slow
def test_epochs_shares_and_held_out_sets_are_recorded_apart(mixed_run):
    lines = read_metrics(mixed_run.run_dir)
    at = {line["step"]: line for line in lines if "loss" in line}
    assert (at[24]["share/words"], at[24]["share/documents"]) == (0.75, 0.25)
    assert at[30]["share/documents"] == pytest.approx((24 * 8 / 4 + 6 * 8) / 240)
    windows = num_windows(Corpus.open(mixed_run.data.corpus).train, 32)
    assert at[24]["epoch/words"] == pytest.approx(144 / windows)
    scored = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in scored] == [10, 20, 30]
    for line in scored:
        assert line["eval_loss/again"] == line["eval_loss"] != line["eval_loss/documents"]
        assert line["eval_bits_per_byte/documents"] > 0
        assert {"eval_perplexity/again", "eval_tokens/documents"} <= set(line)


@pytest.mark.slow
def test_a_run_on_a_mixture_goes_on_as_if_it_had_not_stopped(mixed_run, tmp_path):
    config = dataclasses.replace(mixed_run, run_dir=str(tmp_path))
    schedule = dataclasses.replace(config.optimizer, schedule_steps=30)
    first = dataclasses.replace(config, optimizer=schedule, steps=26)
    train(first, stream=io.StringIO())
    train(config, stream=io.StringIO())
    for ours, theirs in zip(saved_state(config), saved_state(mixed_run), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    ours, theirs = ({x["step"]: x for x in comparable_metrics(run.run_dir) if "loss" in x}
                    for run in (config, mixed_run))  # fmt: skip
    assert ours == theirs


@pytest.mark.slow
def test_only_the_data_of_past_steps_must_be_the_same(mixed_run, tmp_path):
    def with_data(**fields):
        return dataclasses.replace(mixed_run, data=dataclasses.replace(mixed_run.data, **fields))

    first, second = (text.rpartition(":")[0] for text in mixed_run.data.mixture)
    renamed = (first.replace("words", "w") + ":3", second + ":1")
    train(with_data(mixture=renamed), stream=io.StringIO())  # the same shares of the same text
    with pytest.raises(ConfigError, match=r"data.mixture: .* trained on 3/4 of \w+ \+ 1/4 of"):
        train(with_data(mixture=(f"{first}:0.5", f"{second}:0.5")), stream=io.StringIO())
    with pytest.raises(ConfigError, match=r"then 1 of \w+ from 24, now"):
        train(with_data(decay_mixture=()), stream=io.StringIO())
    with pytest.raises(ConfigError, match=r"from 24, now [^,]+ .data.decay_mixture begins"):
        train(dataclasses.replace(mixed_run, steps=40), stream=io.StringIO())
