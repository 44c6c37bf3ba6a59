"""Weights from and to Hugging Face's and the authors' layouts; damaged files are named."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from gqe_jax import AttentionConfig, ModelConfig, Transformer
from gqe_jax.config import RunConfig
from gqe_jax.interop.export_weights import ExportConfig, export_weights
from gqe_jax.interop.hf_config import to_model_config
from gqe_jax.interop.import_weights import ImportConfig, import_weights, read_model
from gqe_jax.interop.layout import abstract_params, layer_from_torch, layer_to_torch
from gqe_jax.interop.tensors import INDEX_FILE, WEIGHTS_FILE, Tensors, WeightsError
from gqe_jax.model.attention import make_attention
from gqe_jax.runs import SPREAD, Run, load_config, write_run
from gqe_jax.sharding import make_mesh
from tests.gqe_jax import llama, special

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
BASE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
}
CONFIGS = {
    "llama": BASE
    | {
        "model_type": "llama",
        "head_dim": 8,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3,
        "tie_word_embeddings": False,
    },
    "qwen3": BASE
    | {
        "model_type": "qwen3",
        "head_dim": 16,
        "rope_theta": 1000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "tie_word_embeddings": True,
    },
}
TOKENS = np.random.default_rng(7).integers(0, 40, 20)
QUERY = "model.layers.1.self_attn.q_proj.weight"


def random_tensors(config, dtype=np.float32):
    """Hugging Face's tensors for a config, by their documented shapes."""
    rng = np.random.default_rng(3)
    width, heads, kv = config["hidden_size"], config["num_attention_heads"], 2
    head, mlp = config["head_dim"], config["intermediate_size"]
    shapes = {"model.embed_tokens": (config["vocab_size"], width), "model.norm": (width,)}
    for layer in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm": (width,),
            "self_attn.q_proj": (heads * head, width),
            "self_attn.k_proj": (kv * head, width),
            "self_attn.v_proj": (kv * head, width),
            "self_attn.o_proj": (width, heads * head),
            "post_attention_layernorm": (width,),
            "mlp.gate_proj": (mlp, width),
            "mlp.up_proj": (mlp, width),
            "mlp.down_proj": (width, mlp),
        }
        if config["model_type"] == "qwen3":
            block |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (config["vocab_size"], width)
    draw = lambda shape: rng.normal(1.0 if len(shape) == 1 else 0.0, 0.3, shape)  # noqa: E731
    return {f"{name}.weight": draw(shape).astype(dtype) for name, shape in shapes.items()}


