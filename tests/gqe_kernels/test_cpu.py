"""What a CPU computes as users have it: XLA's own optimization level, which the tests turn off.

At that level XLA:CPU calls its library for products, which lacks some types. Every case, some
minutes:

    python -m tests.gqe_kernels.test_cpu bfloat16 float16 float32
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gqe_jax import AttentionConfig, KVCache
from gqe_jax.model.attention import make_attention
from gqe_kernels import routed_attention
from tests.gqe_kernels.contract import Case, as_arguments, assert_close, make_inputs

ALL = [
    Case(batch=batch, q_len=q_len, kv_len=9, q_offset=9 - q_len, expert=expert, k=k, **options)
    for batch, q_len in itertools.product((1, 2, 3), (1, 2, 7))
    for expert, k in ((1, 1), (2, 1), (4, 2))
    for options in (
        {},
        {"shared": None, "weighted": False},
        {"shared": "given", "segments": "padded"},
    )
    if q_len > 1 or "segments" not in options
]
FEW = [ALL[i] for i in (4, 26, 46, 53)]
VARIANTS = ("gqe", "hard_concat", "weighted_concat", "gqa")


def check_implementation(implementation: str, dtype: str, cases: list[Case]) -> None:
    """Compares the cases, in one program, with the float32 reference."""
    inputs = [make_inputs(case) for case in cases]
    masks = [masking for _, masking in inputs]
    given = [as_arguments(arrays, dtype) for arrays, _ in inputs]

    def slots(given, implementation):
        return [
            routed_attention(**arrays, **masking, implementation=implementation)
            for arrays, masking in zip(given, masks, strict=True)
        ]

    actual = jax.jit(slots, static_argnums=1)(given, implementation)
    exact = [{n: x if n == "expert_index" else jnp.float32(x) for n, x in g.items()} for g in given]
    expected = jax.jit(slots, static_argnums=1)(exact, "reference")
    for case, ours, theirs in zip(cases, actual, expected, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs, 2e-5 if dtype == "float32" else 3e-2, case.name)


def check_layers(dtype: str, variants: Iterable[str], ranks: list[tuple[int, int]]) -> None:
    """Runs layers with a cache, from several tokens at once to one, beside no cache."""
    for variant, (top_k, experts) in itertools.product(variants, ranks):
        config = AttentionConfig(
            variant=variant, embed_dim=32, num_query_experts=2 * experts, num_kv_heads=2,
            top_k=top_k, head_dim=8,
        )  # fmt: skip
        layer = make_attention(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(layer)

        @jax.jit
        def outputs(params, x, config=config, graphdef=graphdef):
            layer = nnx.merge(graphdef, params)
            cache = KVCache.create(config, len(x), 16, dtype)
            parts = []
            for first, last in ((0, 5), (5, 6), (6, 8), (8, 9)):
                part, _, cache = layer(x[:, first:last], cache=cache)
                parts.append(part)
            return jnp.concatenate(parts, axis=1), layer(x)[0]

        for batch in (1, 2, 3):
            x = jax.random.normal(jax.random.key(batch), (batch, 9, 32), dtype)
            cached, whole = outputs(params, x)
            assert cached.dtype == dtype
            tolerance = 2e-5 if dtype == "float32" else 3e-2
            assert_close(cached, whole, tolerance, f"{variant}, {top_k} of {experts}, {batch} rows")


@pytest.mark.slow
def test_bfloat16_on_a_cpu():
    flags = os.environ["XLA_FLAGS"].replace("--xla_backend_optimization_level=0", "")
    result = subprocess.run(
        [sys.executable, "-m", "tests.gqe_kernels.test_cpu"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "bfloat16: 4 cases of decode, 1 layer\n"


def main(dtypes: list[str]) -> None:
    """Every case in these types; without any, a few in bfloat16, which the test runs."""
    assert "optimization_level" not in os.environ.get("XLA_FLAGS", "")
    if not dtypes:
        check_implementation("decode", "bfloat16", FEW)
        check_layers("bfloat16", ("gqe",), [(1, 2)])
        print(f"bfloat16: {len(FEW)} cases of decode, 1 layer")
    for dtype in dtypes:
        for implementation in ("reference", "xla", "decode"):
            check_implementation(implementation, dtype, ALL)
        check_layers(dtype, VARIANTS, [(1, 1), (1, 2), (2, 4)])
        print(f"{dtype}: {len(ALL)} cases of three implementations, 12 layers", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
