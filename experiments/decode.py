"""Decoding speed of GQE against dense GQA: tokens a second of whole models, on this device.

    python -m experiments.decode --json kernels/benchmarks/results/decode.json
    python -m experiments.decode --batch 1 16 --context 2048 --dtype bfloat16

The models differ in the variant alone and take turns, so that what else the machine does falls on
both. Weights are random and the cache holds `context` random keys and values for each row.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import statistics
import time

import flax
import jax
import jax.numpy as jnp
from flax import nnx

from configs import CONFIGS
from gqe_jax.config import ModelConfig
from gqe_jax.model.transformer import Transformer, unrolled


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


def compare(config: ModelConfig, batch: int, context: int, steps: int, rounds: int) -> dict:
    """Medians and quartiles of both variants, and the median of the rounds' ratios."""
    decoders, speeds = {}, {}
    for variant in ("gqe", "gqa"):
        attention = dataclasses.replace(config.attention, variant=variant)
        model = dataclasses.replace(config, attention=attention)
        decoders[variant], speeds[variant] = Decoder(model, batch, context, steps), []
    for _ in range(rounds):
        for variant, decoder in decoders.items():
            speeds[variant].append(decoder.run())
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    return {
        "batch": batch,
        "context": context,
        "dtype": config.dtype,
        "tokens_per_second": {name: _spread(values) for name, values in speeds.items()},
        "gqe_over_gqa": _spread(ratios),
    }


def _spread(values: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return dict(zip(("q1", "median", "q3"), (round(q, 4) for q in quartiles), strict=True))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="gqe_250m", choices=sorted(CONFIGS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="rows")
    parser.add_argument(
        "--context", type=int, nargs="+", default=[1024], help="tokens in the cache"
    )
    parser.add_argument("--steps", type=int, default=8, help="tokens of a row in one measurement")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each variant")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on CPU")
    parser.add_argument("--json", type=pathlib.Path, help="where the results go")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"rounds is {options.rounds}; a spread needs at least 2")
    device = jax.devices()[0]
    dtype = options.dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    config = dataclasses.replace(CONFIGS[options.config].model, dtype=dtype)
    results = {
        "config": options.config,
        "device": f"{platform.processor() or platform.machine()}, {device.device_kind}",
        "versions": {"jax": jax.__version__, "flax": flax.__version__},
        "steps": options.steps,
        "rounds": options.rounds,
        "cases": [],
    }
    print("| batch | context | GQE tokens/s | GQA tokens/s | GQE / GQA | its quartiles |")
    print("|---|---|---|---|---|---|")
    for batch in options.batch:
        for context in options.context:
            case = compare(config, batch, context, options.steps, options.rounds)
            results["cases"].append(case)
            gqe, gqa = (case["tokens_per_second"][name]["median"] for name in ("gqe", "gqa"))
            ratio = case["gqe_over_gqa"]
            print(
                f"| {batch} | {context} | {gqe:.1f} | {gqa:.1f} | {ratio['median']:.2f} | "
                f"{ratio['q1']:.2f} to {ratio['q3']:.2f} |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
