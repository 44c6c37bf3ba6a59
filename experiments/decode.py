"""Decoding speed of GQE against dense GQA: tokens a second of whole models, on this device.

    python -m experiments.decode --context 2048 --json experiments/results/decode.json
    python -m experiments.decode --batch 1 16 --context 2048 --dtype bfloat16

The models differ in the variant alone and alternate, so that what else the machine does falls on
both. Weights are random and the cache holds `context` random keys and values for each row.
"""

import dataclasses
import itertools
import json
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Literal

import flax
import jax
import jax.numpy as jnp
from flax import nnx

from configs import CONFIGS
from gqe_jax.commands import parse
from gqe_jax.config import ConfigError, ModelConfig
from gqe_jax.model.transformer import Transformer, unrolled
from kernels.benchmarks.speed.timing import spread


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Compare the decoding of the two variants."""

    config: str = "gqe_250m"
    """The configuration; its variant and dtype change."""
    batch: tuple[int, ...] = (1, 8)
    """Rows."""
    context: tuple[int, ...] = (1024,)
    """Tokens in the cache."""
    steps: int = 8
    """Tokens of a row in one measurement."""
    rounds: int = 7
    """Measurements of each variant."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """None: float32 on a CPU, else bfloat16."""
    json: pathlib.Path | None = None
    """Where the results go."""

    def __post_init__(self) -> None:
        if self.config not in CONFIGS:
            raise ConfigError(f"config is {self.config!r}; it must be one of {', '.join(CONFIGS)}")
        if self.rounds < 2:
            raise ConfigError(f"rounds is {self.rounds}; a spread needs at least 2")


class Decoder:
    """One model with a filled cache; `run` decodes one token a row at a time."""

    def __init__(self, config: ModelConfig, batch: int, context: int, steps: int):
        abstract = nnx.eval_shape(lambda: unrolled(Transformer(config, rngs=nnx.Rngs(0))))
        graphdef = nnx.graphdef(abstract)
        capacity = -(-(context + steps) // 128) * 128

        @jax.jit
        def create():
            model = unrolled(Transformer(config, rngs=nnx.Rngs(0)))
            cache = model.create_cache(batch, capacity)
            fill = lambda x: jax.random.normal(jax.random.key(1), x.shape, x.dtype)  # noqa: E731
            full = jnp.full(batch, context, jnp.int32)
            cache = [jax.tree.map(lambda x: fill(x) if x.ndim > 1 else full, c) for c in cache]
            return nnx.state(model), cache

        def decode(params, token, cache):
            model = nnx.merge(graphdef, params)
            hidden, _, cache = model(token[:, None], cache=cache)
            return jnp.argmax(model.logits(hidden)[:, 0], axis=-1).astype(jnp.int32), cache

        self.batch, self.context, self.steps = batch, context, steps
        self.token = jnp.zeros(batch, jnp.int32)
        self.params, self.cache = create()
        self.decode = jax.jit(decode, donate_argnums=2)
        self.run()

    def run(self) -> float:
        """Tokens a second, over `steps` tokens of every row."""
        start = time.perf_counter()
        for _ in range(self.steps):
            self.token, self.cache = self.decode(self.params, self.token, self.cache)
        jax.block_until_ready((self.token, self.cache))
        seconds = time.perf_counter() - start
        again = jnp.full(self.batch, self.context, jnp.int32)
        self.cache = [dataclasses.replace(cache, length=again + 0) for cache in self.cache]
        return self.steps * self.batch / seconds


def compare(
    config: ModelConfig,
    batch: int,
    context: int,
    steps: int,
    rounds: int,
    decoder: Callable[[ModelConfig, int, int, int], Decoder] = Decoder,
) -> dict:
    """Medians and quartiles of both variants' speeds, and of the rounds' ratios."""
    decoders, speeds = {}, {}
    for variant in ("gqe", "gqa"):
        attention = dataclasses.replace(config.attention, variant=variant)
        model = dataclasses.replace(config, attention=attention)
        decoders[variant], speeds[variant] = decoder(model, batch, context, steps), []
    for _ in range(rounds):
        for variant, each in decoders.items():
            speeds[variant].append(each.run())
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    return {
        "batch": batch,
        "context": context,
        "dtype": config.dtype,
        "tokens_per_second": {name: _spread(values) for name, values in speeds.items()},
        "gqe_over_gqa": _spread(ratios),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in spread(values).items()}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(DecodeConfig, given, prog="python -m experiments.decode", description=__doc__)
    device = jax.devices()[0]
    dtype = options.dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    config = dataclasses.replace(CONFIGS[options.config].model, dtype=dtype)
    print("| batch | context | GQE tokens/s | GQA tokens/s | GQE / GQA | its quartiles |")
    print("|---|---|---|---|---|---|")
    cases = []
    for batch, context in itertools.product(options.batch, options.context):
        case = compare(config, batch, context, options.steps, options.rounds)
        cases.append(case)
        gqe, gqa = (case["tokens_per_second"][name]["median"] for name in ("gqe", "gqa"))
        ratio = case["gqe_over_gqa"]
        print(
            f"| {batch} | {context} | {gqe:.1f} | {gqa:.1f} | {ratio['median']:.2f} | "
            f"{ratio['q1']:.2f} to {ratio['q3']:.2f} |",
            flush=True,
        )
    if options.json:
        results = {
            "config": options.config,
            "device": f"{platform.processor() or platform.machine()}, {device.device_kind}",
            "versions": {"jax": jax.__version__, "flax": flax.__version__},
            "steps": options.steps,
            "rounds": options.rounds,
            "cases": cases,
        }
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
