"""Generation against whole forward passes without a cache, and the text that comes of tokens."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import generate as generate_script
from generate import GenerateConfig
from gqe_jax import AttentionConfig, ConfigError, MeshConfig, ModelConfig, Transformer
from gqe_jax.data import DataError
from gqe_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from gqe_jax.generation import Generator, Sampling, TextStream, sample, stream_text
from gqe_jax.model.transformer import unrolled
from gqe_jax.runs import restore_run
from gqe_jax.sharding import make_mesh
from tests.gqe_jax import special
from tests.gqe_jax.runs import save_untrained, small_config

CONFIG = ModelConfig(
    attention=AttentionConfig(
        embed_dim=32, num_query_experts=4, num_kv_heads=2, router_init_std=0.5
    ),
    num_layers=2,
    mlp_dim=48,
    vocab_size=256,
    dtype="float32",
)
NEW = 12
PROMPTS = [np.random.default_rng(n).integers(0, 256, n).tolist() for n in (5, 1, 23, 12)]


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model)


@pytest.fixture(scope="module")
def expected(model):
    """The most probable continuations, each token by a forward pass over all before it."""
    logits_of = nnx.jit(lambda model, tokens: model.logits(model(tokens)[0]))
    rows = [list(prompt) for prompt in PROMPTS]
    for row in rows:
        for _ in range(NEW):
            padded = np.zeros((1, 36), np.int32)
            padded[0, : len(row)] = row
            logits = np.asarray(logits_of(model, padded))[0, len(row) - 1]
            second, first = np.sort(logits)[-2:]
            assert first - second > 1e-4  # far above rounding: no accident decides
            row.append(int(logits.argmax()))
    return [row[len(prompt) :] for row, prompt in zip(rows, PROMPTS, strict=True)]


def generate(generator, prompts=PROMPTS, **options):
    rows = [[] for _ in prompts]
    for row, token in generator.stream(prompts, max_tokens=NEW, **options):
        rows[row].append(token)
    return rows


def test_greedy_tokens_are_those_of_whole_forward_passes(generator, expected):
    assert generate(generator) == expected


def test_greedy_tokens_do_not_depend_on_the_batch(generator, expected):
    assert generate(generator, PROMPTS[2:3]) == expected[2:3]
    order = [3, 1, 2, 3]
    assert generate(generator, [PROMPTS[i] for i in order]) == [expected[i] for i in order]


def test_greedy_tokens_depend_neither_on_chunks_nor_on_the_mesh(model, expected):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert generate(Generator(model, mesh, chunk_size=7)) == expected


def test_a_rows_random_numbers_are_its_own(generator):
    options = {"sampling": Sampling(temperature=0.1, top_k=10, top_p=0.9), "seed": 3}
    together = generate(generator, **options)
    assert generate(generator, PROMPTS[2:3], rows=[2], **options) == together[2:3]
    assert generate(generator, **options | {"seed": 4}) != together
    assert len(set(map(tuple, generate(generator, [PROMPTS[2]] * 4, **options)))) == 4


def test_rows_end_by_themselves(generator, expected):
    """At the token that ends documents, and where the caller says so."""
    end = next(t for t in expected[2] if t not in expected[0])
    rows = generate(
        generator, end_of_document=end, stop=lambda row, token: row == 0 and token == expected[0][3]
    )
    assert rows[0] == expected[0][: expected[0].index(expected[0][3]) + 1]
    assert rows[2] == expected[2][: expected[2].index(end)]


@pytest.mark.parametrize(
    ("sampling", "probabilities"),
    [
        (Sampling(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=0.5), [0.25, 0.09, 0.0225, 0.0025]),
        (Sampling(temperature=1.0, top_k=2), [0.5, 0.3, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.79), [0.5, 0.3, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.81), [0.5, 0.3, 0.15, 0]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.5), [0.5, 0, 0, 0]),
        (Sampling(), [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_their_probabilities(sampling, probabilities):
    """Frequencies of 20,000 rows, within four standard deviations."""
    count, order = 20_000, [2, 0, 3, 1]
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))[order].astype(np.float32)
    tokens = sample(jnp.tile(logits, (count, 1)), sampling, jax.random.key(0), np.arange(count), 0)
    shares = np.bincount(tokens, minlength=4)[np.argsort(order)] / count
    wanted = np.array(probabilities) / np.sum(probabilities)
    assert (np.abs(shares - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / count)).all()


@pytest.mark.parametrize("variant", ["gqe", "gqa"])
def test_decoding_copies_neither_cache_nor_mean(variant):
    """No temporary is as large as one layer's keys, and the cache is updated in place."""
    attention = dataclasses.replace(CONFIG.attention, variant=variant, head_dim=32)
    config = dataclasses.replace(CONFIG, attention=attention)
    model = nnx.eval_shape(lambda: unrolled(Transformer(config, rngs=nnx.Rngs(0))))
    graphdef, params = nnx.split(model)
    cache = jax.eval_shape(lambda: nnx.merge(graphdef, params).create_cache(2, 2048))

    def step(params, token, cache):
        hidden, _, cache = nnx.merge(graphdef, params)(token, cache=cache)
        return hidden, cache

    token = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    compiled = jax.jit(step, donate_argnums=2).lower(params, token, cache).compile()
    memory = compiled.memory_analysis()
    keys = 4 * cache[0].key.size
    assert memory.alias_size_in_bytes >= 2 * CONFIG.num_layers * keys
    assert memory.temp_size_in_bytes < keys / 2
    entry = compiled.as_text().split("ENTRY")[1].splitlines()
    large = [line for line in entry if re.match(r" *%\S+ = f32\[2,2,2048,32\]", line)]
    written = [line.split("=")[0].strip() for line in large if "parameter(" not in line]
    assert len(written) == 2 * CONFIG.num_layers
    readers = [
        line
        for line in entry
        if line not in large
        and "ROOT" not in line
        and any(re.search(rf"{name}[,)]", line) for name in written)
    ]
    assert len(readers) == 2 * CONFIG.num_layers  # one product a key or value of all groups


