"""The decoder-only language model: pre-norm blocks, stacked along a leading axis and scanned."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from gqe_jax.config import ModelConfig
from gqe_jax.model.attention import AttentionAux, make_attention
from gqe_jax.model.cache import KVCache
from gqe_jax.model.layers import SwiGLU, embedding, rms_norm
from gqe_jax.model.sharded_attention import sharded
from gqe_jax.model.zigzag import context_shards, from_zigzag, to_zigzag
from gqe_jax.sharding import constrain
from gqe_kernels import Attention, Implementation, get_attention
from gqe_kernels.contract import AnyArray
from gqe_kernels.remat import ATTENTION_OPERANDS, ATTENTION_OUTPUT, PROJECTION

_BLOCK_INPUT = "block_input"
_POLICIES = jax.checkpoint_policies
REMAT_POLICY = {
    "keep_dots": _POLICIES.save_from_both_policies(
        _POLICIES.dots_with_no_batch_dims_saveable,
        _POLICIES.save_only_these_names(PROJECTION, ATTENTION_OPERANDS, ATTENTION_OUTPUT),
    ),
    "keep_attention": _POLICIES.save_only_these_names(ATTENTION_OUTPUT),
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_BLOCK_INPUT, ATTENTION_OUTPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "keep_nothing": _POLICIES.nothing_saveable,
}


class DecoderBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, config: ModelConfig, *, implementation: Implementation | None = None, rngs: nnx.Rngs
    ):
        dtype = jnp.dtype(config.dtype)
        norm = {"epsilon": config.norm_epsilon, "dtype": dtype, "rngs": rngs}
        self.attention_norm = rms_norm(config.embed_dim, **norm)
        self.attention = make_attention(
            config.attention, dtype=dtype, implementation=implementation, rngs=rngs
        )
        self.mlp_norm = rms_norm(config.embed_dim, **norm)
        self.mlp = SwiGLU(config.embed_dim, config.mlp_dim, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        *,
        attention: Attention | None = None,
        positions: Int[AnyArray, "batch length"] | None = None,
        segment_ids: Int[AnyArray, "batch length"] | None = None,
        cache: KVCache | None = None,
        return_routing: bool = False,
    ) -> tuple[Float[Array, "batch length embed"], AttentionAux, KVCache | None]:
        with jax.named_scope("projections"):
            slots, aux, cache = self.attention.slots(
                self.attention_norm(x),
                attention=attention,
                positions=positions,
                segment_ids=segment_ids,
                cache=cache,
                return_routing=return_routing,
            )
        with jax.named_scope("out"):
            x = constrain(x + self.attention.project_slots(slots), "batch", "sequence", None)
        return constrain(x + self.mlp(self.mlp_norm(x)), "batch", "sequence", None), aux, cache


class Transformer(nnx.Module):
    """A language model. Parameters of the blocks lead with a layer axis.

    Args:
      config: the geometry, dtype and remat policy.
      implementation: as in `gqe_kernels.routed_attention`; None: the best for the platform.
      rngs: source of the initial parameters.
    """

    def __init__(
        self, config: ModelConfig, *, implementation: Implementation | None = None, rngs: nnx.Rngs
    ):
        dtype = jnp.dtype(config.dtype)
        self.config = config
        self.implementation = get_attention(implementation)
        table = {"std": config.embedding_init_std, "dtype": dtype, "rngs": rngs}
        self.embedding = embedding(config.vocab_size, config.embed_dim, **table)
        if not config.tied_embedding:
            self.unembedding = embedding(config.vocab_size, config.embed_dim, **table)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layer"})
        def stack(rngs: nnx.Rngs) -> DecoderBlock:
            return DecoderBlock(config, implementation=implementation, rngs=rngs)

        self.layers: Any = stack(rngs)  # one stacked block; a list where `unrolled`
        self.final_norm = rms_norm(
            config.embed_dim, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs
        )

    def __call__(
        self,
        tokens: Int[AnyArray, "batch length"],
        *,
        positions: Int[AnyArray, "batch length"] | None = None,
        segment_ids: Int[AnyArray, "batch length"] | None = None,
        cache: KVCache | list[KVCache] | None = None,
        return_routing: bool = False,
    ) -> tuple[Float[Array, "batch length embed"], AttentionAux, KVCache | list[KVCache] | None]:
        """The final hidden states, before `logits`: a loss can take the vocabulary in chunks.

        Args:
          tokens: token ids.
          positions, segment_ids, return_routing: as in `GroupedQueryExperts`.
          cache: of all layers, from `create_cache`.

        Returns:
          Hidden states; the layers' aux and caches, each with a leading layer axis; unrolled, a
          list of caches.
        """
        zigzag = cache is None and context_shards(tokens.shape[1]) > 1
        if zigzag:
            if positions is None:
                positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            tokens, positions = to_zigzag(tokens), to_zigzag(positions)
            segment_ids = None if segment_ids is None else to_zigzag(segment_ids)
        with jax.named_scope("embedding"):
            x = constrain(self.embedding(jnp.asarray(tokens)), "batch", "sequence", None)

        def block(layer: DecoderBlock, x: Array, cache: KVCache | None):
            return layer(
                x,
                attention=sharded(self.implementation, zigzag=zigzag),
                positions=positions,
                segment_ids=segment_ids,
                cache=cache,
                return_routing=return_routing,
            )

        layers = self._unrolled if isinstance(self.layers, nnx.List) else self._scanned
        x, aux, cache = layers(block, x, cache)
        if zigzag:
            x = from_zigzag(x)
            routing = {
                name: from_zigzag(array, "layer", "batch", "sequence", "group", None)
                for name in ("router_probs", "expert_index")
                if (array := getattr(aux, name)) is not None
            }
            aux = dataclasses.replace(aux, **routing)
        return self.final_norm(x), aux, cache

    def _unrolled(self, block, x, cache):
        aux, written = [], []
        for i, layer in enumerate(self.layers):
            x, layer_aux, layer_cache = block(layer, x, None if cache is None else cache[i])
            aux.append(layer_aux)
            written.append(layer_cache)
        aux = jax.tree.map(lambda *leaves: jnp.stack(leaves), *aux)
        return x, aux, None if cache is None else written

    def _scanned(self, block, x, cache):
        graphdef, params = nnx.split(self.layers)

        def step(x, layer):
            params, cache = layer
            x = checkpoint_name(x, _BLOCK_INPUT)
            x, aux, cache = block(nnx.merge(graphdef, params), x, cache)
            return x, (aux, cache)

        if self.config.remat != "keep_everything":
            policy = REMAT_POLICY[self.config.remat]
            step = jax.checkpoint(step, policy=policy, prevent_cse=False)
        x, (aux, cache) = jax.lax.scan(step, x, (params, cache))
        return x, aux, cache

    @property
    def logit_table(self) -> Float[Array, "vocab embed"]:
        """What the final hidden states are multiplied with: the embedding, where it is tied."""
        tied = self.config.tied_embedding
        return jnp.asarray((self.embedding if tied else self.unembedding).embedding[...])

    def logits(
        self, hidden: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length vocab"]:
        """Float32 logits over the vocabulary."""
        table = self.logit_table.astype(hidden.dtype)
        return jnp.einsum("ble,ve->blv", hidden, table, preferred_element_type=jnp.float32)

    def create_cache(self, batch: int, capacity: int) -> KVCache | list[KVCache]:
        """An empty cache for every layer, stacked along a leading axis; a list if unrolled."""
        config = self.config

        def create():
            return KVCache.create(config.attention, batch, capacity, jnp.dtype(config.dtype))

        if isinstance(self.layers, nnx.List):
            return [create() for _ in self.layers]
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (config.num_layers, *x.shape)), create())


def unrolled(model: Transformer) -> Transformer:
    """The same model with a list of layers, for decoding: weights and caches are read in place.

    A scan would copy each layer's weights and cache out of their stacks at every token. Weights
    that the model computes with in `config.dtype` are stored in it.
    """
    dtype = jnp.dtype(model.config.dtype)
    graphdef, state = nnx.split(model)

    def store(path, param):
        in_float32 = {"router", "selection_bias", "scale"} & set(path)  # the last of norms
        return param if in_float32 else param.replace(param[...].astype(dtype))

    def layer(i, param):
        axes = param.get_metadata()["out_sharding"]
        return param.replace(param[...][i], out_sharding=axes[1:])

    stored = [(path, store(path, param)) for path, param in nnx.to_flat_state(state)]
    model = nnx.merge(graphdef, nnx.from_flat_state(stored))
    graphdef, stacked = nnx.split(model.layers)
    layers = []
    for i in range(model.config.num_layers):
        one = [(path, layer(i, param)) for path, param in nnx.to_flat_state(stacked)]
        layers.append(nnx.merge(graphdef, nnx.from_flat_state(one)))
    model.layers = nnx.List(layers)
    return model


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model, without making them."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
