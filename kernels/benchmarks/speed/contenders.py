"""The contenders of each case: GQE by the platform's kernel, dense GQA by the best there is."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import CONFIGS
from gqe_jax import attention as layers
from gqe_jax.config import MeshConfig
from gqe_jax.sharding import make_mesh
from gqe_jax.training import Batch, forward_loss, make_steps
from gqe_jax.transformer import Transformer
from gqe_kernels import routed_attention
from kernels.benchmarks.speed import work
from kernels.benchmarks.speed.cases import Case, Scale
from kernels.benchmarks.speed.peers import Peer, implementations, peers
from kernels.benchmarks.speed.timing import Contender, repeated

COMPARED = 4096  # tokens, up to which results are held against one another
SIDES = {"projection": ("selected", "all")}  # of the other levels: gqe, dense


def sides(case: Case) -> tuple[str, str]:
    """What is compared with what: the ratio is the second's time over the first's."""
    return SIDES.get(case.level, ("gqe", "dense"))


def contenders(
    case: Case, scale: Scale, platform: str, known: Mapping[str, Mapping[str, Any]]
) -> list[Contender]:
    """All contenders of a case.

    Args:
      known: the best options of dense kernels, by name, where the op has been timed; at the levels
        above it no others are tried.
    """
    build = {"op": _op, "layer": _layer, "model": _model, "step": _step}
    if case.level == "projection":
        return _projection(case, scale)
    return build[case.level](case, scale, platform, known)


def matmul(size: int, dtype: jnp.dtype) -> Contender:
    """The yardstick: a square matrix product."""
    a, b = (_normal(i, (size, size), dtype) for i in (0, 1))
    return _contender("matmul", "matmul", lambda a, b: a @ b, (a, b), 2 * size**3)


def _contender(
    name: str,
    side: str,
    function: Callable[..., Any],
    arguments: tuple,
    flops: float,
    options: Mapping[str, Any] | None = None,
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    slots: Callable[[Any], jax.Array] | None = None,
) -> Contender:
    def lower(times: int) -> jax.stages.Lowered:
        with around():
            return jax.jit(repeated(function, times)).lower(*arguments)

    return Contender(name, side, lower, arguments, flops, options or {}, slots=slots)


def _normal(seed: int, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _selection(case: Case, groups: int, experts: int) -> jax.Array:
    """Experts of each token and group, all equally likely: [batch, length, group, k]."""
    shape = (case.batch, case.length, groups, experts)
    order = np.argsort(np.random.default_rng(0).random(shape, np.float32), axis=-1)
    return jnp.asarray(order[..., : case.top_k], jnp.int32)


def _with_gradients(function: Callable[..., Any], training: bool) -> Callable[..., Any]:
    """`function(*floats)`; or, of (cotangent, *floats), its result and all gradients."""
    if not training:
        return function

    def both(cotangent, *floats):
        out, vjp = jax.vjp(function, *floats)
        return out, vjp(cotangent)

    return both


def _op(case: Case, scale: Scale, platform: str, _) -> list[Contender]:
    attention = case.model(scale, "gqe").attention
    dtype, head_dim = jnp.dtype(scale.model.dtype), case.head_dim
    heads, groups = attention.num_query_experts, attention.num_kv_heads
    tokens = (case.batch, case.length)
    query = _normal(0, (*tokens, heads, head_dim), dtype)
    key, value = (_normal(i, (*tokens, groups, head_dim), dtype) for i in (1, 2))
    shared_query = _normal(3, (*tokens, head_dim), dtype)
    weight = jnp.full((*tokens, groups, case.top_k), 1 / (groups * case.top_k), dtype)
    index = _selection(case, groups, attention.experts_per_group)
    flops = functools.partial(
        work.attention,
        head_dim=head_dim,
        length=case.length,
        batch=case.batch,
        training=case.training,
    )
    first = (lambda result: result[0]) if case.training else (lambda result: result)
    compared = case.length <= COMPARED
    found = []
    for name in implementations(platform):

        def routed(query, key, value, weight, shared_query, index, name=name):
            return routed_attention(
                query, key, value, index, weight, shared_query, implementation=name
            )

        def timed(*arguments, routed=routed):
            *floats, index = arguments
            function = _with_gradients(lambda *floats: routed(*floats, index), case.training)
            return function(*floats)

        grouped = query.reshape(*tokens, groups, -1, head_dim)
        arguments = (grouped, key, value, weight, shared_query, index)
        if case.training:
            slots = attention.num_slots
            arguments = (_normal(4, (*tokens, slots, head_dim), dtype), *arguments)
        heads_computed = attention.num_active_heads
        slots = first if compared else None
        found.append(_contender(name, "gqe", timed, arguments, flops(heads_computed), slots=slots))
    for peer in peers(platform):
        prepared = peer.prepare(query, key, value)
        arguments = prepared
        if case.training:  # like the query in shape, whatever the layout
            arguments = (_normal(4, prepared[0].shape, dtype), *prepared)
        for options in peer.options:
            function = _with_gradients(functools.partial(peer.attend, **options), case.training)
            found.append(
                _contender(
                    peer.name,
                    "dense",
                    function,
                    arguments,
                    flops(heads),
                    options,
                    slots=(lambda out, peer=peer: peer.finish(first(out))) if compared else None,
                )
            )
    return found


@contextlib.contextmanager
def _dense_by(peer: Peer, options: Mapping[str, Any]) -> Iterator[None]:
    """Within, dense layers are traced with a kernel that need not be one of this project's."""
    attend, original = peer.whole(options), layers.sharded_dense_attention

    def attention(*, query, key, value, **_):
        return attend(query.reshape(*query.shape[:2], -1, query.shape[-1]), key, value)

    layers.sharded_dense_attention = attention
    try:
        yield
    finally:
        layers.sharded_dense_attention = original