def test_weights_are_stored_in_the_type_they_are_computed_with():
    attention = dataclasses.replace(CONFIG.attention, selection_bias=True)
    config = dataclasses.replace(CONFIG, attention=attention, dtype="bfloat16")
    model = nnx.eval_shape(lambda: unrolled(Transformer(config, rngs=nnx.Rngs(0))))
    stored = {"/".join(map(str, p)): v.dtype for p, v in nnx.to_flat_state(nnx.state(model))}
    assert stored["layers/1/mlp/up/kernel"] == jnp.bfloat16
    assert stored["layers/1/attention/router/kernel"] == jnp.float32
    assert stored["layers/1/attention/selection_bias"] == jnp.float32
    assert stored["final_norm/scale"] == jnp.float32


def bytes_to_text(tokens):
    return bytes(tokens).decode(errors="replace")


def test_text_comes_in_whole_characters():
    stream, whole = TextStream(bytes_to_text), "a€b\U0001f600"
    pieces = [stream.push(token) for token in whole.encode()]
    assert pieces == ["a", "", "", "€", "b", "", "", "", "\U0001f600"]
    assert stream.push(0xE2) == ""
    assert stream.finish() == "\ufffd"


def test_pieces_add_up_to_the_text_whatever_the_bytes():
    """Broken characters too; each token is decoded a few times, however long the text."""
    tokens = np.random.default_rng(0).choice(list("aé€\U0001f600".encode()), 2000).tolist()
    decoded = []

    def decode(tokens):
        decoded.append(len(tokens))
        return bytes_to_text(tokens)

    stream = TextStream(decode, stop=["no such text"])
    text = "".join(stream.push(token) for token in tokens) + stream.finish()
    assert text == bytes_to_text(tokens)
    assert sum(decoded) < 20 * len(tokens)


@pytest.mark.wrong_types
def test_words_keep_the_space_before_them():
    """Decodes like SentencePiece, which leaves out the space before the first token."""
    stream = TextStream(lambda words: "".join(words).removeprefix(" "))
    assert [stream.push(word) for word in (" a", " b", "c", " ", "d")] == ["a", " b", "c", " ", "d"]


