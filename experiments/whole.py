"""Contenders at the levels above the op: the attention layer, the model, the training step."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from configs import CONFIGS
from gqe_jax.config import AttentionConfig, MeshConfig, ModelConfig, RunConfig, Variant
from gqe_jax.data import Batch
from gqe_jax.model.attention import make_attention
from gqe_jax.model.flops import matmul_flops_per_token, projection_flops_per_token
from gqe_jax.model.transformer import Transformer
from gqe_jax.sharding import make_mesh
from gqe_jax.training.steps import forward_loss, make_steps
from gqe_kernels.contract import Implementation
from kernels.benchmarks.speed.arrays import normal, with_gradients
from kernels.benchmarks.speed.cases import Scale, SpeedCase
from kernels.benchmarks.speed.document import Known
from kernels.benchmarks.speed.op import attention_flops
from kernels.benchmarks.speed.peers import implementations, peers
from kernels.benchmarks.speed.timing import Contender

# XLA merges products of one input where they are small; with this limit, in MB, also those of
# 32,768 tokens, so that queries, keys and values are one product.
MERGING = {"gpu": ({}, {"xla_gpu_dot_merger_threshold_mb": 512})}


@dataclasses.dataclass(frozen=True)
class ModelScale(Scale):
    """Sizes of whole models.

    Attributes:
      model: the geometry; the case replaces variant, top_k, groups and head size.
      step_lengths: sequence lengths of the training steps.
    """

    model: ModelConfig
    step_lengths: tuple[int, ...]


def run_config(case: SpeedCase, scale: ModelScale, variant: Variant) -> RunConfig:
    """The run whose layer, model or step a case times."""
    attention = dataclasses.replace(
        scale.model.attention,
        variant=variant,
        head_dim=case.head_dim,
        top_k=case.top_k,
        num_query_experts=scale.heads,
        num_kv_heads=scale.groups // case.top_k,
    )
    return dataclasses.replace(
        CONFIGS["gqe_250m"],
        model=dataclasses.replace(scale.model, attention=attention),
        mesh=MeshConfig(data=1),
        batch_size=case.batch,
        sequence_length=case.length,
    )


def layer_flops(config: AttentionConfig, length: int, batch: int, *, training: bool) -> float:
    """Floating-point operations of an attention layer: its projections, router and heads."""
    heads, head_dim = config.num_active_heads, config.resolved_head_dim
    products = length * batch * projection_flops_per_token(config) * (3 if training else 1)
    return products + attention_flops(heads, head_dim, length, batch, training=training)


def model_flops(config: ModelConfig, length: int, batch: int, *, training: bool) -> float:
    """Floating-point operations of a model's loss and gradients, or of a prefill, which has the
    logits of the last token alone."""
    flops = length * batch * matmul_flops_per_token(config, length)
    if training:
        return 3 * flops
    return flops - 2 * config.embed_dim * config.vocab_size * (length - 1) * batch


def variants(
    platform: str, known: Known
) -> Iterator[tuple[str, Variant, Mapping[str, Any], Implementation | None]]:
    """The name, variant, options and attention of each contender.

    "default" is GQE as people run it: where no kernel is named, its projections differ, too.

    Args:
      known: the kernels that were best in the op; where it has not been timed, GQE runs the
        platform's kernel, and dense layers run every peer.
    """
    yield "default", "gqe", {}, None
    ours = [name for side, name in known if side == "gqe"] or implementations(platform)[:1]
    for name in ours:
        yield name, "gqe", {}, name
    dense = {name: options for (side, name), options in known.items() if side == "dense"}
    for peer in peers(platform):
        if peer.name in dense or not dense:
            options = dense.get(peer.name, peer.options[0])
            yield peer.name, "gqa", options, functools.partial(peer.attention, options)


def contenders(case: SpeedCase, scale: ModelScale, platform: str, known: Known) -> list[Contender]:
    """All contenders of a case at the levels "layer", "model" and "step"."""
    build, merging = {
        "layer": (_layer, MERGING.get(platform, ({},))),
        "model": (_model, ({},)),
        "step": (_step, ({},)),
    }[case.level]
    found = []
    for name, variant, options, implementation in variants(platform, known):
        config = run_config(case, scale, variant)
        function, arguments, flops = build(case, config, implementation)
        side = "gqe" if variant == "gqe" else "dense"
        for flags in merging:
            given = {"options": {**options, **flags}, "compiler_options": flags}
            stateful = case.level == "step"
            one = Contender(name, side, function, arguments, flops, stateful=stateful, **given)
            found.append(one)
    return found


Built = tuple[Callable[..., Any], tuple[Any, ...], float]


def _layer(case: SpeedCase, config: RunConfig, implementation: Implementation | None) -> Built:
    """The attention layer, from the residual stream and back to it."""
    attention, dtype = config.model.attention, jnp.dtype(config.model.dtype)
    layer = make_attention(attention, dtype=dtype, implementation=implementation, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    x = normal(0, (case.batch, case.length, config.model.embed_dim), dtype)

    def forward(params, x):
        y, aux, _ = nnx.merge(graphdef, params)(x)
        return y, aux.load_balancing_loss

    flops = layer_flops(attention, case.length, case.batch, training=case.training)
    arguments = (params, x)
    if case.training:
        arguments = ((x, jnp.ones(())), *arguments)
    return with_gradients(forward, case.training), arguments, flops


def _batch(case: SpeedCase, config: RunConfig) -> Batch:
    shape = (case.batch, case.length)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab_size)
    return Batch(tokens, tokens, jnp.ones(shape))


def _model(case: SpeedCase, config: RunConfig, implementation: Implementation | None) -> Built:
    """A prefill, or the loss and its gradients."""

    def create():
        return Transformer(config.model, implementation=implementation, rngs=nnx.Rngs(0))

    graphdef = nnx.graphdef(nnx.eval_shape(create))
    params = jax.jit(lambda: nnx.state(create()))()

    def prefill(params, batch):
        model = nnx.merge(graphdef, params)
        hidden, _, _ = model(batch.inputs)
        return model.logits(hidden[:, -1:])

    def gradients(params, batch):
        count = jnp.asarray(batch.inputs.size, jnp.float32)
        loss = functools.partial(forward_loss, config, graphdef)
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, count)
        return value, grads

    flops = model_flops(config.model, case.length, case.batch, training=case.training)
    function = gradients if case.training else prefill
    return function, (params, _batch(case, config)), flops


def _step(case: SpeedCase, config: RunConfig, implementation: Implementation | None) -> Built:
    """The step that `train.py` runs, on one device."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    steps = make_steps(config, mesh, implementation=implementation)
    flops = model_flops(config.model, case.length, case.batch, training=True)
    return steps.train_step, (steps.layout.init(), _batch(case, config)), flops
