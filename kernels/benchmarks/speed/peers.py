"""Dense causal attention by other people's kernels, beside this project's own."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gqe_kernels import dense_attention
from gqe_kernels.contract import Mask, Routed, Slots

Heads = Float[Array, "batch length head head_dim"]


def _as_it_is(query: Heads, key: Heads, value: Heads) -> tuple[Array, ...]:
    return query, key, value


@dataclasses.dataclass(frozen=True)
class Peer:
    """A dense attention kernel.

    Attributes:
      attend: attention; takes what `prepare` returns, and keywords from `options`.
      options: keywords that are tried, such as block sizes.
      prepare: brings [batch, length, head, head_dim] into the kernel's layout and type, and
        multiplies by the scale where the kernel does not. The op is timed without it, a layer with
        it.
      finish: brings the result back from the kernel's layout.
    """

    name: str
    attend: Callable[..., Array]
    options: tuple[Mapping[str, Any], ...] = ({},)
    prepare: Callable[[Heads, Heads, Heads], tuple[Array, ...]] = _as_it_is
    finish: Callable[[Array], Heads] = lambda x: x

    def attention(
        self, options: Mapping[str, Any], routed: Routed, mask: Mask, scale: float
    ) -> Slots:
        """The kernel as an implementation of the contract, for causal layers without routing."""
        del mask, scale  # causal and 1 / sqrt(head_dim), as every peer has it
        query = routed.query.reshape(*routed.query.shape[:2], -1, routed.query.shape[-1])
        out = self.finish(self.attend(*self.prepare(query, routed.key, routed.value), **options))
        return out.astype(query.dtype)


def own(name: str) -> Peer:
    """The peer for an implementation of `gqe_kernels.dense_attention`."""

    def attend(query, key, value):
        grouped = query.reshape(*key.shape[:3], -1, key.shape[3])
        return dense_attention(grouped, key, value, implementation=name)

    return Peer(name, attend)


def _scaled(query: Heads, key: Heads, value: Heads) -> tuple[Array, ...]:
    return (query * (1 / math.sqrt(query.shape[-1]))).astype(query.dtype), key, value


def _jax_nn(query: Heads, key: Heads, value: Heads) -> Heads:
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="xla")


def _tokamax(query: Heads, key: Heads, value: Heads, *, implementation: str) -> Heads:
    import tokamax

    return tokamax.dot_product_attention(
        query, key, value, is_causal=True, implementation=implementation
    )


def _attention_mgpu(query: Heads, key: Heads, value: Heads, **blocks: int) -> Heads:
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(causal=True, **blocks)
    return attention_mgpu.attention(query, key, value, config)


def _splash(query: Array, key: Array, value: Array, *, block_q: int, block_kv: int) -> Array:
    """Splash attention of [batch, head, length, head_dim]."""
    from kernels.benchmarks.schedule.cases import make_splash

    _, heads, length, _ = query.shape
    q, kv = min(block_q, length), min(block_kv, length)
    compute = min(512, kv)
    blocks = {
        "block_q": q,
        "block_kv": kv,
        "block_kv_compute": compute,
        "block_q_dkv": min(1024, q),
        "block_kv_dkv": kv,
        "block_kv_dkv_compute": compute,
    }
    return jax.vmap(make_splash(heads, length, blocks))(query, key, value)


def _heads_first(query: Heads, key: Heads, value: Heads) -> tuple[Array, ...]:
    return tuple(jnp.swapaxes(x, 1, 2) for x in _scaled(query, key, value))


def _scaled_float16(query: Heads, key: Heads, value: Heads) -> tuple[Array, ...]:
    """`attention_mgpu` has buffers of float16 alone, whose products are as fast as bfloat16's."""
    return tuple(x.astype(jnp.float16) for x in _scaled(query, key, value))


_TOKAMAX = Peer(
    "tokamax",
    _tokamax,
    options=tuple({"implementation": name} for name in ("mosaic_gpu", "triton")),
)
_ATTENTION_MGPU = Peer(
    "attention_mgpu",
    _attention_mgpu,
    options=tuple(
        {"block_q": 64, "block_kv": block_kv, "max_concurrent_steps": steps}
        for block_kv, steps in ((64, 4), (128, 2), (128, 4), (256, 2))
    ),
    prepare=_scaled_float16,
)
_SPLASH = Peer(
    "splash",
    _splash,
    options=tuple(
        {"block_q": q, "block_kv": kv} for q, kv in itertools.product((1024, 2048), repeat=2)
    ),
    prepare=_heads_first,
    finish=functools.partial(jnp.swapaxes, axis1=1, axis2=2),
)
_PEERS = {
    "gpu": (own("pallas_gpu"), own("cudnn"), _TOKAMAX, _ATTENTION_MGPU, own("xla")),
    "tpu": (own("pallas_tpu"), _SPLASH, own("xla")),
    "cpu": (own("xla"), Peer("jax.nn", _jax_nn)),
}
_OURS = {"gpu": ("pallas_gpu", "cudnn", "xla"), "tpu": ("pallas_tpu", "xla"), "cpu": ("xla",)}


def peers(platform: str) -> tuple[Peer, ...]:
    """The dense kernels of a platform, whether or not they run."""
    return _PEERS[platform]


def implementations(platform: str) -> tuple[str, ...]:
    """The implementations of `routed_attention` on a platform, its own kernel first."""
    return _OURS[platform]