def write(directory, config, tensors, shards=1):
    """Writes shards and their index as Hugging Face does, without our writer."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text('{"a": "tokenizer"}')
    if shards == 1:
        save_file(tensors, directory / WEIGHTS_FILE)
        return directory
    weight_map = {}
    for i in range(shards):
        names = list(tensors)[i::shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def all_tensors(directory):
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype, name
        assert ours[name].tobytes() == array.tobytes(), name


@pytest.fixture(scope="module", params=CONFIGS)
def imported(request, tmp_path_factory):
    """A model in bfloat16 and two shards, the run made of it, and the directory of both."""
    folder = tmp_path_factory.mktemp(request.param)
    config = CONFIGS[request.param]
    tensors = random_tensors(config, ml_dtypes.bfloat16)
    source = write(folder / "source", config, tensors, shards=2)
    import_weights(ImportConfig(source, folder / "run", dtype="float32", sequence_length=16))
    return folder, config, tensors


def test_logits_equal_the_independent_forward(imported):
    folder, config, tensors = imported
    found = Run.find(folder / "run")
    run, step, (_, params) = found.config, found.step, found.load(make_mesh(SPREAD))
    assert (step, run) == (0, load_config(folder / "run"))
    assert run.model.attention.variant == "gqa"
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Transformer(run.model, rngs=nnx.Rngs(0))))

    @jax.jit
    def logits(params):
        model = nnx.merge(graphdef, params)
        return model.logits(model(TOKENS[None])[0])[0]

    expected = llama.logits(config, tensors, TOKENS)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits(params), expected, atol=1e-4)


def test_export_gives_the_same_bits_and_the_same_model(imported):
    folder, config, tensors = imported
    export_weights(
        ExportConfig(
            folder / "run",
            folder / "exported",
            dtype="bfloat16",
            max_position_embeddings=64,
            max_shard_bytes=10_000,
        )
    )
    index = json.loads((folder / "exported" / INDEX_FILE).read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert_same_bits(all_tensors(folder / "exported"), tensors)
    written = json.loads((folder / "exported" / "config.json").read_text())
    assert {name: written.get(name) for name in config} == config
    for name in ("run", "exported"):
        assert (folder / name / "tokenizer.json").read_text() == '{"a": "tokenizer"}'


def test_transformers_agrees(imported):
    """The optional oracle: `pip install transformers torch`."""
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install torch")
    transformers = pytest.importorskip(
        "transformers", reason="needs Hugging Face's models: pip install transformers"
    )
    folder, config, tensors = imported
    export_weights(ExportConfig(folder / "run", folder / "float32"))
    for directory in (folder / "source", folder / "float32"):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            theirs = model(torch.tensor(TOKENS[None])).logits[0].numpy()
        np.testing.assert_allclose(theirs, llama.logits(config, tensors, TOKENS), atol=1e-4)


def test_nothing_is_overwritten(imported):
    folder, _, _ = imported
    with pytest.raises(ValueError, match="exists; name a new directory"):
        import_weights(ImportConfig(folder / "source", folder / "run"))
    with pytest.raises(ValueError, match="exists; name a new directory"):
        export_weights(ExportConfig(folder / "run", folder / "source"))


@pytest.mark.parametrize("variant", ["gqe", "hard_concat"])
def test_the_authors_layout_of_a_model_round_trips(variant, tmp_path):
    attention = AttentionConfig(
        variant,
        embed_dim=32,
        num_query_experts=4,
        num_kv_heads=2,
        top_k=2,
        qk_norm=True,
        selection_bias=variant == "hard_concat",
    )
    model = ModelConfig(attention, num_layers=2, mlp_dim=48, vocab_size=40, tied_embedding=False)
    rng = np.random.default_rng(5)
    params = jax.tree.map(
        lambda x: jax.numpy.float32(rng.normal(size=x.shape)), abstract_params(model)
    )
    tokenizer = special.write(tmp_path / "tokenizer") / "tokenizer.json"
    write_run(RunConfig(model, run_dir=str(tmp_path / "run")), params, tokenizer)
    export_weights(ExportConfig(tmp_path / "run", tmp_path / "exported"))
    for_engines = {"bos_token_id": special.BOS, "eos_token_id": special.EOS}
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert written["architectures"] == ["GroupedQueryExpertsForCausalLM"]
    assert written | for_engines | {"max_position_embeddings": 2048} == written
    generation = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert generation == for_engines
    tensors = all_tensors(tmp_path / "exported")
    slots = 6 if variant == "gqe" else 4
    assert tensors["model.layers.1.self_attn.o_proj.weight"].shape == (32, slots * 8)
    assert ("model.layers.1.self_attn.q_shared.weight" in tensors) == (variant == "gqe")

    found, again = read_model(tmp_path / "exported", model.dtype)
    assert found == model
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), again, params)


def test_the_authors_layer_computes_the_same(tmp_path):
    """Its names, shapes and order of heads, against the layer's kernels written out by hand."""
    config = AttentionConfig(embed_dim=12, num_query_experts=6, num_kv_heads=2, head_dim=4, top_k=2)
    layer = make_attention(config, rngs=nnx.Rngs(2))
    tensors = layer_to_torch(layer)
    assert {name: x.shape for name, x in tensors.items()} == {
        "q_proj.weight": (24, 12),
        "k_proj.weight": (8, 12),
        "v_proj.weight": (8, 12),
        "router.weight": (6, 12),
        "q_shared.weight": (4, 12),
        "o_proj.weight": (12, 24),
    }
    x = np.random.default_rng(0).normal(size=12).astype(np.float32)
    query = np.asarray(layer.query.kernel[...])  # expert 1 of group 1 is head 4
    np.testing.assert_allclose((tensors["q_proj.weight"] @ x)[16:20], x @ query[:, 1, 1], rtol=1e-5)
    out = np.asarray(layer.out.kernel[...])  # slot 5 is the shared one
    np.testing.assert_allclose(tensors["o_proj.weight"][:, 20:], out[5].T)

    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "a.safetensors")
    again = layer_from_torch(Tensors(tmp_path / "a.safetensors"), config)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(layer))

    del tensors["router.weight"]
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "b.safetensors")
    with pytest.raises(WeightsError, match=r"b\.safetensors.*router\.weight is missing"):
        layer_from_torch(Tensors(tmp_path / "b.safetensors"), config)


def renamed(tensors):
    tensors["model.layers.1.attn.q.weight"] = tensors.pop(QUERY)


def transposed(tensors):
    tensors[QUERY] = np.ascontiguousarray(tensors[QUERY].T)[:, :16]


def integers(tensors):
    tensors[QUERY] = tensors[QUERY].astype(np.int32)


def doubles(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)


def extra(tensors):
    tensors["model.layers.1.self_attn.q_proj.bias"] = np.zeros(64, np.float32)


