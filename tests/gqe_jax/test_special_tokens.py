"""Tokens that begin and end texts, against `tokenizers` and the rules of Hugging Face."""

import json

import numpy as np
import pytest

from gqe_jax.data import DataError
from gqe_jax.data.corpus import Corpus
from gqe_jax.data.prepare import PrepareConfig, prepare
from gqe_jax.data.tokenizers import ByteTokenizer, encode_prompt, load_tokenizer
from gqe_jax.evaluation.run import EvalConfig
from gqe_jax.interop.export_weights import ExportConfig, export_weights
from gqe_jax.interop.import_weights import ImportConfig, import_weights
from gqe_jax.report.__main__ import ReportConfig
from gqe_jax.runs import Run, load_config, restore_run
from tests.gqe_jax import special
from tests.gqe_jax.special import BOS, EOS, EOT, IM_END
from tests.gqe_jax.test_interop import CONFIGS, random_tensors, save_file

TEXTS = ["the query of Paris", "", "<s> a group", "is</s> a"]


@pytest.mark.parametrize("bos", [True, False])
def test_a_prompt_has_the_tokens_of_the_library(bos, tmp_path):
    tokenizer = load_tokenizer(special.write(tmp_path, bos=bos) / "tokenizer.json")
    theirs = special.make_tokenizer(bos=bos)
    for text in TEXTS:
        spelled = text.startswith("<s>")  # gets no second BOS, as in the reference harness
        expected = theirs.encode(text, add_special_tokens=not spelled).ids
        assert encode_prompt(tokenizer, text) == expected


@pytest.mark.parametrize(
    ("files", "named", "end", "ends", "start"),
    [
        ({}, None, EOS, (EOS,), BOS),
        ({"config": {"eos_token_id": EOT}}, None, EOT, (EOT,), BOS),
        ({"config": {"eos_token_id": [IM_END, EOT]}}, None, IM_END, (IM_END, EOT), BOS),
        (
            {
                "config": {"eos_token_id": IM_END},
                "generation_config": {"eos_token_id": [EOT, IM_END]},
            },
            None,
            IM_END,
            (IM_END, EOT),
            BOS,
        ),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, None, IM_END, (IM_END,), BOS),
        (
            {"tokenizer_config": {"bos_token": {"content": "<eos>"}, "eos_token": None}},
            None,
            EOS,
            (EOS,),
            special.VOCABULARY["<eos>"],
        ),
        ({"config": {"eos_token_id": EOT}}, "<|im_end|>", IM_END, (IM_END, EOT), BOS),
        ({"config": {"eos_token_id": None, "bos_token_id": None}}, None, EOS, (EOS,), BOS),
        # A run's own configuration, beside the fields of the model it was imported from.
        ({"config": {"steps": 3}, "huggingface": {"eos_token_id": EOT}}, None, EOT, (EOT,), BOS),
    ],
)
def test_ends_and_begins_are_those_of_the_files_beside_it(files, named, end, ends, start, tmp_path):
    found = load_tokenizer(special.write(tmp_path, **files) / "tokenizer.json", named).special
    assert (found.end_of_document, found.ends, found.start) == (end, ends, start)


