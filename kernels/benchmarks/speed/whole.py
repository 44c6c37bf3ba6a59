"""Contenders of what is around the op: the layer, the model, the training step."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from configs import CONFIGS
from gqe_jax.config import MeshConfig
from gqe_jax.data import Batch
from gqe_jax.model import attention as layers
from gqe_jax.model.transformer import Transformer
from gqe_jax.sharding import make_mesh
from gqe_jax.training.steps import forward_loss, make_steps
from kernels.benchmarks.speed import work
from kernels.benchmarks.speed.arrays import contender, normal
from kernels.benchmarks.speed.cases import Case, Scale
from kernels.benchmarks.speed.peers import Peer, implementations, peers
from kernels.benchmarks.speed.timing import Contender

Known = Mapping[tuple[str, str], Mapping[str, Any]]
# XLA merges products of one input where they are small; with this limit, in MB, also those of
# 32,768 tokens, so that queries, keys and values are one product.
MERGING = {"gpu": ({}, {"xla_gpu_dot_merger_threshold_mb": 512})}


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
    """(name, variant, options, context to trace in): of layers and models."""
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


def layer(case: Case, scale: Scale, platform: str, known: Known) -> list[Contender]:
    """The attention layer, from and to the residual stream."""
    dtype = jnp.dtype(scale.model.dtype)
    x = normal(0, (case.batch, case.length, scale.model.embed_dim), dtype)
    found = []
    for name, variant, options, around in _variants(platform, known):
        config = case.model(scale, variant).attention
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

        flops = work.layer(config, case.length, case.batch, training=case.training)
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


def _tokens(case: Case, scale: Scale) -> jax.Array:
    shape = (case.batch, case.length)
    return jax.random.randint(jax.random.key(0), shape, 0, scale.model.vocab_size)


def model(case: Case, scale: Scale, platform: str, known: Known) -> list[Contender]:
    """A prefill, or the loss and its gradients."""
    tokens = _tokens(case, scale)
    run = CONFIGS["gqe_250m"]
    found = []
    for name, variant, options, around in _variants(platform, known):
        config = case.model(scale, variant)
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

        flops = work.model(config, case.length, case.batch, training=case.training)
        function = gradients if case.training else prefill
        arguments = (params, tokens)
        found.append(contender(name, _side(variant), function, arguments, flops, options, around))
    return found


def step(case: Case, scale: Scale, platform: str, known: Known) -> list[Contender]:
    """The step that `train.py` runs, on one device."""
    tokens = _tokens(case, scale)
    batch = Batch(tokens, tokens, jnp.ones(tokens.shape))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    found = []
    for name, variant, options, around in _variants(platform, known):
        config = dataclasses.replace(
            CONFIGS["gqe_250m"],
            model=case.model(scale, variant),
            mesh=MeshConfig(data=1),
            batch_size=case.batch,
            sequence_length=case.length,
        )
        steps = make_steps(config, mesh, implementation=_implementation(name, variant))
        state = steps.layout.init()

        def lower(_, steps=steps, arguments=(state, batch), around=around):
            with around():
                return steps.train_step.lower(*arguments)

        flops = work.model(config.model, case.length, case.batch, training=True)
        found.append(
            Contender(name, _side(variant), lower, (state, batch), flops, options, stateful=True)
        )
    return found
