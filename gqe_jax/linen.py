"""The attention layers as `flax.linen` Modules: the same computation, parameters and names."""

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gqe_jax.config import AttentionConfig
from gqe_jax.model import attention
from gqe_jax.model.attention import AttentionAux
from gqe_jax.model.cache import KVCache
from gqe_kernels import Implementation


def _logically_partitioned(variable: nnx.Variable) -> nn.LogicallyPartitioned:
    """The weight in Linen's box for logical axes; `sharding.RULES` maps their names."""
    return nn.LogicallyPartitioned(variable[...], variable.get_metadata()["out_sharding"])


class _Linen(nn.Module):
    """Wraps the NNX layer of the same name, its parameters directly below this module's."""

    config: AttentionConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    implementation: Implementation | None = None

    def setup(self) -> None:
        self.layer = bridge.to_linen(
            self.nnx_class,
            self.config,
            metadata_fn=_logically_partitioned,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            implementation=self.implementation,
        )
        nn.share_scope(self, self.layer)

    def __call__(
        self, x: Float[Array, "batch length embed"], **kwargs
    ) -> tuple[Float[Array, "batch length embed"], AttentionAux, KVCache | None]:
        """Calls the NNX layer, with the same keyword arguments, results and errors."""
        return self.layer(x, **kwargs)


class GroupedQueryExperts(_Linen):
    """`gqe_jax.GroupedQueryExperts` for a Linen model.

    >>> import jax, jax.numpy as jnp
    >>> from gqe_jax import AttentionConfig
    >>> from gqe_jax.linen import GroupedQueryExperts
    >>> config = AttentionConfig(embed_dim=64, num_query_experts=8, num_kv_heads=4, top_k=1)
    >>> layer, x = GroupedQueryExperts(config), jnp.ones((2, 16, 64))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> y, aux, _ = layer.apply(variables, x)
    >>> y.shape, aux.load_balancing_loss.shape
    ((2, 16, 64), ())
    """

    nnx_class = attention.GroupedQueryExperts


class GroupedQueryAttention(_Linen):
    """`gqe_jax.GroupedQueryAttention` for a Linen model."""

    nnx_class = attention.GroupedQueryAttention