def untied(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def tied(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(QUERY), f"{QUERY} is missing"),
        (
            renamed,
            f"{QUERY} is missing; model.layers.1.attn.q.weight in .*safetensors is unexpected",
        ),
        (transposed, rf"safetensors: tensor {QUERY} has shape \(32, 16\); .* be \(64, 32\)"),
        (integers, f"safetensors: tensor {QUERY} has type I32; it must be one of F32, BF16"),
        (doubles, "safetensors: tensor model.norm.weight has type F64"),
        (extra, r"model.layers.1.self_attn.q_proj.bias in .*safetensors is unexpected"),
        (untied, "safetensors: tensor lm_head.weight differs from model.embed_tokens.weight"),
        (tied, None),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    tensors = random_tensors(CONFIGS["qwen3"])
    change(tensors)
    directory = write(tmp_path / "damaged", CONFIGS["qwen3"], tensors, shards=2)
    if message is None:
        read_model(directory, "float32")
    else:
        with pytest.raises(WeightsError, match=message):
            read_model(directory, "float32")


@pytest.mark.parametrize("stale", ["whole", "a shard is gone", "no JSON"])
def test_one_file_comes_before_an_index(stale, tmp_path):
    """The order of `transformers`: an older index, with its shards or without, does not count."""
    config = CONFIGS["qwen3"]
    new = random_tensors(config)
    old = {name: array + 1 for name, array in new.items()}
    directory = write(tmp_path / "both", config, old, shards=2)
    save_file(new, directory / WEIGHTS_FILE)
    if stale == "no JSON":
        (directory / INDEX_FILE).write_text("{")
    elif stale == "a shard is gone":
        next(directory.glob("*-of-*")).unlink()
    tensors = Tensors(directory)
    for name, array in new.items():
        np.testing.assert_array_equal(tensors.read(name), array)


def test_an_index_whose_shards_are_gone_is_named_with_both_remedies(tmp_path):
    config = CONFIGS["qwen3"]
    directory = write(tmp_path / "stale", config, random_tensors(config), shards=2)
    for shard in directory.glob("*-of-*"):
        shard.unlink()
    (directory / "other.safetensors").write_bytes(b"")
    message = r"model-00001-of-00002.safetensors is missing, which .*index.json lists; copy it, or"
    with pytest.raises(WeightsError, match=message):
        Tensors(directory)


def test_damaged_files_are_named(tmp_path):
    config = CONFIGS["qwen3"]
    good = write(tmp_path / "good", config, random_tensors(config), shards=2)
    first, second = sorted(good.glob("*.safetensors"))

    def damaged(change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(good, copy)
        change(copy)
        with pytest.raises(WeightsError) as error:
            read_model(copy, "float32")
        return str(error.value)

    content = second.read_bytes()
    message = damaged(lambda copy: (copy / second.name).write_bytes(content[:-5]))
    assert second.name in message
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    assert (
        f"tensor {last} ends at byte {len(content)} and the file at {len(content) - 5}" in message
    )

    message = damaged(lambda copy: (copy / second.name).write_bytes(b"nonsense"))
    assert f"{second.name} cannot be read" in message
    assert f"{first.name} is missing" in damaged(lambda copy: (copy / first.name).unlink())
    moved = next(iter(load_file(second)))

    def swap(copy):
        index = json.loads((copy / INDEX_FILE).read_text())
        index["weight_map"][moved] = first.name
        (copy / INDEX_FILE).write_text(json.dumps(index))

    assert f"{first.name} lacks tensor {moved}" in damaged(swap)

    def forget(copy):
        index = json.loads((copy / INDEX_FILE).read_text())
        del index["weight_map"][moved]
        (copy / INDEX_FILE).write_text(json.dumps(index))

    assert f"{second.name} has tensor {moved}" in damaged(forget)
    assert "has no weight_map" in damaged(lambda copy: (copy / INDEX_FILE).write_text("[]"))
    assert f"has neither {WEIGHTS_FILE}" in damaged(lambda copy: (copy / INDEX_FILE).unlink())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; it must be llama or qwen3"),
        ({"attention_bias": True}, "attention_bias is True; our model supports only False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": None}, "hidden_size is None; it must be an integer"),
        ({"hidden_size": "32"}, "hidden_size is '32'; it must be an integer from 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be an integer from 1"),
        ({"num_attention_heads": 64, "head_dim": None}, "head_dim is 0; it must be"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be an integer"),
        ({"vocab_size": [40]}, r"vocab_size is \[40\]; it must be an integer"),
        ({"intermediate_size": 1 << 40}, "intermediate_size is 1099511627776; it must be"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a positive number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"initializer_range": []}, r"initializer_range is \[\]; it must be a positive number"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'; it must be a positive number"),
        ({"rope_theta": 0}, "rope_theta is 0; it must be a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta is inf; it must be a positive number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; it must be true or false"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]; it must be llama or qwen3"),
        ({"layer_types": 5}, "layer_types has 5; our model"),
        ({"layer_types": [["full_attention"]]}, r"layer_types has \['full_attention'\]; our"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
        ({"rope_scaling": LLAMA3 | {"factor": None}}, "rope_scaling.factor is None; it must be"),
        ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "rope_scaling.factor is '8'; it must be"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": []}}, r"low_freq_factor is \[\]; it must"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, "rope_scaling.high_freq_factor is 1"),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": "24"}},
            "rope_scaling.original_max_position_embeddings is '24'; it must be an integer",
        ),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"of type \['linear'\]; it must be default"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters.rope_theta is '1e4'; it"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; our"),
        ({"rope_parameters": {"sliding_attention": {}}}, "must have fields for full_attention"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": "x"}}},
            "rope_parameters.full_attention.factor is 'x'; it must be a positive number",
        ),
        ({"num_key_value_heads": 3}, "num_query_experts is 4; it must be a multiple"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "type 'yarn'; it must be default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "type linear lacks factor"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_att"),
    ],
)
def test_configurations_that_we_do_not_compute_are_named(change, message):
    with pytest.raises(WeightsError, match=message):
        to_model_config(CONFIGS["llama"] | change, dtype="float32")


