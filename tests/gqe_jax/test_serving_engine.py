"""The served model in vLLM's JAX back end; needs the extra: pip install -e '.[serve,test]'."""

import dataclasses
import functools
import importlib.util
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib
from importlib import metadata as distributions

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import serving
from gqe_jax.compile_for.topology import get_topology
from gqe_jax.generation import Generator
from gqe_jax.serving.model import GroupedQueryExpertsForCausalLM
from gqe_jax.serving.paged import cache_heads
from tests.gqe_jax import pages
from tests.gqe_jax.engine import plain_kernel
from tests.gqe_jax.test_serving import (
    ATTENTION,
    ATTENTIONS,
    COUNTS,
    MODEL,
    engine_mesh,
    expected,
    original,
    random_prompts,
    served,
)

if importlib.util.find_spec("tpu_inference") is None:
    pytest.skip("needs the engine: pip install -e '.[serve]'", allow_module_level=True)

from tpu_inference.kernels.ragged_paged_attention.v3 import kernel, kernel_hd64
from tpu_inference.layers.common import attention_interface
from tpu_inference.layers.common.attention_metadata import AttentionMetadata
from tpu_inference.layers.common.sharding import ShardingAxisName
from tpu_inference.models.common import model_loader
from tpu_inference.models.jax.llama3 import LlamaForCausalLM
from tpu_inference.runner import kv_cache

REPOSITORY = pathlib.Path(__file__).parents[2]
NEWER = "the engine changed this interface: adapt gqe_jax/serving, or pin the extra `serve`"


def test_the_versions_are_those_of_the_extra():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pins = [pin.split("==") for pin in extras["optional-dependencies"]["serve"]]
    assert {name: distributions.version(name) for name, _ in pins} == dict(pins), NEWER


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (attention_interface.attention, "kv_cache q k v attention_metadata mesh"),
        (model_loader.register_model, "arch model"),
        (LlamaForCausalLM.__init__, "self vllm_config rng_key mesh"),
        (LlamaForCausalLM.__call__, "self kv_caches input_ids attention_metadata"),
        (LlamaForCausalLM.compute_logits, "self hidden_states"),
        (LlamaForCausalLM.load_weights, "self rng_key"),
        (
            kernel.ragged_paged_attention,
            "queries keys values kv_cache kv_lens page_indices cu_q_lens distribution",
        ),
        (
            kv_cache.create_kv_caches,
            "num_blocks block_size num_kv_heads head_size mesh layer_names cache_dtype",
        ),
    ],
    ids=lambda x: getattr(x, "__qualname__", ""),
)
def test_functions_of_the_engine_have_the_known_parameters(function, parameters):
    known = parameters.split()
    assert list(inspect.signature(function).parameters)[: len(known)] == known, NEWER


def test_other_interfaces_of_the_engine_are_as_known():
    assert "sm_scale" in inspect.signature(attention_interface.attention).parameters, NEWER
    fields = {field.name for field in dataclasses.fields(AttentionMetadata)}
    assert {field.name for field in dataclasses.fields(pages.Metadata)} <= fields, NEWER
    for axis in ("ATTN_HEAD", "MLP_TENSOR", "VOCAB"):
        assert hasattr(ShardingAxisName, axis), NEWER
    model_loader._validate_model_interface(GroupedQueryExpertsForCausalLM)
    source = inspect.getsource(model_loader.get_flax_model)
    assert re.search(r"out_shardings=\(\s*kv_cache_shardings,", source), NEWER  # four results


class ByReference(GroupedQueryExpertsForCausalLM):
    """The served model with the engine's reference of its paged attention, which cannot be jitted.

    The reference has no shards: each has its part of the heads.
    """

    def paged_attention(self, cache, query, key, value, metadata, mesh, *, sm_scale):
        hd64 = query.shape[-1] == 64
        name = "ref_ragged_paged_attention" + ("_hd64" if hd64 else "")
        reference = getattr(kernel_hd64 if hd64 else kernel, name)
        parts = [jnp.split(x, self.shards, axis=1) for x in (query, key, value)]
        parts.append(jnp.split(cache, self.shards, axis=2))
        results = [
            reference(
                *part,
                metadata.seq_lens,
                metadata.block_tables,
                metadata.query_start_loc,
                metadata.request_distribution,
                sm_scale=sm_scale,
            )
            for part in zip(*parts, strict=True)
        ]
        out = jnp.concatenate([out for out, _ in results], axis=1)
        padding = jnp.zeros((len(query) - len(out), *out.shape[1:]), out.dtype)
        caches = jnp.concatenate([cache for _, cache in results], axis=2)
        return caches, jnp.concatenate([out, padding])


def stepping(model, prompts, *, jitted):
    """The model with the engine's caches and metadata."""
    graphdef, state = nnx.split(model)

    def run(state, caches, ids, metadata):
        model = nnx.merge(graphdef, state)
        caches, hidden, _, _ = model(caches, ids, metadata)
        return caches, model.compute_logits(hidden)

    names = [f"layer.{i}" for i in range(model.config.num_layers)]
    heads = cache_heads(model.config.attention, model.shards)
    caches = kv_cache.create_kv_caches(
        pages.NUM_PAGES, pages.PAGE, *heads, model.mesh, names, jnp.dtype(model.config.dtype)
    )
    run = jax.jit(run) if jitted else run
    return pages.Steps(functools.partial(run, state), caches, prompts, AttentionMetadata)


