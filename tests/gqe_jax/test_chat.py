"""Conversations: their tokens and answers, how they are packed, and what has a gradient."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqe_jax.config import ConfigError, DataConfig
from gqe_jax.data import Corpus, DataError, evaluation_batches, training_batches
from gqe_jax.data.chat import ChatConfig, prepare_chats, tokenise
from gqe_jax.data.chat_template import ChatTemplate
from gqe_jax.data.pipeline import held_out_tokens
from gqe_jax.data.tokenizers import FileTokenizer
from gqe_jax.training.loop import train
from gqe_jax.training.loss import chunked_loss
from gqe_jax.training.telemetry import read_metrics
from tests.gqe_jax.runs import small_config

pytest.importorskip("jinja2", reason="needs the extra: pip install -e '.[chat]'")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{%- for message in messages %}\n"
    "    {%- if message.role == 'assistant' %}\n"
    "{{ 'A: ' }}{% generation %}{{ message.content + eos_token }}{% endgeneration %}\n"
    "    {%- else %}\n"
    "{{ message.role | upper + ': ' + message.content | trim }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}"
)
TEXTS = ["what is a query", "an expert wählt", "the key 🙂 reads", "a head", "ok", "why not"]


def write_tokenizer(directory, template, **names):
    """Byte-level BPE with the special tokens of ChatML, and a template beside it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    directory.mkdir(exist_ok=True)
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*TEXTS, "user assistant system"] * 9, trainer)
    made.save(str(directory / "tokenizer.json"))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(values | names))
    return directory


def conversation(seed):
    rng = np.random.default_rng(seed)
    turns = [{"role": "system", "content": "be brief"}] if seed % 3 == 0 and seed % 5 < 4 else []
    for _ in range(1 + seed % 5 // 4):
        turns.append({"role": "user", "content": str(rng.choice(TEXTS))})
        turns.append({"role": "assistant", "content": str(rng.choice(TEXTS))})
    return turns


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), CHATML)


@pytest.fixture(scope="module")
def chats(tokenizer_directory, tmp_path_factory):
    """The conversations, and a corpus of them in windows of 64 tokens."""
    directory = tmp_path_factory.mktemp("chats")
    rows = [conversation(seed) for seed in range(120)]
    path = directory / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    config = ChatConfig(
        (str(path),),
        str(directory / "corpus"),
        str(tokenizer_directory / "tokenizer.json"),
        sequence_length=64,
        validation_fraction=0.1,
        shard_tokens=1000,
    )
    prepare_chats(config)
    return rows, config


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "generation"])
def test_tokens_and_answers_are_those_of_transformers(tmp_path, template):
    transformers = pytest.importorskip("transformers")
    directory = write_tokenizer(tmp_path / "tokenizer", template)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours, own = FileTokenizer(directory / "tokenizer.json"), ChatTemplate(directory)
    for seed in range(20):
        messages = conversation(seed)
        example = tokenise(messages, own, ours)
        found = theirs.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=template == MARKED,
        )
        assert example.tokens.tolist() == found["input_ids"]
        if template == MARKED:
            assert (example.marks & 1).tolist() == found["assistant_masks"]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "generation"])
def test_the_answers_are_the_assistants_words(tmp_path, template):
    directory = write_tokenizer(tmp_path / "tokenizer", template)
    tokenizer = FileTokenizer(directory / "tokenizer.json")
    messages = [
        {"role": "user", "content": "what is a query"},
        {"role": "assistant", "content": "the key 🙂 reads"},
        {"role": "user", "content": "why not"},
        {"role": "assistant", "content": "ok"},
    ]
    example = tokenise(messages, ChatTemplate(directory), tokenizer)
    answers = tokenizer.decode_documents([example.tokens[example.marks & 1 > 0]])
    end = "<|im_end|>" + "\n" * (template == CHATML)
    assert answers == [f"the key 🙂 reads{end}ok{end}"]
    assert example.marks[0] == 2
    assert example.answer_bytes == len(answers[0].encode())