@pytest.mark.wrong_types
def test_text_goes_on_behind_a_broken_character():
    """Decodes like tokenizers with byte fallback: one bad byte spoils its neighbours."""

    def decode(tokens):
        text = ""
        for is_byte, run in itertools.groupby(tokens, lambda token: isinstance(token, int)):
            run = list(run)
            try:
                text += bytes(run).decode() if is_byte else "".join(run)
            except UnicodeDecodeError:
                text += "\ufffd" * len(run)
        return text

    stream = TextStream(decode)
    pieces = [stream.push(token) for token in (*"€".encode(), 0xFF, " a", " b")]
    assert pieces[:4] == ["", "", "€", ""]
    assert pieces[4].endswith("\ufffd a")
    assert pieces[5] == " b"


def test_text_ends_before_a_stop_sequence():
    stream = TextStream(bytes_to_text, stop=["STOP", "END."])
    pieces = [stream.push(token) for token in b"oSTaEND.x"]
    assert pieces == ["o", "", "", "STa", "", "", "", "", ""]
    assert stream.stopped
    assert stream.finish() == ""
    unfinished = TextStream(bytes_to_text, stop=["STOP"])
    assert [unfinished.push(token) for token in b"STO"] == ["", "", ""]
    assert unfinished.finish() == "STO"


SPECIAL = special.make_tokenizer()


def stream_of(prompt, stop=()):
    """A stream of a tokenizer whose decoder drops the first space."""
    decode = lambda tokens: SPECIAL.decode(tokens, skip_special_tokens=True)  # noqa: E731
    texts = {special.VOCABULARY[text]: text for text in special.SPECIAL}
    return TextStream(decode, stop, prompt=SPECIAL.encode(prompt).ids, special=texts)


@pytest.mark.parametrize(
    "tokens", [["▁Paris", "▁is", "Q"], ["<unk>", "▁Paris"], ["▁a", "<|im_end|>", "▁is", "▁a"]]
)
@pytest.mark.parametrize("stop", [(), ("<|im_end|>Q",)])
def test_a_continuation_is_what_follows_the_prompt_in_their_common_text(tokens, stop):
    """Its first space, where the decoder drops that of a text, and those behind special tokens."""
    ids = [special.VOCABULARY[token] for token in tokens]
    stream = stream_of("the query", stop)
    text = "".join(stream.push(token) for token in ids) + stream.finish()
    assert text == SPECIAL.decode(SPECIAL.encode("the query").ids + ids)[len("the query") :]


def test_a_prompt_may_end_within_a_character():
    stream = TextStream(bytes_to_text, prompt=list("a€".encode())[:-1])
    assert [stream.push(token) for token in "€b".encode()[2:]] == ["€", "b"]
    kept = TextStream(bytes_to_text, prompt=[0xFF])
    assert [kept.push(token) for token in b"ab"] == ["a", "b"]


@pytest.mark.parametrize(
    ("stop", "text", "stops"),
    [
        ("<|im_end|>", " a", True),
        ("a<|im_end|> is", " ", True),
        ("<|im_end|> is", " a", True),
        ("<|im_end|><|im_end|>", " a is Q", False),
        ("<|eot_id|>", " a is Q", False),
        (" is<s>", " a is Q", False),
    ],
)
def test_a_stop_sequence_may_contain_special_tokens(stop, text, stops):
    """They are no text where they do not stop it."""
    tokens = ["▁a", "<|im_end|>", "▁is", "▁Q"]
    stream = stream_of("the", [stop, "no such text"])
    found = "".join(stream.push(special.VOCABULARY[token]) for token in tokens)
    assert (found + stream.finish(), stream.stopped) == (text, stops)


def test_a_stop_sequence_of_special_tokens_may_also_be_spelled():
    stream = TextStream(bytes_to_text, ["<|im_end|>"], special={300: "<|im_end|>"})
    assert "".join(stream.push(token) for token in b"a<|im_end|>b") == "a"
    assert stream.stopped


