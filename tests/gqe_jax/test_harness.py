"""The lm-evaluation-harness's answers against direct computations and scores by hand."""

import dataclasses
import functools
import json
import math
import pathlib
import sys

import numpy as np
import pytest
from flax import nnx

import eval as eval_script
from gqe_jax import AttentionConfig, ConfigError, MeshConfig, ModelConfig, Transformer
from gqe_jax.data import DataError
from gqe_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from gqe_jax.evaluation.run import EvalConfig
from gqe_jax.evaluation.tasks import compare, evaluate_tasks, load_tasks
from gqe_jax.generation import Sampling
from gqe_jax.runs import RestoredRun
from gqe_jax.sharding import make_mesh
from tests.gqe_jax import special
from tests.gqe_jax.runs import save_untrained, small_config

pytest.importorskip("lm_eval", reason="needs the extra: pip install -e '.[eval]'")

# With embeddings of this size, the model repeats the last byte.
REPEATS = ModelConfig(
    attention=AttentionConfig(embed_dim=32, num_query_experts=4, num_kv_heads=2),
    num_layers=2,
    mlp_dim=48,
    vocab_size=256,
    dtype="float32",
    embedding_init_std=4.0,
)
CONTEXTS = ["a question", "", "\n", "x" * 50, "The answer: "]
CONTINUATIONS = [" and more", "start", "line", "xx", "é"]


@pytest.fixture(scope="module", autouse=True)
def _offline():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        yield


def restored(config, mesh):
    model = Transformer(config, rngs=nnx.Rngs(0))
    return RestoredRun(small_config("stdlib", "none"), 0, model, make_mesh(mesh), ByteTokenizer())


@pytest.fixture(scope="module")
def log_probabilities():
    """Float64 log-probabilities of every next byte, of one unpadded row by a forward pass."""
    model = Transformer(dataclasses.replace(REPEATS, embedding_init_std=0.1), rngs=nnx.Rngs(0))
    run = nnx.jit(lambda model, tokens: model.logits(model(tokens)[0]))

    def of(tokens):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(run(model, padded), np.float64)[0, : len(tokens)]
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    return of


@functools.cache
def harness_model(mesh, batch_size):
    from gqe_jax.evaluation.harness import HarnessModel

    config = dataclasses.replace(REPEATS, embedding_init_std=0.1)
    return HarnessModel(restored(config, mesh), batch_size=batch_size, max_length=60)


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