def test_conversations_are_packed_whole_and_masked(chats, tokenizer_directory):
    rows, config = chats
    tokenizer = FileTokenizer(tokenizer_directory / "tokenizer.json")
    template = ChatTemplate(tokenizer_directory)
    due = sorted(
        (tuple(e.tokens.tolist()), tuple((e.marks & 1).tolist()))
        for e in (tokenise(row, template, tokenizer) for row in rows)
    )
    found, filled, size = [], 0, 0
    corpus = Corpus.open(config.output)
    for split in (corpus.train, corpus.validation):
        assert (len(split) - 1) % 64 == 0
        for window in range(len(split) // 64):
            [tokens] = split.read_many([64 * window], 64)
            [marks] = split.read_marks([64 * window], 64)
            begins = np.flatnonzero(marks & 2)
            assert begins[0] == 0
            parts = zip(*(np.split(x, begins[1:]) for x in (tokens, marks & 1)), strict=True)
            whole = [(tuple(t.tolist()), tuple(m.tolist())) for t, m in parts if m.any()]
            found += whole
            filled, size = filled + sum(len(t) for t, _ in whole), size + 64
    assert sorted(found) == due
    assert filled > 0.8 * size
    answers = sum(sum(marks) for _, marks in due)
    assert corpus.train.info.num_answers + corpus.validation.info.num_answers == answers


def test_batches_have_the_weights_of_answers_and_segments(chats):
    _, config = chats
    split = Corpus.open(config.output).train
    batches = training_batches(
        split, DataConfig(read_threads=1), start=0, stop=3, rows=range(4), batch_size=4,
        sequence_length=64, seed=0,
    )  # fmt: skip
    stream, marks = split.read(0, len(split)), split.read_marks([0], len(split))[0]
    for batch in batches:
        for row in range(4):
            [at] = [
                start
                for start in range(0, len(split) - 1, 64)
                if (stream[start : start + 64] == batch.inputs[row]).all()
            ][:1]
            np.testing.assert_array_equal(batch.weights[row], marks[at + 1 : at + 65] & 1)
            np.testing.assert_array_equal(
                batch.segment_ids[row], np.cumsum(marks[at : at + 64] & 2 > 0)
            )
    held_out = Corpus.open(config.output).validation
    options = {"batch_size": 4, "sequence_length": 64, "limit": 1}
    _, batches = evaluation_batches(held_out, DataConfig(), rows=range(4), **options)
    assert held_out_tokens(held_out, 4, 64, 1) == sum(b.weights.sum() for b in batches)


def test_masked_tokens_have_exactly_no_gradient(chats):
    _, config = chats
    split = Corpus.open(config.output).train
    [batch] = training_batches(
        split, DataConfig(read_threads=1), start=0, stop=1, rows=range(4), batch_size=4,
        sequence_length=64, seed=0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    hidden = jnp.float32(rng.standard_normal((4, 64, 8)))
    table = jnp.float32(rng.standard_normal((300, 8)))
    weights = batch.weights / batch.weights.sum()

    def loss(hidden, targets):
        return chunked_loss(hidden, table, targets, weights, z_loss_weight=0.1)[0]

    gradient = np.asarray(jax.grad(loss)(hidden, jnp.asarray(batch.targets)))
    masked = batch.weights == 0
    assert 0 < masked.sum() < masked.size
    assert (gradient[masked] == 0).all()
    assert (np.abs(gradient[~masked]).max(-1) > 0).all()
    other = np.where(masked, (batch.targets + 1) % 300, batch.targets)  # what is masked is not read
    np.testing.assert_array_equal(gradient, jax.grad(loss)(hidden, jnp.asarray(other)))


@pytest.mark.slow
def test_a_run_learns_the_answers(chats, tmp_path):
    _, config = chats
    run = small_config(config.output, tmp_path, steps=6, sequence_length=64, eval_every=6)
    model = dataclasses.replace(run.model, vocab_size=304)
    run = dataclasses.replace(run, model=model)
    with pytest.raises(ConfigError, match=r"document_masking is False; .* has conversations"):
        train(run, stream=io.StringIO())
    data = dataclasses.replace(run.data, document_masking=True)
    with pytest.raises(DataError, match=r"sequence_length is 32; .* packed into windows of 64"):
        train(dataclasses.replace(run, data=data, sequence_length=32), stream=io.StringIO())
    train(dataclasses.replace(run, data=data), stream=io.StringIO())
    lines = read_metrics(tmp_path)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    scores = [line for line in lines if "eval_loss" in line][-1]
    assert 0 < scores["eval_tokens"] <= 2 * 8 * 64
    assert scores["eval_bits_per_byte"] > 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "line 1: messages must be a list of objects with role and content"),
        ({"messages": [{"role": "user", "content": "ok"}]}, "one of the assistant's"),
        ({"messages": [{"role": "assistant", "content": "ok " * 99}]}, "more than sequence_length"),
        ({"messages": [{"role": "assistant"}]}, "the chat template refuses the conversation"),
    ],
)
def test_a_conversation_that_cannot_be_used_is_named_or_skipped(
    tokenizer_directory, tmp_path, capsys, row, message
):
    good = [{"messages": conversation(seed)} for seed in range(40)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in [row, *good]))
    config = ChatConfig(
        (str(path),), str(tmp_path / "corpus"), str(tokenizer_directory / "tokenizer.json"), 128,
        validation_fraction=0.2,
    )  # fmt: skip
    with pytest.raises(DataError, match=message):
        prepare_chats(config)
    assert not (tmp_path / "corpus").exists()
    manifest = prepare_chats(dataclasses.replace(config, on_error="skip"))
    assert sum(info.num_documents for info in manifest.splits.values()) == 40
    assert "skipped 1 conversations" in capsys.readouterr().err


def test_a_template_is_confined_and_must_be_there(tmp_path):
    spy = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    hidden = write_tokenizer(tmp_path / "spy", spy)
    with pytest.raises(DataError, match=r"refuses the conversation .*unsafe"):
        ChatTemplate(hidden).render(conversation(1))
    bare = write_tokenizer(tmp_path / "bare", None)
    with pytest.raises(DataError, match=r"has no chat template; put chat_template.jinja"):
        ChatTemplate(bare)
    (bare / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(DataError, match=r"the chat template in .* is damaged"):
        ChatTemplate(bare)
    changing = "{{ messages | length }}" + CHATML
    with pytest.raises(DataError, match=r"mark them in it with {% generation %}"):
        ChatTemplate(write_tokenizer(tmp_path / "changing", changing)).render(conversation(1))
