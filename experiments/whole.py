"""Contenders at the levels above the op: the layer, the model, the training step."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from configs import CONFIGS
from gqe_jax.config import AttentionConfig, MeshConfig, ModelConfig, Variant
from gqe_jax.data import Batch
from gqe_jax.model import attention as layers
from gqe_jax.model.flops import matmul_flops_per_token
from gqe_jax.model.transformer import Transformer
from gqe_jax.sharding import make_mesh
from gqe_jax.training.steps import forward_loss, make_steps
from kernels.benchmarks.speed.arrays import contender, normal
from kernels.benchmarks.speed.cases import Scale, SpeedCase
from kernels.benchmarks.speed.document import Known
from kernels.benchmarks.speed.op import attention_flops
from kernels.benchmarks.speed.peers import Peer, implementations, peers
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


def model_config(case: SpeedCase, scale: ModelScale, variant: Variant) -> ModelConfig:
    """The model of a case."""
    attention = dataclasses.replace(
        scale.model.attention,
        variant=variant,
        head_dim=case.head_dim,
        top_k=case.top_k,
        num_query_experts=scale.heads,
        num_kv_heads=scale.groups // case.top_k,
    )
    return dataclasses.replace(scale.model, attention=attention)


def layer_flops(config: AttentionConfig, length: int, batch: int, *, training: bool) -> int:
    """Floating-point operations of an attention layer: its projections, router and heads."""
    embed, head_dim = config.embed_dim, config.resolved_head_dim
    columns = head_dim * (config.num_query_experts + 2 * config.num_kv_heads + config.num_slots)
    if config.variant == "gqe":
        columns += head_dim + config.num_query_experts
    products = 2 * length * batch * embed * columns * (3 if training else 1)
    heads = config.num_active_heads
    return products + attention_flops(heads, head_dim, length, batch, training=training)


def model_flops(config: ModelConfig, length: int, batch: int, *, training: bool) -> float:
    """Floating-point operations of a model's loss and gradients, or of a prefill, which has the
    logits of the last token alone."""
    flops = length * batch * matmul_flops_per_token(config, length)
    if training:
        return 3 * flops
    return flops - 2 * config.embed_dim * config.vocab_size * (length - 1) * batch


@contextlib.contextmanager
def dense_by(peer: Peer, options: Mapping[str, Any]) -> Iterator[None]:
    """Within, dense layers are traced with a kernel that need not be one of this project's."""
    attend, original = peer.whole(options), layers.sharded_dense_attention

    def attention(*, query, key, value, **_):
        return attend(query.reshape(*query.shape[:2], -1, query.shape[-1]), key, value)

    layers.sharded_dense_attention = attention
    try:
        yield
    finally:
        layers.sharded_dense_attention = original


def _variants(platform: str, known: Known) -> Iterator[tuple[str, str, dict, Callable]]:
    """(name, variant, options, context to trace in) of each contender."""
    ours = [name for side, name in known if side == "gqe"] or implementations(platform)[:1]
    for name in ours:
        yield name, "gqe", {}, contextlib.nullcontext
    if any(side == "dense" for side, _ in known):
        dense = {name: options for (side, name), options in known.items() if side == "dense"}
    else:
        dense = {peer.name: peer.options[0] for peer in peers(platform)}
    for peer in peers(platform):
        if peer.name in dense:
            options = dense[peer.name]
            yield peer.name, "gqa", dict(options), functools.partial(dense_by, peer, options)


def _implementation(name: str, variant: str) -> str | None:
    return name if variant == "gqe" else None


def _side(variant: str) -> str:
    return "gqe" if variant == "gqe" else "dense"


def layer(case: SpeedCase, scale: ModelScale, platform: str, known: Known) -> list[Contender]:
    """Attention layers, from the residual stream and back to it."""
    dtype = jnp.dtype(scale.dtype)
    x = normal(0, (case.batch, case.length, scale.model.embed_dim), dtype)
    found = []
    for name, variant, options, around in _variants(platform, known):
        config = model_config(case, scale, variant).attention
        make = functools.partial(
            layers.make_attention,
            config,
            dtype=dtype,
            implementation=_implementation(name, variant),
        )
        graphdef, params = nnx.split(make(rngs=nnx.Rngs(0)))

        def forward(params, x, graphdef=graphdef):
            y, aux, _ = nnx.merge(graphdef, params)(x)
            return y, aux.load_balancing_loss

        def timed(params, x, forward=forward):
            if not case.training:
                return forward(params, x)
            out, vjp = jax.vjp(forward, params, x)
            return out, vjp((x, jnp.ones(())))

        flops = layer_flops(config, case.length, case.batch, training=case.training)
        found += [
            contender(
                name,
                _side(variant),
                timed,
                (params, x),
                flops,
                options,
                around,
                compiler_options=flags,
            )
            for flags in MERGING.get(platform, ({},))
        ]
    return found


def _tokens(case: SpeedCase, scale: ModelScale) -> jax.Array:
    shape = (case.batch, case.length)
    return jax.random.randint(jax.random.key(0), shape, 0, scale.model.vocab_size)


def model(case: SpeedCase, scale: ModelScale, platform: str, known: Known) -> list[Contender]:
    """Models: a prefill, or the loss and its gradients."""
    tokens = _tokens(case, scale)
    run = CONFIGS["gqe_250m"]
    found = []
    for name, variant, options, around in _variants(platform, known):
        config = model_config(case, scale, variant)
        implementation = _implementation(name, variant)
        create = functools.partial(Transformer, config, implementation=implementation)
        graphdef = nnx.graphdef(nnx.eval_shape(lambda create=create: create(rngs=nnx.Rngs(0))))
        params = jax.jit(lambda create=create: nnx.state(create(rngs=nnx.Rngs(0))))()
        whole_run = dataclasses.replace(run, model=config)

        def prefill(params, tokens, graphdef=graphdef):
            model = nnx.merge(graphdef, params)
            hidden, _, _ = model(tokens)
            return model.logits(hidden[:, -1:])

        def gradients(params, tokens, graphdef=graphdef, whole_run=whole_run):
            batch = Batch(tokens, tokens, jnp.ones(tokens.shape))
            count = jnp.asarray(tokens.size, jnp.float32)
            loss = functools.partial(forward_loss, whole_run, graphdef)
            (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, count)
            return value, grads

        flops = model_flops(config, case.length, case.batch, training=case.training)
        function = gradients if case.training else prefill
        arguments = (params, tokens)
        found.append(contender(name, _side(variant), function, arguments, flops, options, around))
    return found


def step(case: SpeedCase, scale: ModelScale, platform: str, known: Known) -> list[Contender]:
    """Training steps as `train.py` runs them, on one device."""
    tokens = _tokens(case, scale)
    batch = Batch(tokens, tokens, jnp.ones(tokens.shape))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    found = []
    for name, variant, options, around in _variants(platform, known):
        config = dataclasses.replace(
            CONFIGS["gqe_250m"],
            model=model_config(case, scale, variant),
            mesh=MeshConfig(data=1),
            batch_size=case.batch,
            sequence_length=case.length,
        )
        steps = make_steps(config, mesh, implementation=_implementation(name, variant))
        state = steps.layout.init()

        def lower(_, steps=steps, arguments=(state, batch), around=around):
            with around():
                return steps.train_step.lower(*arguments)

        flops = model_flops(config.model, case.length, case.batch, training=True)
        found.append(
            Contender(name, _side(variant), lower, (state, batch), flops, options, stateful=True)
        )
    return found