def test_both_spellings_of_the_rotary_fields():
    old = CONFIGS["llama"]
    new = {name: value for name, value in old.items() if not name.startswith("rope_")}
    new["rope_parameters"] = old["rope_scaling"] | {"rope_theta": old["rope_theta"]}
    assert to_model_config(new, dtype="float32") == to_model_config(old, dtype="float32")


def test_rotary_fields_by_the_type_of_a_layer():
    """As of transformers 5; the types that no layer has do not count."""
    old = CONFIGS["llama"]
    new = {name: value for name, value in old.items() if not name.startswith("rope_")}
    fields = old["rope_scaling"] | {"rope_theta": old["rope_theta"]}
    types = {"full_attention": fields, "sliding_attention": {"rope_type": "yarn"}}
    found = to_model_config(new | {"rope_parameters": types}, dtype="float32")
    assert found == to_model_config(old, dtype="float32")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "config.json is not JSON"),
        (b"\xff\xfe{}", "config.json is not JSON"),
        ("[1]", "config.json must be an object of fields"),
        (
            json.dumps(CONFIGS["llama"] | {"num_hidden_layers": 1 << 30}),
            r"config.json: num_hidden_layers is 1073741824; .* has only 21 tensors",
        ),
        (
            json.dumps({"model_type": "gqe", "model": {"norm_epsilon": 10**400}}),
            r"config.json: norm_epsilon is 10+; it must be a finite number",
        ),
        (
            json.dumps({"model_type": "gqe", "model": {"mlp_dim": 10**30}}),
            r"config.json: mlp_dim is 10+; it must be at most 2147483647",
        ),
        (
            json.dumps({"model_type": "gqe", "model": {"norm_epsilon": float("inf")}}),
            "config.json: norm_epsilon is inf; it must be positive",
        ),
    ],
)
def test_files_that_are_no_configuration_are_named(content, message, tmp_path):
    directory = write(tmp_path / "source", CONFIGS["llama"], random_tensors(CONFIGS["llama"]))
    content = content.encode() if isinstance(content, str) else content
    (directory / "config.json").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_model(directory, "float32")


@pytest.mark.parametrize("shard", [None, 3, ["a"], {}, "", "..", "../a.safetensors", "a\0b", "a"])
def test_a_weight_map_that_names_no_file_is_an_error(shard, tmp_path):
    directory = write(tmp_path / "source", CONFIGS["llama"], random_tensors(CONFIGS["llama"]), 2)
    index = json.loads((directory / INDEX_FILE).read_text())
    index["weight_map"][QUERY] = shard
    (directory / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=f"names the file .* for tensor {QUERY}"):
        read_model(directory, "float32")


def test_defaults_are_those_of_hugging_face():
    config = {k: v for k, v in CONFIGS["qwen3"].items() if k not in ("head_dim", "rope_scaling")}
    attention = to_model_config(config, dtype="float32").attention
    assert attention.head_dim == 128
    llama_config = {"model_type": "llama"} | BASE
    del llama_config["num_key_value_heads"]
    attention = to_model_config(llama_config, dtype="float32").attention
    assert (attention.head_dim, attention.num_kv_heads, attention.rope_theta) == (8, 4, 10000.0)
