"""The dense GQA key/value cache: one key and one value head for each group, whatever is routed."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from gqe_jax.config import AttentionConfig
from gqe_kernels import Mask, Routed
from gqe_kernels.contract import AnyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (after RoPE) and values of one layer; rows may differ in length.

    Groups stand before tokens, so that the products of decoding read each head in one piece.
    `shared_key` and `shared_value` exist only where the shared head has projections of its own.
    """

    __no_type_check__ = True  # JAX puts other things than arrays at the leaves of a tree

    key: Float[Array, "batch group capacity head_dim"]
    value: Float[Array, "batch group capacity head_dim"]
    shared_key: Float[Array, "batch capacity head_dim"] | None
    shared_value: Float[Array, "batch capacity head_dim"] | None
    length: Int[Array, "batch"]

    @classmethod
    def create(
        cls, config: AttentionConfig, batch: int, capacity: int, dtype: DTypeLike
    ) -> "KVCache":
        """An empty cache for `batch` rows of up to `capacity` tokens."""
        heads = (batch, config.num_kv_heads, capacity, config.resolved_head_dim)
        own = config.variant == "gqe" and config.shared_kv == "own"
        shared = jnp.zeros((batch, capacity, config.resolved_head_dim), dtype) if own else None
        return cls(
            key=jnp.zeros(heads, dtype),
            value=jnp.zeros(heads, dtype),
            shared_key=shared,
            shared_value=shared,
            length=jnp.zeros(batch, jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.key.shape[-2]

    def append(
        self,
        key: Float[Array, "batch length group head_dim"],
        value: Float[Array, "batch length group head_dim"],
        shared_key: Float[Array, "batch length head_dim"] | None = None,
        shared_value: Float[Array, "batch length head_dim"] | None = None,
        is_token: Bool[Array, "batch length"] | None = None,
    ) -> "KVCache":
        """The cache with the tokens written behind each row's last one.

        Padding (`is_token` False) must stand to the right of a row's tokens and is not written.
        A token beyond the capacity is dropped: size the cache for the longest row.

        Raises:
          ValueError: more tokens come at once than the cache can hold.
        """
        (batch, new), capacity = key.shape[:2], self.capacity
        if new > capacity:
            raise ValueError(
                f"cache: capacity is {capacity} and {new} tokens come at once; create a larger one"
            )
        if is_token is None:
            is_token = jnp.ones((batch, new), bool)
        slot = self.length[:, None] + jnp.arange(new, dtype=jnp.int32)
        slot = jnp.where(is_token, slot, capacity)

        @jax.vmap
        def write(old, x, slot):
            return old.at[..., slot, :].set(x.astype(old.dtype), mode="drop")

        own = self.shared_key is not None
        return KVCache(
            key=write(self.key, jnp.swapaxes(key, 1, 2), slot),
            value=write(self.value, jnp.swapaxes(value, 1, 2), slot),
            shared_key=write(self.shared_key, shared_key, slot) if own else None,
            shared_value=write(self.shared_value, shared_value, slot) if own else None,
            length=self.length + jnp.sum(is_token, axis=1, dtype=jnp.int32),
        )


def with_cache(
    routed: Routed, segment_ids: Int[AnyArray, "batch length"] | None, cache: KVCache | None
) -> tuple[Routed, Mask, KVCache | None]:
    """What the queries attend to: the cache's keys and values, if there is one, and the new ones.

    A row of a cache is one segment, in which the causal mask hides what is not yet written.

    Args:
      routed: the operands of the new tokens.
      segment_ids: segment 0 is padding.

    Returns:
      The operands over all keys, their mask, and the cache with the new tokens.

    Raises:
      ValueError: more tokens come at once than the cache can hold.
    """
    if cache is None:
        return routed, Mask(q_segment_ids=segment_ids, kv_segment_ids=segment_ids), None
    is_token = None if segment_ids is None else segment_ids != 0
    written = cache.append(
        routed.key, routed.value, routed.shared_key, routed.shared_value, is_token
    )
    mask = Mask(offset=cache.length[:, None])
    if is_token is not None:
        mask = dataclasses.replace(
            mask,
            q_segment_ids=is_token.astype(jnp.int32),
            kv_segment_ids=jnp.ones((len(is_token), written.capacity), jnp.int32),
        )
    stored = dataclasses.replace(
        routed,
        key=jnp.swapaxes(written.key, 1, 2),
        value=jnp.swapaxes(written.value, 1, 2),
        shared_key=written.shared_key,
        shared_value=written.shared_value,
    )
    return stored.map_keys(lambda x: x.astype(routed.key.dtype)), mask, written
