"""Projections, RMSNorm, RoPE, SwiGLU and embedding: Flax's layers, with logical axes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gqe_jax.config import RopeScaling
from gqe_kernels.contract import AnyArray


def logical_axes(*names: str | None) -> dict:
    """Metadata that names a weight's axes; `sharding.py` maps the names to mesh axes."""
    return {"out_sharding": names, "eager_sharding": False}


def scaled_normal(fan_in: int) -> nnx.Initializer:
    """Truncated normal of variance 1 / fan_in."""
    return nnx.initializers.truncated_normal(stddev=1.0 / math.sqrt(fan_in) / 0.87962566)


def near_each_other(
    init: nnx.Initializer, heads: tuple[int, int, int], spread: float
) -> nnx.Initializer:
    """Kernels of `heads`, [group, expert, head_dim], as alike as `spread` says.

    At 0 the experts of a group are copies of one head, at 1 all are drawn by `init` alone; the
    variance is the same.
    """
    if spread == 1.0:
        return init

    def near(key: Array, shape: tuple[int, ...], *args: Any) -> Array:
        group, _, head_dim = heads
        common, own = jax.random.split(key)
        kernel = init(own, shape, *args).reshape(-1, *heads)
        one = init(common, (len(kernel), group * head_dim), *args)
        kernel = spread * kernel + math.sqrt(1 - spread**2) * one.reshape(-1, group, 1, head_dim)
        return kernel.reshape(shape)

    return near


def with_last_rows(init: nnx.Initializer, rows: int, scale: float) -> nnx.Initializer:
    """A kernel [in, out] as `init` draws it, its last `rows` times `scale`."""
    if scale == 1.0 or not rows:
        return init
    return lambda key, shape, *args: init(key, shape, *args).at[-rows:].multiply(scale)


def projection(
    in_features: int | tuple[int, ...],
    out_features: int | tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    kernel_init: nnx.Initializer | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    precision: jax.lax.Precision | None = None,
    rngs: nnx.Rngs,
) -> nnx.LinearGeneral:
    """A linear map without bias over the last axes; its weight is `kernel` [*in, *out]."""
    contracted = 1 if isinstance(in_features, int) else len(in_features)
    fan_in = in_features if isinstance(in_features, int) else math.prod(in_features)
    return nnx.LinearGeneral(
        in_features,
        out_features,
        axis=tuple(range(-contracted, 0)),
        use_bias=False,
        kernel_init=kernel_init or scaled_normal(fan_in),
        dtype=dtype,
        param_dtype=param_dtype,
        precision=precision,
        kernel_metadata=logical_axes(*axes),
        rngs=rngs,
    )


class RMSNorm(nnx.RMSNorm):
    """Flax's RMSNorm, in a named scope."""

    @jax.named_scope("norm")
    def __call__(self, *args, **kwargs) -> Array:
        return super().__call__(*args, **kwargs)


def rms_norm(
    features: int, *, epsilon: float, dtype: DTypeLike | None, rngs: nnx.Rngs
) -> nnx.RMSNorm:
    """RMSNorm with a float32 scale."""
    return RMSNorm(
        features, epsilon=epsilon, dtype=dtype, scale_metadata=logical_axes("norm"), rngs=rngs
    )


def embedding(
    vocab_size: int, features: int, *, std: float, dtype: DTypeLike | None, rngs: nnx.Rngs
) -> nnx.Embed:
    """A table [vocab, embed]: of token embeddings, or whose transpose gives the logits."""
    return nnx.Embed(
        vocab_size,
        features,
        embedding_init=nnx.initializers.normal(std),
        dtype=dtype,
        embedding_metadata=logical_axes("vocab", "embed"),
        rngs=rngs,
    )


def rope_frequencies(half: int, theta: float, scaling: RopeScaling) -> Float[Array, "half"]:
    """The angle, in radians, by which each pair of features rotates from one position to the next.

    `linear` divides every frequency by `factor`. `llama3` is the scaling of Meta's Llama 3.1 code:
    high frequencies are kept, low ones divided by `factor`, and those between are interpolated.
    """
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling.kind == "none":
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    turns = scaling.original_length * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequency * (kept + (1 - kept) / scaling.factor)


@jax.named_scope("rope")
def apply_rope(
    x: Float[Array, "batch length *heads head_dim"],
    positions: Int[AnyArray, "#batch length"],
    theta: float,
    scaling: RopeScaling = RopeScaling(),  # noqa: B008 - frozen
) -> Float[Array, "batch length *heads head_dim"]:
    """Rotary position embedding, half-split: feature i rotates with feature i + head_dim / 2.

    Source: RoFormer, arXiv 2104.09864. Angles in float32; the result has the dtype of `x`.
    """
    return _rotate(x, rope_angles(positions, x.shape[-1], theta, scaling))


def rope_angles(
    positions: Int[AnyArray, "batch length"], head_dim: int, theta: float, scaling: RopeScaling
) -> Float[Array, "batch length half"]:
    """The angles, in radians, by which RoPE rotates the pairs of features of a head; float32."""
    frequency = rope_frequencies(head_dim // 2, theta, scaling)
    return jnp.asarray(positions).astype(jnp.float32)[..., None] * frequency


@jax.custom_jvp
def _rotate(
    x: Float[Array, "batch length *heads head_dim"], angle: Float[Array, "#batch length half"]
) -> Float[Array, "batch length *heads head_dim"]:
    """`x` with each pair of features rotated by its angle, which has no gradient.

    The halves are an axis that is flipped, and so is the gradient, before any product: for halves
    that are sliced and concatenated XLA makes several passes over HBM on TPU, for these one.
    """
    halves, cos, sin = _halves(x, angle)
    rotated = halves.astype(jnp.float32) * cos + jnp.flip(halves, -2).astype(jnp.float32) * sin
    return rotated.astype(x.dtype).reshape(x.shape)


@_rotate.defjvp
def _rotate_jvp(primals, tangents):
    """The tangent is flipped after the product, so that a gradient is flipped before it.

    A cotangent has the dtype of `x` already: that the flipped product is rounded to it costs a
    gradient no precision, and lets XLA flip the narrow type.
    """
    (x, angle), (tangent, _) = primals, tangents
    halves, cos, sin = _halves(tangent, angle)
    halves = halves.astype(jnp.float32)
    rotated = jnp.flip((halves * jnp.flip(sin, -2)).astype(x.dtype), -2) + halves * cos
    return _rotate(x, angle), rotated.astype(x.dtype).reshape(x.shape)


def _halves(x, angle):
    """`x` [batch, length, *heads, 2, half], and the cosines and sines that its halves take."""
    halves = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    angle = angle.reshape(*angle.shape[:2], *(1,) * (x.ndim - 2), angle.shape[2])
    return halves, jnp.cos(angle), jnp.sin(angle) * jnp.array([[-1.0], [1.0]])


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) · up(x)): the gated MLP of arXiv 2002.05202."""

    def __init__(
        self, embed_dim: int, mlp_dim: int, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
    ):
        self.gate = projection(embed_dim, mlp_dim, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.up = projection(embed_dim, mlp_dim, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down = projection(mlp_dim, embed_dim, ("mlp_rows", None), dtype=dtype, rngs=rngs)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