@pytest.mark.parametrize(
    ("files", "start"),
    [
        ({}, EOS),
        ({"config": {"bos_token_id": BOS}}, BOS),
        # As Qwen3: the tokenizer has no BOS, whatever the model's configuration names.
        ({"config": {"bos_token_id": BOS}, "tokenizer_config": {"bos_token": None}}, EOS),
        (
            {"config": {"bos_token_id": BOS}, "tokenizer_config": {"eos_token": "<|im_end|>"}},
            IM_END,
        ),
    ],
)
def test_bos_that_the_post_processor_does_not_add_only_replaces_a_missing_context(
    files, start, tmp_path
):
    path = special.write(tmp_path, bos=False, **files) / "tokenizer.json"
    tokenizer = load_tokenizer(path)
    assert (tokenizer.special.prefix, tokenizer.special.start) == ((), start)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config": {"eos_token_id": "</s>"}}, r"config.json: eos_token_id is '</s>'; it must be"),
        ({"config": {"eos_token_id": [2, True]}}, r"eos_token_id is \[2, True\]; it must be"),
        ({"config": {"eos_token_id": -1}}, "eos_token_id is -1; it must be a token id"),
        ({"generation_config": {"eos_token_id": 1.5}}, "generation_config.json: eos_token_id is"),
        ({"generation_config": {"eos_token_id": 99}}, "eos_token_id is 99; the ids of .* end at"),
        ({"generation_config": [1]}, "generation_config.json must be an object of fields"),
        ({"tokenizer_config": {"eos_token": 3}}, "tokenizer_config.json: eos_token is 3; it must"),
        ({"tokenizer_config": {"bos_token": {"content": []}}}, "bos_token is {'content': "),
    ],
)
def test_fields_that_name_no_token_are_errors(files, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load_tokenizer(special.write(tmp_path, **files) / "tokenizer.json")
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"config.json is not JSON"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_tokenizers_that_cannot_work_are_named(tmp_path):
    path = special.write(tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())

    def named(message, **changes):
        path.write_text(json.dumps(content | changes))
        with pytest.raises(DataError, match=message):
            load_tokenizer(path).encode_batch(["unheard-of"])

    template = json.loads(json.dumps(content["post_processor"]))
    template["special_tokens"]["<s>"]["ids"] = [999]
    named("post-processor adds the id 999; its ids end at 17", post_processor=template)
    empty = content["model"] | {"vocab": {}}
    named("has no tokens", model=empty, added_tokens=[], post_processor=None)
    known = content["model"] | {"unk_token": "<none>"}
    named("cannot encode a text", model=known)


@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_transformers_agrees(bos, adds_bos, tmp_path):
    """The optional oracle, of tokenizers that it writes and reads itself."""
    transformers = pytest.importorskip(
        "transformers", reason="needs Hugging Face's tokenizers: pip install transformers"
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=special.make_tokenizer(bos=adds_bos), bos_token=bos, eos_token="<|im_end|>"
    ).save_pretrained(tmp_path)
    transformers.LlamaConfig(bos_token_id=BOS, eos_token_id=IM_END).save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    for text in TEXTS:
        add = not text.startswith("<s>")
        assert encode_prompt(ours, text) == theirs(text, add_special_tokens=add).input_ids
    prefix = theirs.bos_token_id if bos else BOS if adds_bos else theirs.eos_token_id
    assert (ours.special.start, ours.special.end_of_document) == (prefix, theirs.eos_token_id)


def strange(directory):
    """A tokenizer whose end of document no rule finds."""
    special.write(directory)
    path = directory / "tokenizer.json"
    text = path.read_text()
    for known in ("</s>", "<eos>"):
        text = text.replace(known, known.replace("s>", "stop>"))
    path.write_text(text)
    return path


def test_an_end_that_is_not_found_is_named_by_the_option_that_the_message_names(tmp_path):
    path = strange(tmp_path)
    with pytest.raises(DataError, match=r"has none of .*: --end-of-document"):
        load_tokenizer(path)
    with pytest.raises(DataError, match=r"has none of <missing>; .*: --end-of-document"):
        load_tokenizer(path, "<missing>")
    with pytest.raises(DataError, match="bytes have their own"):
        load_tokenizer("byte", "<missing>")
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": f"the query {'a ' * i}"}) + "\n" for i in range(9))
    )
    options = {"tokenizer": str(path), "processes": 1, "validation_fraction": 0.3}
    corpus_dir = tmp_path / "corpus"
    prepare(
        PrepareConfig((str(texts),), corpus_dir, end_of_document="<|im_end|>", **options),
        progress=False,
    )
    corpus = Corpus.open(corpus_dir)
    assert corpus.tokenizer().end_of_document == IM_END
    assert EvalConfig(("a",), tasks="x", end_of_document="</s>").end_of_document == "</s>"
    assert ReportConfig(("a",), end_of_document="</s>").end_of_document == "</s>"


