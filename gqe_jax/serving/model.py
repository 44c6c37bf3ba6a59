"""The language model on the interfaces of tpu-inference, the JAX back end of vLLM.

The blocks are those of `gqe_jax.model`. A step of the engine has the tokens of all its requests in
one row; here they stand along the batch axis, one in each row, as in decoding. The engine is
imported in a call: the module itself needs none.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqe_jax.config import ConfigError, ModelConfig
from gqe_jax.config_json import from_dict
from gqe_jax.interop.layout import tensor_table, torch_shapes
from gqe_jax.interop.tensors import Tensors
from gqe_jax.model.transformer import Transformer, unrolled
from gqe_jax.serving.paged import attend, cache_heads, in_pairs
from gqe_kernels import Mask, Routed, Slots


class GroupedQueryExpertsForCausalLM(nnx.Module):
    """A GQE model, or its dense baseline, that the engine loads and calls.

    Args:
      vllm_config: the engine's configuration; `model_config.hf_config.model` is our ModelConfig.
      rng_key: source of random parameters, where the engine asks for them.
      mesh: the engine's mesh.

    Raises:
      ConfigError: the engine's configuration needs what this model has not.
    """

    def __init__(self, vllm_config: Any, rng_key: jax.Array, mesh: Mesh):
        self.config = served_config(vllm_config)
        self.mesh = mesh
        self.directory = str(vllm_config.model_config.model)
        self.shards = _size(mesh, self.axes["group"])
        cache_heads(self.config.attention, self.shards)
        # Tokens stand along the batch axis, where only plain projections are asked for.
        self.transformer = unrolled(Transformer(self.config, rngs=nnx.Rngs(rng_key)))
        for path, param in nnx.to_flat_state(nnx.state(self.transformer)):
            param.set_metadata(out_sharding=self._spec(path, param))

    @property
    def axes(self) -> dict[str, Any]:
        """The engine's mesh axes of our logical axes; what is not there is replicated."""
        from tpu_inference.layers.common.sharding import (  # pyrefly: ignore[missing-import]
            ShardingAxisName as Axis,
        )

        mlp = Axis.MLP_TENSOR
        return {"group": Axis.ATTN_HEAD, "mlp": mlp, "mlp_rows": mlp, "vocab": Axis.VOCAB}

    def modules(self) -> Iterator[Any]:
        """No PyTorch module, for which the engine asks when it ends."""
        return iter(())

    def paged_attention(self, cache: jax.Array, *operands: Any, **arguments: Any) -> Any:
        """The engine's attention: the pages with the new keys and values, and the outputs."""
        from tpu_inference.layers.common.attention_interface import (  # pyrefly: ignore[missing-import]
            attention,
        )

        return attention(cache, *operands, **arguments)

    def __call__(
        self,
        kv_caches: list[jax.Array],
        input_ids: jax.Array,
        attention_metadata: Any,
        *_: Any,
    ) -> tuple[list[jax.Array], jax.Array, list[jax.Array], None]:
        """One step over the tokens of all requests.

        Args:
          kv_caches: the pages of each layer.
          input_ids: [token].
          attention_metadata: which tokens belong to which request, and their pages.
          _: what the engine has for other models.

        Returns:
          The pages, the hidden states [token, embed], and nothing for other models.
        """
        model = self.transformer
        positions = attention_metadata.input_positions[:, None]
        with jax.named_scope("embedding"):
            x = model.embedding(input_ids[:, None])
        written = []
        for cache, layer in zip(kv_caches, model.layers, strict=True):
            # The layer calls the attention once.
            def attention(routed: Routed, mask: Mask, scale: float, cache=cache) -> Slots:
                del mask  # causal, by the pages

                def paged(query, key, value):
                    new = (x.astype(cache.dtype) for x in (key, value))
                    pages, out = self.paged_attention(
                        cache, query, *new, attention_metadata, self.mesh, sm_scale=scale
                    )
                    written.append(pages)
                    return out

                with jax.named_scope("attention"):
                    return attend(routed, paged, self.shards, pairs=in_pairs(self.config.attention))

            x, _, _ = layer(x, attention=attention, positions=positions)
        return written, model.final_norm(x)[:, 0], [], None

    def compute_logits(self, hidden_states: jax.Array) -> jax.Array:
        """Float32 logits [token, vocab]."""
        return self.transformer.logits(hidden_states[:, None])[:, 0]

    def load_weights(self, rng_key: jax.Array) -> None:
        """Reads the exported directory, one tensor at a time, each onto its shards.

        Raises:
          WeightsError: a tensor is missing, unexpected, or has the wrong shape or type; names it.
        """
        del rng_key
        tensors = Tensors(self.directory)
        tied = self.config.tied_embedding
        tensors.check(torch_shapes(self.config), lambda name: tied and name == "lm_head.weight")
        params = dict(nnx.to_flat_state(nnx.state(self.transformer)))
        for name, entry, layer, shape in tensor_table(self.config):
            path = entry.path if layer is None else ("layers", layer, *entry.path[1:])
            param = params[path]
            value = entry.from_torch(tensors.read(name), shape).astype(param.dtype)
            spec = PartitionSpec(*param.get_metadata()["out_sharding"])
            params[path] = param.replace(jax.device_put(value, NamedSharding(self.mesh, spec)))
        nnx.update(self.transformer, nnx.from_flat_state(list(params.items())))

    def _spec(self, path: tuple[Any, ...], param: nnx.Variable) -> tuple[Any, ...]:
        """The mesh axes of a parameter's axes; W_out is sharded over its outputs."""
        names = param.get_metadata()["out_sharding"]
        if path[-2:] == ("out", "kernel"):
            names = (None, None, "group")
        axes = [self.axes.get(name or "") for name in names]
        sizes = zip(axes, param.shape, strict=True)
        return tuple(x if x and size % _size(self.mesh, x) == 0 else None for x, size in sizes)


def served_config(vllm_config: Any) -> ModelConfig:
    """Our configuration of the model that the engine serves, in the engine's dtype.

    Raises:
      ConfigError: the engine's configuration needs what this model has not.
    """
    if (cache := vllm_config.cache_config.cache_dtype) not in ("auto", "bfloat16", "float32"):
        raise ConfigError(f"kv-cache-dtype is {cache!r}; it must be auto: pages are not quantized")
    for name in ("pipeline_parallel_size", "decode_context_parallel_size"):
        if (size := getattr(vllm_config.parallel_config, name)) != 1:
            raise ConfigError(f"{name} is {size}; it must be 1: use tensor_parallel_size")
    model = vllm_config.model_config
    dtype = str(model.dtype).rpartition(".")[2] if "torch" in str(model.dtype) else model.dtype
    values = {**model.hf_config.model, "dtype": jnp.dtype(dtype).name}
    return from_dict(ModelConfig, values)


def _size(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    names = (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape.get(name, 1) for name in names)