@pytest.mark.parametrize(
    ("mesh", "batch_size"),
    [(MeshConfig(data=8), 8), (MeshConfig(data=2, fsdp=2, tensor=2), 3)],
    ids=["data", "all axes"],
)
def test_log_likelihoods_equal_a_direct_computation(log_probabilities, mesh, batch_size):
    """In two buckets of length, with an empty context, and rolled over a longer text."""
    model = harness_model(mesh, batch_size)
    pairs = list(zip(CONTEXTS, CONTINUATIONS, strict=True)) * 2
    answers = model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, answers, strict=True):
        tokens = list(context.strip().encode()) or [255]  # the harness scores spaces between them
        scored = list((context[len(context.strip()) :] + continuation).encode())
        table = log_probabilities(tokens + scored)[len(tokens) - 1 : -1]
        assert value == pytest.approx(table[np.arange(len(scored)), scored].sum(), abs=1e-4)
        assert greedy == (table.argmax(axis=-1) == scored).all()

    text = "In windows that overlap by one byte, each byte is predicted once, at 60."
    (rolled,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    stream = [255, *text.encode()]
    first, rest = log_probabilities(stream[:60]), log_probabilities(stream[-61:-1])
    expected = first[np.arange(60), stream[1:61]].sum()
    beyond = len(stream) - 61
    expected += rest[np.arange(60), stream[-60:]][-beyond:].sum()
    assert rolled == pytest.approx(expected, abs=1e-4)


def test_a_context_is_cut_from_the_left_and_a_continuation_never(log_probabilities, monkeypatch):
    model = harness_model(MeshConfig(data=8), 8)
    monkeypatch.setattr(model, "max_length", 10)
    long = "a continuation of 31 characters"
    pairs = [("0123456789abcdef", "xyz"), ("0123", long)]
    cut, whole = model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    kept = list(b"89abcdefxyz")
    expected = log_probabilities(kept)[[7, 8, 9], kept[-3:]].sum()
    assert cut[0] == pytest.approx(expected, abs=1e-4)
    kept = list(b"3" + long.encode())
    table = log_probabilities(kept)[:-1]
    assert whole[0] == pytest.approx(table[np.arange(31), kept[1:]].sum(), abs=1e-4)


def test_log_likelihoods_begin_with_bos_as_in_the_harness_own_model(log_probabilities, tmp_path):
    """The token lists are those that `HFLM` makes of the library's tokenizer.

    With BOS where the post-processor adds it, which is then the prefix of whole texts too.
    """
    from gqe_jax.evaluation.harness import HarnessModel

    tokenizer = load_tokenizer(special.write(tmp_path) / "tokenizer.json")
    run = restored(dataclasses.replace(REPEATS, embedding_init_std=0.1), MeshConfig(data=8))
    run = dataclasses.replace(run, tokenizer=tokenizer)
    model = HarnessModel(run, batch_size=8, max_length=60)
    assert (model.prefix_token_id, model.eot_token_id) == (special.BOS, special.EOS)

    theirs = special.make_tokenizer()
    pairs = [("the query", " of Paris"), ("", "the group"), ("a ", "Q is"), ("<s> a", " Q")]
    answers = model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    due = [
        (theirs.encode("the query").ids, theirs.encode("the query of Paris").ids),
        ([special.BOS], [special.BOS, *theirs.encode("the group", add_special_tokens=False).ids]),
        (theirs.encode("a").ids, theirs.encode("a Q is").ids),
        (theirs.encode("a").ids, theirs.encode("a Q").ids),
    ]
    for (context, whole), (value, _) in zip(due, answers, strict=True):
        table = log_probabilities(whole)[len(context) - 1 : -1]
        scored = whole[len(context) :]
        assert value == pytest.approx(table[np.arange(len(scored)), scored].sum(), abs=1e-4)

    (rolled,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", [("the query",)]))
    stream = [special.BOS, *theirs.encode("the query").ids]
    table = log_probabilities(stream)[:-1]
    assert rolled == pytest.approx(table[np.arange(len(table)), stream[1:]].sum(), abs=1e-4)

    options = {"until": [], "max_gen_toks": 3, "do_sample": False}
    (text,) = model.generate_until(requests("generate_until", [("the query", options)]))
    row = theirs.encode("the query").ids
    for _ in range(3):
        row.append(int(log_probabilities(row)[-1].argmax()))
    assert text == theirs.decode(row)[len("the query") :]


@pytest.mark.parametrize(
    ("given", "sampling"),
    [
        ({}, Sampling()),
        ({"do_sample": True}, Sampling(1.0)),  # the default temperature of `transformers`
        ({"do_sample": True, "temperature": None, "top_p": None}, Sampling(1.0)),
        ({"do_sample": True, "temperature": 0.5, "top_k": 4, "top_p": 0.9}, Sampling(0.5, 4, 0.9)),
        ({"do_sample": False, "temperature": 0.5}, Sampling()),
        ({"temperature": 0.5, "top_k": 0}, Sampling(0.5)),
        ({"until": None, "max_gen_toks": "8"}, Sampling()),
    ],
)
def test_a_tasks_sampling_has_the_defaults_of_transformers(given, sampling):
    from gqe_jax.evaluation.harness import _options, _sampling

    assert _sampling(_options(given)) == sampling


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": "hot"},
        {"do_sample": True, "temperature": -1},
        {"do_sample": True, "top_k": "x"},
        {"temperature": 1, "top_p": [1]},
        {"until": [3]},
        {"max_gen_toks": 0},
        {"max_gen_toks": [1]},
    ],
)
def test_a_tasks_bad_options_are_named(given):
    from gqe_jax.evaluation.harness import _options, _sampling

    with pytest.raises(ConfigError, match=r"generation_kwargs .*correct the task"):
        _sampling(_options(given))


CHOICES = [  # for a model that repeats the last byte of the question
    {"q": "Say a", "choices": ["aaaa", "bbbb"], "gold": 0},  # right
    {"q": "Not a", "choices": ["b", "a"], "gold": 0},  # wrong
    # Both leave a once; the longer one only adds bytes it is sure of. Its sum is no larger, its
    # mean over characters is.
    {"q": "Long a", "choices": ["b", "bbbbbbbb"], "gold": 1},
    {"q": "Say z", "choices": ["y", "x", "z"], "gold": 2},  # right
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, shots: {data}}}}}
output_type: {kind}
test_split: test
fewshot_split: shots
fewshot_config: {{sampler: first_n}}
doc_to_text: "{{{{q}}}}"
target_delimiter: ""
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks")
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in CHOICES))
    choices = TASK.format(name="repeats", data=data, kind="multiple_choice")
    choices += "doc_to_choice: choices\ndoc_to_target: gold\n"
    choices += "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    (directory / "repeats.yaml").write_text(choices)
    text = TASK.format(name="writes", data=data, kind="generate_until")
    text += 'doc_to_target: "aaaaaa"\nmetric_list: [{metric: exact_match}]\n'
    text += "generation_kwargs: {until: [zz], max_gen_toks: 6}\n"
    (directory / "writes.yaml").write_text(text)
    return str(directory)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    config = small_config("stdlib", tmp_path_factory.mktemp("run"))
    return str(save_untrained(dataclasses.replace(config, model=REPEATS)))