def test_a_corpus_has_bos_before_each_document(tmp_path):
    """What the library's own call of the tokenizer gives, and the end of the document."""
    path = special.write(tmp_path) / "tokenizer.json"
    texts = [f"the query {'a ' * i}of Paris" for i in range(20)]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PrepareConfig(
        (str(source),), tmp_path / "c", tokenizer=str(path), processes=1, validation_fraction=0.3
    )
    prepare(config, progress=False)
    corpus = Corpus.open(tmp_path / "c")
    theirs = special.make_tokenizer()
    due = {(*theirs.encode(text).ids, EOS) for text in texts}
    found = set()
    for split in (corpus.train, corpus.validation):
        stream = split.read(0, len(split))
        parts = np.split(stream, np.flatnonzero(stream == EOS) + 1)
        found |= {tuple(part.tolist()) for part in parts if len(part)}
    assert found == due
    assert sum(s.info.num_bytes for s in (corpus.train, corpus.validation)) == sum(map(len, texts))
    prompt = encode_prompt(corpus.tokenizer(), "the query")
    assert prompt == theirs.encode("the query").ids


def test_a_corpus_without_bos_is_as_before(tmp_path):
    """Its manifest has no new field, so that fingerprints stay, and its texts begin without BOS."""
    path = special.write(tmp_path, bos=False) / "tokenizer.json"
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": f"a {'Q ' * i}"}) + "\n" for i in range(9)))
    config = PrepareConfig(
        (str(source),), tmp_path / "c", tokenizer=str(path), processes=1, validation_fraction=0.3
    )
    prepare(config, progress=False)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert "document_prefix" not in manifest
    # A corpus of an earlier version, with a tokenizer that adds BOS.
    special.write(tmp_path / "c")
    tokenizer = Corpus.open(tmp_path / "c").tokenizer()
    assert encode_prompt(tokenizer, "a")[0] != BOS


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Llama of Hugging Face's with a tokenizer that adds BOS, and two tokens that end a text."""
    directory = special.write(
        tmp_path_factory.mktemp("hf") / "llama",
        generation_config={"eos_token_id": [EOT, IM_END], "temperature": 0.6},
        tokenizer_config={"bos_token": "<s>", "eos_token": "<|eot_id|>"},
    )
    config = CONFIGS["llama"] | {"bos_token_id": BOS, "eos_token_id": [EOT, IM_END]}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(config), directory / "model.safetensors")
    return directory


def test_what_begins_and_ends_texts_survives_import_and_export(source, tmp_path):
    import_weights(ImportConfig(source, tmp_path / "run", dtype="float32"))
    assert load_config(tmp_path / "run").sequence_length == 64  # max_position_embeddings
    found = restore_run(tmp_path / "run").tokenizer.special
    assert (found.end_of_document, found.ends) == (EOT, (EOT, IM_END))
    assert (found.prefix, found.start) == ((BOS,), BOS)

    export_weights(ExportConfig(tmp_path / "run", tmp_path / "out"))
    old, new = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "out"))
    for field in ("bos_token_id", "eos_token_id", "max_position_embeddings"):
        assert new[field] == old[field]
    for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_an_end_that_is_named_at_the_import_stays(source, tmp_path):
    import_weights(ImportConfig(source, tmp_path / "run", end_of_document="<eos>"))
    eos = special.VOCABULARY["<eos>"]
    assert Run.find(tmp_path / "run").tokenizer().special.ends == (eos, EOT, IM_END)
    export_weights(ExportConfig(tmp_path / "run", tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["eos_token_id"] == [eos, EOT, IM_END]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [eos, EOT, IM_END], "temperature": 0.6}
    named = Run.find(tmp_path / "run").tokenizer(end_of_document="</s>")
    assert named.end_of_document == EOS


def test_an_import_names_the_field_that_is_no_token(source, tmp_path):
    bad = special.write(tmp_path / "bad", generation_config={"eos_token_id": {"a": 1}})
    (bad / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(DataError, match=r"generation_config.json: eos_token_id is \{'a': 1\}"):
        import_weights(ImportConfig(bad, tmp_path / "run"))


def test_bytes_of_a_larger_model_decode():
    assert ByteTokenizer().decode([97, 300, 98, 255]) == "a\ufffdb"
