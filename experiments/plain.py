"""A dense attention layer as users of Flax write it, with JAX's splash attention."""

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gqe_jax.compile_for.kernel_cycles import Runs
from gqe_jax.config import AttentionConfig, ConfigError
from kernels.benchmarks.schedule.cases import make_splash, splash_runs

type Heads = Float[Array, "batch length head head_dim"]

BLOCKS = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")
# A compiler's option: libtpu's default keeps splash attention from its best block sizes.
MORE_VMEM = {"xla_tpu_scoped_vmem_limit_kib": "98304"}


def check_blocks(sizes: Sequence[int]) -> None:
    """Checks the sizes of a command line.

    Raises:
      ConfigError: they are neither none nor six positive ones.
    """
    if len(sizes) not in (0, 6) or any(size < 1 for size in sizes):
        raise ConfigError(
            f"splash_blocks is {sizes}; it must be six positive sizes: q, kv and kv_compute "
            "forward, then the same three backward"
        )


def blocks_of(sizes: Sequence[int], length: int) -> dict[str, int]:
    """The block sizes of splash attention by name, cut to the length.

    Without sizes they are 512, and dQ has a kernel of its own.

    Raises:
      ConfigError: one does not divide the length.
    """
    named = dict(zip(BLOCKS, sizes or (512,) * 6, strict=True))
    if not sizes:
        named |= {"q_dq": 512, "kv_dq": 512}
    named = {f"block_{name}": min(size, length) for name, size in named.items()}
    if any(length % size for size in named.values()):
        raise ConfigError(f"splash_blocks are {named}; each must divide {length} tokens")
    return named


def runs_of_splash(
    rows: int, length: int, heads: int, kv_heads: int, blocks: Mapping[str, int]
) -> Runs:
    """Executions of the regions of splash attention's kernels on one chip, of `rows` sequences."""

    def runs(kernel: str, program: object) -> Mapping[str, int] | None:
        del program  # its blocks are those of the command
        if (found := re.match(r"splash_mha_(fwd|dq|dkv)", kernel)) is None:
            return None
        of = "" if found[1] == "fwd" else f"_{found[1]}"
        sizes = blocks[f"block_q{of}"], blocks[f"block_kv{of}"]
        sums_of_keys = found[1] == "dkv"
        executions = splash_runs(length, heads, kv_heads, *sizes, sums_of_keys=sums_of_keys)
        return {name: rows * times for name, times in executions.items()}

    return runs


class PlainAttention(nnx.Module):
    """Causal grouped-query attention of a residual stream: dense, without padding or cache.

    Args:
      config: its embed_dim, heads, head_dim and rope_theta; the rest is not used.
      blocks: from `blocks_of`.
    """

    def __init__(
        self,
        config: AttentionConfig,
        blocks: Mapping[str, int],
        *,
        dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        d, head_dim = config.embed_dim, config.resolved_head_dim
        heads = (config.num_query_experts, head_dim)
        kv_heads = (config.num_kv_heads, head_dim)
        options = {"use_bias": False, "dtype": dtype, "rngs": rngs}
        self.query = nnx.LinearGeneral(d, heads, **options)
        self.key = nnx.LinearGeneral(d, kv_heads, **options)
        self.value = nnx.LinearGeneral(d, kv_heads, **options)
        self.out = nnx.LinearGeneral(heads, d, axis=(-2, -1), **options)
        self.theta, self.blocks = config.rope_theta, nnx.static(dict(blocks))

    def __call__(self, x: Float[Array, "batch length d"]) -> Float[Array, "batch length d"]:
        query, key = (self._rotate(project(x)) for project in (self.query, self.key))
        query = query * query.shape[-1] ** -0.5
        by_head = (jnp.swapaxes(y, 1, 2) for y in (query, key, self.value(x)))
        attend = make_splash(self.query.out_features[0], x.shape[1], self.blocks)
        return self.out(jnp.swapaxes(jax.vmap(attend)(*by_head), 1, 2))

    def _rotate(self, x: Heads) -> Heads:
        half = x.shape[-1] // 2
        frequency = self.theta ** (-jnp.arange(half) / half)
        angle = (jnp.arange(x.shape[1])[:, None] * frequency)[:, None]
        cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