def _variants(
    platform: str, known: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, str, dict, Callable]]:
    """(name, variant, options, context to trace in): of layers and models."""
    yield implementations(platform)[0], "gqe", {}, contextlib.nullcontext
    for peer in peers(platform):
        if not known:
            options = peer.options[0]
        elif peer.name in known:
            options = known[peer.name]
        else:
            continue
        yield peer.name, "gqa", dict(options), functools.partial(_dense_by, peer, options)


def _implementation(name: str, variant: str) -> str | None:
    return name if variant == "gqe" else None


def _side(variant: str) -> str:
    return "gqe" if variant == "gqe" else "dense"


def _layer(case: Case, scale: Scale, platform: str, known) -> list[Contender]:
    dtype = jnp.dtype(scale.model.dtype)
    x = _normal(0, (case.batch, case.length, scale.model.embed_dim), dtype)
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
        found.append(_contender(name, _side(variant), timed, (params, x), flops, options, around))
    return found


def _tokens(case: Case, scale: Scale) -> jax.Array:
    shape = (case.batch, case.length)
    return jax.random.randint(jax.random.key(0), shape, 0, scale.model.vocab_size)


def _model(case: Case, scale: Scale, platform: str, known) -> list[Contender]:
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
        found.append(_contender(name, _side(variant), function, arguments, flops, options, around))
    return found


def _step(case: Case, scale: Scale, platform: str, known) -> list[Contender]:
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
        state = steps.init()

        def lower(_, steps=steps, arguments=(state, batch), around=around):
            with around(), jax.set_mesh(mesh):
                return steps.train_step.__wrapped__.lower(*arguments)

        flops = work.model(config.model, case.length, case.batch, training=True)
        found.append(
            Contender(name, _side(variant), lower, (state, batch), flops, options, stateful=True)
        )
    return found


def _projection(case: Case, scale: Scale) -> list[Contender]:
    """Queries of all experts, of which the selected are taken; or of the selected alone."""
    attention = case.model(scale, "gqe").attention
    dtype, embed, head_dim = jnp.dtype(scale.model.dtype), attention.embed_dim, case.head_dim
    groups, experts = attention.num_kv_heads, attention.experts_per_group
    x = _normal(0, (case.batch, case.length, embed), dtype)
    kernel = _normal(1, (embed, groups, experts, head_dim), dtype) / embed**0.5
    index = _selection(case, groups, experts)
    tokens = case.batch * case.length
    arguments = (x, kernel, index)
    if case.training:
        arguments = (_normal(2, (*index.shape, head_dim), dtype), *arguments)
    flops = functools.partial(
        work.projection, embed, head_dim, tokens=tokens, training=case.training
    )
    found = []
    for name, side, project, heads in (
        ("ragged_dot", "selected", selected_queries, groups * case.top_k),
        ("dot", "all", all_queries, groups * experts),
    ):

        def timed(*arguments, project=project):
            *floats, index = arguments
            function = _with_gradients(lambda x, w: project(x, w, index), case.training)
            return function(*floats)

        first = (lambda result: result[0]) if case.training else (lambda result: result)
        found.append(_contender(name, side, timed, arguments, flops(heads), slots=first))
    return found


def all_queries(x: jax.Array, kernel: jax.Array, index: jax.Array) -> jax.Array:
    """Projects every expert, then selects: [batch, length, group, k, head_dim]."""
    query = jnp.einsum("ble,egmd->blgmd", x, kernel)
    return jnp.take_along_axis(query, index[..., None], axis=3)


def selected_queries(x: jax.Array, kernel: jax.Array, index: jax.Array) -> jax.Array:
    """The same with the selected experts' projections alone: one ragged product over sorted rows.

    A row is a token in a group and rank; rows of one expert stand together.
    """
    embed, groups, experts, head_dim = kernel.shape
    batch, length, _, k = index.shape
    expert = (jnp.arange(groups)[:, None] * experts + index).reshape(-1)
    order = jnp.argsort(expert)
    token = order // (groups * k)
    rows = x.reshape(-1, embed)[token]
    weights = jnp.moveaxis(kernel, 0, 2).reshape(groups * experts, embed, head_dim)
    sizes = jnp.bincount(expert, length=groups * experts).astype(jnp.int32)
    projected = jax.lax.ragged_dot(rows, weights, sizes)
    unsorted = jnp.zeros_like(projected).at[order].set(projected, unique_indices=True)
    return unsorted.reshape(batch, length, groups, k, head_dim)
