"""Turns a dense GQA model into Grouped Query Experts, from which training goes on.

    python -m gqe_jax.interop.upcycle DENSE --top-k 1 --output runs/mine
    python train.py runs/mine

Ours; the paper trains from scratch. The query heads of a group become its experts; keys, values,
norms, MLP and embeddings stay as they are; the router starts small, so that tokens spread; the
shared head's query is the mean of all query heads. W_O must make up for the heads that a token no
longer has: `--start` says how it begins.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Float, Int

from gqe_jax.commands import parse, run_command
from gqe_jax.config import AttentionConfig, ConfigError, DataConfig, ModelConfig, RunConfig
from gqe_jax.data import open_corpus, training_batches
from gqe_jax.data.special_tokens import companions
from gqe_jax.interop.import_weights import read_model
from gqe_jax.interop.layout import abstract_params
from gqe_jax.model.transformer import Transformer
from gqe_jax.runs import SPREAD, Run, write_run
from gqe_jax.sharding import make_mesh
from gqe_jax.storage import location
from gqe_jax.training.checkpoint import DIRECTORY

Start = Literal["least_squares", "scaled_mean", "mean"]


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
    """Turn a dense GQA model into Grouped Query Experts."""

    dense: tyro.conf.Positional[pathlib.Path]
    """Run directory of a model with variant `gqa`, or Hugging Face's of a Llama or Qwen3."""
    output: pathlib.Path
    """Run directory to create."""
    top_k: int
    """Experts active in each group for each token."""
    start: Start = "least_squares"
    """How W_O begins. `mean`: each slot has the mean of its group's blocks of the dense W_O;
    `scaled_mean`: that times M/k, so that a group whose heads agree gives what it gave; both leave
    the weighted and the shared slot at zero. `least_squares`: all slots are fitted, layer by layer,
    to the dense model's activations on calibration text."""
    calibration_batches: int = 8
    """Batches of the training text for `least_squares`."""
    ridge: float = 1e-3
    """least_squares: pull to `scaled_mean`, relative to the mean square of a slot's feature."""
    step: int | Literal["latest", "best"] = "latest"
    """Which checkpoint of a run directory."""
    steps: int | None = None
    """Steps of the training that follows; None: a tenth of the dense run's."""
    corpus: str | None = None
    """Text for calibration and training; None: the dense run's."""
    distill: bool = False
    """The training that follows also learns the dense run's predictions, with
    `optimizer.distillation_weight`."""
    seed: int = 0
    """Seed of the router's weights and of the order of the text."""

    def __post_init__(self) -> None:
        for field in ("calibration_batches", "steps"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ConfigError(f"{field} is {value}; it must be positive")
        if self.ridge <= 0:
            raise ConfigError(f"ridge is {self.ridge}; it must be positive")


def upcycle(config: UpcycleConfig) -> RunConfig:
    """Writes the run directory; returns its configuration.

    Raises:
      ConfigError: the model is not dense, or a field does not fit it.
      CheckpointError, WeightsError, DataError: the model, the corpus or the output cannot be used.
    """
    found, params = _read_dense(config)
    dense = found.config
    attention = dense.model.attention
    if attention.variant != "gqa":
        raise ConfigError(f"{config.dense} has variant {attention.variant!r}; it must be gqa")
    attention = dataclasses.replace(attention, variant="gqe", top_k=config.top_k)
    run = dataclasses.replace(
        dense,
        model=dataclasses.replace(dense.model, attention=attention),
        data=dataclasses.replace(dense.data, corpus=config.corpus or dense.data.corpus),
        teacher=str(config.dense) if config.distill else None,
        run_dir=str(config.output),
        steps=config.steps or max(dense.steps // 10, 1),
        seed=config.seed,
    )
    routed = convert(params, run.model, seed=config.seed, scaled=config.start != "mean")
    if config.start == "least_squares":
        text = _calibration_text(run, config.calibration_batches)
        routed = fit_out(dense.model, params, run.model, routed, text, ridge=config.ridge)
    write_run(run, routed, found.tokenizer_file(), companions(location(found.directory)))
    print(f"{config.output}: {attention.num_active_heads} of {attention.num_query_experts} heads")
    return run


def _read_dense(config: UpcycleConfig) -> tuple[Run, nnx.State]:
    if (config.dense / DIRECTORY).is_dir():
        run = Run.find(config.dense, config.step)
        return run, run.load(make_mesh(SPREAD))[1]
    if config.distill or config.corpus is None:
        raise ConfigError(
            f"{config.dense} is no run directory; if it is Hugging Face's, import it first "
            "(gqe_jax.interop.import_weights), or name --corpus and leave out --distill"
        )
    model, params = read_model(config.dense, "bfloat16")
    return Run(config.dense, 0, RunConfig(model, DataConfig(config.corpus))), params


def _calibration_text(
    run: RunConfig, count: int
) -> Iterable[Int[Array | np.ndarray, "batch length"]]:
    corpus = open_corpus(run.data.corpus, verify=run.data.verify_checksums)
    corpus.check(vocab_size=run.model.vocab_size, sequence_length=run.sequence_length)
    batches = training_batches(
        corpus.train,
        run.data,
        start=0,
        stop=count,
        rows=range(run.batch_size),
        batch_size=run.batch_size,
        sequence_length=run.sequence_length,
        seed=run.seed,
    )
    return (batch.inputs for batch in batches)


def convert(dense: nnx.State, config: ModelConfig, *, seed: int, scaled: bool) -> nnx.State:
    """Parameters of a `gqe` model from those of a dense one of the same geometry.

    Args:
      dense: the parameters of the model with variant `gqa`.
      config: the routed model's.
      seed: of the router.
      scaled: W_O's hard slots have M/k times the mean of the group's blocks, else the mean.
    """
    abstract = dict(nnx.to_flat_state(abstract_params(config)))
    weights = {path: param[...] for path, param in nnx.to_flat_state(dense)}
    kernel = lambda name: ("layers", "attention", name, "kernel")  # noqa: E731
    shape, std = abstract[kernel("router")].shape, config.attention.router_init_std
    weights[kernel("router")] = std * jax.random.normal(jax.random.key(seed), shape)
    if config.attention.selection_bias:
        weights["layers", "attention", "selection_bias"] = jnp.zeros((*shape[:1], *shape[2:]))
    weights[kernel("out")] = _mean_out(weights[kernel("out")], config.attention, scaled)
    weights[kernel("shared_query")] = jnp.mean(weights[kernel("query")], axis=(2, 3))
    if config.attention.shared_kv == "own":
        for name in ("key", "value"):
            weights[kernel(f"shared_{name}")] = jnp.mean(weights[kernel(name)], axis=2)
    return nnx.from_flat_state([(path, abstract[path].replace(x)) for path, x in weights.items()])


def _mean_out(
    dense: Float[Array, "layer head head_dim embed"], config: AttentionConfig, scaled: bool
) -> Float[Array, "layer slot head_dim embed"]:
    """W_O's slots: each hard one the mean of its group's heads; the other two zero."""
    layers, _, head_dim, embed = dense.shape
    groups, experts, top_k = config.num_kv_heads, config.experts_per_group, config.top_k
    mean = jnp.mean(dense.reshape(layers, groups, experts, head_dim, embed), axis=2)
    hard = jnp.repeat(mean * (experts / top_k if scaled else 1.0), top_k, axis=1)
    return jnp.pad(hard, ((0, 0), (0, config.num_slots - hard.shape[1]), (0, 0), (0, 0)))


def fit_out(
    dense_config: ModelConfig,
    dense: nnx.State,
    config: ModelConfig,
    params: nnx.State,
    text: Iterable[Int[Array | np.ndarray, "batch length"]],
    *,
    ridge: float,
) -> nnx.State:
    """Fits W_O of every layer in turn, so that the residual stream follows the dense model's.

    In each layer W_O minimises the squared difference, over the text's tokens, between its output
    from the routed model's slots and what the routed stream lacks to the dense one behind that
    layer's attention; a ridge pulls it to where `params` has it. What an earlier layer left wrong
    is so made good by later ones.

    Args:
      dense_config, dense: the dense model.
      config, params: the routed model, from `convert`.
      text: token ids.
      ridge: of the pull, relative to the mean square of a slot's feature.
    """
    teacher, student = _Stack.of(dense_config, dense), _Stack.of(config, params)
    fitted = []
    wanted = [teacher.embedding(jnp.asarray(tokens)) for tokens in text]
    streams = wanted
    for layer in range(config.num_layers):
        dense_block, block = teacher.layer(layer), student.layer(layer)
        steps = [_dense_layer(teacher.graphdef, dense_block, x) for x in wanted]
        slots = [_slots(student.graphdef, block, x) for x in streams]
        moments = [
            _moments(of_text, attended - x)
            for of_text, (attended, _), x in zip(slots, steps, streams, strict=True)
        ]
        gram, cross = jax.tree.map(lambda *parts: functools.reduce(jnp.add, parts), *moments)
        out: Any = block["attention"]["out"]["kernel"]
        out[...] = jnp.asarray(_solve(gram, cross, out[...], ridge), out.dtype)
        fitted.append(out[...])
        wanted = [behind for _, behind in steps]
        streams = [
            _finish(student.graphdef, block, x, of_text)
            for x, of_text in zip(streams, slots, strict=True)
        ]
    flat = dict(nnx.to_flat_state(params))
    path = ("layers", "attention", "out", "kernel")
    return nnx.from_flat_state([*(flat | {path: flat[path].replace(jnp.stack(fitted))}).items()])


@dataclasses.dataclass(frozen=True)
class _Stack:
    """A model taken apart, to run it layer by layer."""

    embedding: nnx.Embed
    graphdef: nnx.GraphDef
    params: nnx.State

    @classmethod
    def of(cls, config: ModelConfig, params: nnx.State) -> "_Stack":
        abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
        model = nnx.merge(nnx.split(abstract, nnx.Param)[0], params)
        return cls(model.embedding, *nnx.split(model.layers))

    def layer(self, index: int) -> nnx.State:
        return jax.tree.map(lambda x: x[index], self.params)


@functools.partial(jax.jit, static_argnums=0)
def _dense_layer(
    graphdef: nnx.GraphDef, params: nnx.State, x: Float[Array, "batch length embed"]
) -> tuple[Float[Array, "batch length embed"], Float[Array, "batch length embed"]]:
    """The residual stream behind the attention, and behind the MLP."""
    block = nnx.merge(graphdef, params)
    attended = x + block.attention(block.attention_norm(x))[0]
    return attended, attended + block.mlp(block.mlp_norm(attended))


@functools.partial(jax.jit, static_argnums=0)
def _slots(
    graphdef: nnx.GraphDef, params: nnx.State, x: Float[Array, "batch length embed"]
) -> Float[Array, "batch length slot head_dim"]:
    """What enters W_O."""
    block = nnx.merge(graphdef, params)
    return block.attention.slots(block.attention_norm(x))[0]


@functools.partial(jax.jit, static_argnums=0)
def _finish(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    x: Float[Array, "batch length embed"],
    slots: Float[Array, "batch length slot head_dim"],
) -> Float[Array, "batch length embed"]:
    """The residual stream behind the MLP, from that before the layer and the slots."""
    block = nnx.merge(graphdef, params)
    x = x + block.attention.out(slots)
    return x + block.mlp(block.mlp_norm(x))


@jax.jit
def _moments(
    slots: Float[Array, "batch length slot head_dim"], target: Float[Array, "batch length embed"]
) -> tuple[Float[Array, "feature feature"], Float[Array, "feature embed"]]:
    """Sums over tokens of the products of the slots' features with each other and the target."""
    features = slots.astype(jnp.float32).reshape(-1, slots.shape[2] * slots.shape[3])
    target = target.astype(jnp.float32).reshape(-1, target.shape[2])
    exact = {"precision": jax.lax.Precision.HIGHEST}
    return jnp.matmul(features.T, features, **exact), jnp.matmul(features.T, target, **exact)


def _solve(gram: Array, cross: Array, start: Array, ridge: float) -> np.ndarray:
    """argmin over W of |features W - target|² + pull |W - start|², in float64."""
    a, b, flat = (np.asarray(x, np.float64) for x in (gram, cross, start.reshape(len(gram), -1)))
    pull = ridge * np.trace(a) / len(a)
    fitted = np.linalg.solve(a + pull * np.eye(len(a)), b + pull * flat)
    return fitted.reshape(start.shape)


def main() -> None:
    """The command line."""
    config = parse(UpcycleConfig, sys.argv[1:], prog="upcycle", description=__doc__)
    run_command(lambda: upcycle(config))


if __name__ == "__main__":
    main()