@pytest.mark.parametrize("dim", [16, 64])
def test_the_plain_kernel_is_the_engines_reference(dim):
    module = kernel_hd64 if dim == 64 else kernel
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=(24, heads, dim)), jnp.float32) for heads in (6, 3, 3)
    )
    shape = module.get_kv_cache_shape(16, 16, 3, dim, jnp.float32)
    cache = jnp.asarray(rng.normal(size=shape), jnp.float32)
    table = jnp.asarray(rng.permutation(16)[:12], jnp.int32)
    lengths, starts = jnp.array([30, 7, 9, 0]), jnp.array([0, 10, 17, 18, 18])
    arguments = (query, key, value, cache, lengths, table, starts, jnp.array([0, 0, 3]))
    name = "ref_ragged_paged_attention" + ("_hd64" if dim == 64 else "")
    right, right_cache = getattr(module, name)(*arguments, sm_scale=0.3)
    out, written = plain_kernel(*arguments, sm_scale=0.3)
    np.testing.assert_allclose(out[:18], right, atol=1e-5)
    padded = 6 if dim != 64 else 3  # what stands behind the heads is not read
    flat = lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :padded]  # noqa: E731
    np.testing.assert_array_equal(flat(written), flat(right_cache))


@pytest.mark.parametrize(("name", "shards"), [("k1", 1), ("k2", 2), ("gqa", 1), ("wide", 4)])
def test_logits_by_the_engines_reference(name, shards, tmp_path):
    fields = {"head_dim": 64, "top_k": 2} if name == "wide" else ATTENTIONS[name]
    config = dataclasses.replace(MODEL, attention=dataclasses.replace(ATTENTION, **fields))
    directory = pages.export(tmp_path / "exported", original(config))
    model = served(config, directory, engine_mesh(shards), ByReference)
    some = COUNTS[:5]  # each length of a request compiles
    prompts = random_prompts(*np.sum(some, axis=0))
    with jax.set_mesh(model.mesh):
        steps = stepping(model, prompts, jitted=False)
        parts = [steps(counts) for counts in some]
    for request, right in enumerate(expected(config, prompts)):
        got = np.concatenate([part[request] for part in parts])
        np.testing.assert_allclose(got, right[: len(got)], atol=1e-4)


@pytest.mark.parametrize(("k", "shards"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_64_decoded_tokens_are_the_generators(k, shards, tmp_path, monkeypatch):
    """Through the engine's own sharding of its attention, with its kernel in plain JAX."""
    monkeypatch.setattr(attention_interface, "ragged_paged_attention", plain_kernel)
    attention = dataclasses.replace(ATTENTION, top_k=k)
    config = dataclasses.replace(MODEL, attention=attention, tied_embedding=False)
    directory = pages.export(tmp_path / "exported", original(config))
    prompts = [prompt.tolist() for prompt in random_prompts(19, 6, 11)]
    rows = [[], [], []]
    for row, token in Generator(original(config)).stream(prompts, max_tokens=64):
        rows[row].append(token)
    sequences = [prompt + row for prompt, row in zip(prompts, rows, strict=True)]
    model = served(config, directory, engine_mesh(shards), GroupedQueryExpertsForCausalLM)
    with jax.set_mesh(model.mesh):
        steps = stepping(model, sequences, jitted=True)
        first = steps([len(prompt) for prompt in prompts])
        parts = [[x[-1:] for x in first], *(steps([1, 1, 1]) for _ in range(63))]
    whole = expected(config, sequences)
    for request, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        got = np.concatenate([part[request] for part in parts])
        right = whole[request, len(prompt) - 1 : len(prompt) + 63]
        np.testing.assert_allclose(got, right, atol=1e-4)
        assert np.argmax(got, axis=-1).tolist() == row


@pytest.mark.parametrize(("k", "shards"), [(1, 1), (2, 2)])
def test_the_engine_answers_requests(k, shards, tmp_path):
    """Its scheduler, loader and runner, by way of its API, in a process of its own."""
    attention = dataclasses.replace(ATTENTION, top_k=k)
    config = dataclasses.replace(MODEL, attention=attention, tied_embedding=False)
    directory = pages.export(tmp_path / "exported", original(config))
    prompts = [prompt.tolist() for prompt in random_prompts(5, 89)]
    rows = [[], []]
    for row, token in Generator(original(config)).stream(prompts, max_tokens=16):
        rows[row].append(token)
    program = REPOSITORY / "tests" / "gqe_jax" / "engine.py"
    command = [sys.executable, program, directory, shards, 16]
    command += [",".join(map(str, prompt)) for prompt in prompts]
    done = subprocess.run(
        [*map(str, command)],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    answers = re.search(r"^answers (.*)$", done.stdout, re.MULTILINE)
    assert answers is not None, done.stderr[-3000:]
    assert json.loads(answers[1]) == rows


@pytest.mark.libtpu
@pytest.mark.parametrize("index", range(3), ids=["gqa", "gqe-1", "gqe-2"])
def test_a_layer_compiles_with_the_engines_kernel(index):
    """Ahead of time; the benchmark compiles for v5e, too."""
    config = serving.ServingConfig("gqe_250m", "v6e:2x2")
    model = list(serving.models(config))[index]
    text, _ = serving.compile_served(model, config, get_topology(config.slice))
    assert re.search(r'%RPA.* custom-call.*custom_call_target="tpu_custom_call"', text)