def test_our_own_tasks_give_the_scores_counted_by_hand(tasks, run_dir):
    config = EvalConfig((run_dir,), tasks="repeats,writes", include_path=tasks, batch_size=4)
    shown = evaluate_tasks(config)
    report = json.loads(pathlib.Path(run_dir, "evaluation.json").read_text())
    scores = report["results"]
    assert scores["repeats"]["acc,none"] == 2 / 4
    assert scores["repeats"]["acc_norm,none"] == 3 / 4
    assert scores["writes"]["exact_match,none"] == 3 / 4  # "Say z" writes zz and stops
    assert report["mean"] == 3 / 4
    assert "mean of repeats (acc_norm), writes (exact_match): 75.00 %" in shown
    assert "|repeats|" in shown.replace(" ", "")
    assert report["config"]["max_length"] == 32


def test_limit_shots_and_two_runs(tasks, run_dir, tmp_path, capsys, monkeypatch):
    """By the command line."""
    output = tmp_path / "both.json"
    flags = {"tasks": "repeats", "num-fewshot": 1, "limit": 2, "include-path": tasks}
    flags["output"] = output
    arguments = [run_dir, run_dir, *(f"--{name}={value}" for name, value in flags.items())]
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments])
    eval_script.main()
    shown = capsys.readouterr().out
    report = json.loads(output.read_text())
    result = report["runs"][run_dir]
    assert result["n-shot"]["repeats"] == 1
    assert result["n-samples"]["repeats"] == {"original": 4, "effective": 2}
    assert result["results"]["repeats"]["acc_norm,none"] == 1 / 2
    (difference,) = report["differences"]
    assert difference["stderr"] == 0
    assert difference["p_value"] == 1
    assert "| repeats | acc_norm | 50.00 | 50.00 | +0.00 | 0.00 | 1 |" in shown


def test_differences_are_paired():
    """Against the formulas of the paired t-test, and its table: t = 2.449 on 3 degrees."""

    def results(**scores):
        samples = {
            task: [{"filter": "none", "acc": value} for value in values]
            for task, values in scores.items()
        }
        return {"results": {task: {"acc,none": 0} for task in scores}, "samples": samples}

    first = results(one=[0, 0, 1, 0], two=[1, 1, 0, 0])
    second = results(one=[1, 1, 1, 1], two=[1, 0, 1, 0])
    one, two, mean = compare(first, second)
    assert (one.first, one.second) == (0.25, 1.0)
    assert one.stderr == pytest.approx(0.25)  # differences 1, 1, 0, 1: deviation 0.5
    assert one.p_value == pytest.approx(0.0577, abs=1e-4)  # t = 3 on 3 degrees of freedom
    assert two.second - two.first == 0
    assert two.p_value == pytest.approx(1.0)
    assert two.stderr == pytest.approx(math.sqrt(2 / 3) / 2)
    assert mean.second - mean.first == pytest.approx(0.375)
    assert mean.stderr == pytest.approx(math.hypot(one.stderr, two.stderr) / 2)
    z = 0.375 / mean.stderr
    assert mean.p_value == pytest.approx(math.erfc(z / math.sqrt(2)))


def test_data_that_is_not_here_is_named_with_where_it_goes(tmp_path):
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: someone/far\noutput_type: loglikelihood_rolling\n"
        "test_split: test\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    )
    message = (
        r"task far: its data cannot be loaded[\s\S]*load_dataset\('someone/far'\)[\s\S]*OFFLINE"
    )
    with pytest.raises(DataError, match=message):
        load_tasks(["far"], str(tmp_path))


def test_what_cannot_work_is_named(monkeypatch):
    with pytest.raises(ConfigError, match="name one run, or two"):
        EvalConfig(("a", "b", "c"), tasks="x")
    with pytest.raises(ConfigError, match="limit is 0; it must be positive"):
        EvalConfig(("a",), tasks="x", limit=0)
    with pytest.raises(ConfigError, match="include_path is 'nowhere'; it must be a directory"):
        load_tasks(["x"], "nowhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[eval\]'"):
        evaluate_tasks(EvalConfig(("a",), tasks="x"))