@pytest.fixture(scope="module")
def repeater():
    """A model that repeats the last token."""
    return Generator(
        Transformer(dataclasses.replace(CONFIG, embedding_init_std=4.0), rngs=nnx.Rngs(0))
    )


def test_texts_of_an_imported_tokenizer(repeater, tmp_path):
    """They begin with BOS, keep their spaces, and end with each token that ends texts."""
    files = {"config": {"eos_token_id": [special.EOS, special.EOT]}}
    tokenizer = load_tokenizer(special.write(tmp_path, **files) / "tokenizer.json")
    prompts = ["Q is", "the Paris", "a<|eot_id|>", "a</s>", "a<|im_end|>"]
    texts = list(prompts)
    for row, piece in stream_text(repeater, tokenizer, prompts, max_tokens=3, stop=["<|im_end|>"]):
        texts[row] += piece
    assert texts == ["Q is is is is", "the Paris Paris Paris Paris", *prompts[2:]]
    assert list(repeater.stream([], max_tokens=3)) == []
    assert list(stream_text(repeater, tokenizer, [], max_tokens=3)) == []


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-40, 1e-45, 1e-300])
def test_temperatures_near_zero_are_greedy(temperature):
    logits = jnp.array([[30.0, 90.0, -50.0], [-90.0, -80.0, -70.0]])
    tokens = sample(logits, Sampling(temperature), jax.random.key(0), np.arange(2), 0)
    assert tokens.tolist() == [1, 2]


def test_texts_stream_with_stops_of_their_own(generator):
    options = {"sampling": Sampling(temperature=0.2), "max_tokens": NEW}
    prompts = ["a prompt of 24 characters", "", "a", "b"]

    def texts(**more):
        rows = [""] * 4
        for row, piece in stream_text(generator, ByteTokenizer(), prompts, **options | more):
            rows[row] += piece
        return rows

    whole = texts()
    assert all(whole)
    stop = whole[1][4:6]
    assert texts(stop=[stop]) == [text.split(stop)[0] for text in whole]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda g: Sampling(temperature=-1), ConfigError, "temperature is -1; it must be >= 0"),
        (
            lambda g: list(g.stream([[1], [2, 256]], max_tokens=1)),
            ConfigError,
            "prompt 1 has the t",
        ),
        (
            lambda g: list(g.stream([[-1]], max_tokens=1)),
            ConfigError,
            "prompt 0 has the token id -1",
        ),
        (lambda g: Sampling(temperature=float("nan")), ConfigError, "temperature is nan; it must"),
        (lambda g: Sampling(top_k=0), ConfigError, "top_k is 0; it must be positive"),
        (lambda g: Sampling(top_p=0), ConfigError, "top_p is 0; it must be above 0"),
        (lambda g: TextStream(bytes_to_text, [""]), ConfigError, "stop is ''"),
        (lambda g: list(g.stream([[1], []], max_tokens=1)), ValueError, "prompt 1 is empty"),
    ],
)
def test_what_cannot_work_is_named(generator, make, error, message):
    with pytest.raises(error, match=message):
        make(generator)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return str(save_untrained(small_config("gone", tmp_path_factory.mktemp("run"))))


def test_the_command_line_prints_the_prompt_and_what_follows(run_dir, capsys):
    options = {"sampling": Sampling(temperature=0.3), "seed": 1, "tokenizer": "byte"}
    generate_script.generate(GenerateConfig(run_dir, prompt=("def f",), max_tokens=8, **options))
    shown = capsys.readouterr().out
    assert shown.startswith("def f")
    assert len(shown) > len("def f\n")


def test_the_command_line_prints_several_texts_when_all_are_done(capsys):
    generate_script.print_texts(("a", "x"), [(0, " b"), (1, " y"), (0, " c")])
    assert capsys.readouterr().out == "a b c\n\nx y\n"


def test_a_run_whose_corpus_is_gone_asks_for_its_tokenizer(run_dir):
    with pytest.raises(DataError, match=r"corpus gone has no manifest.json.*--tokenizer byte"):
        restore_run(run_dir)
