"""The table from our parameters to PyTorch tensor names, for one layer and for a whole model.

The attention's names and shapes are those of the GQE authors' PyTorch module (arXiv 2606.20945).
All other names are those of Hugging Face's Llama, in which the attention is `self_attn`. With
variant `gqa` the table is that of Hugging Face's Llama and Qwen3.

A torch Linear stores [out, in], our kernels [*in, *out]. Heads are group-major in both.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
from flax import nnx

from gqe_jax.config import AttentionConfig, ModelConfig
from gqe_jax.interop.tensors import Tensors
from gqe_jax.model.attention import GroupedQueryAttention, GroupedQueryExperts, make_attention
from gqe_jax.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our parameters and its torch tensor, or its torch tensors, one per layer."""

    path: tuple[str, ...]
    """Path of the parameter."""
    name: str
    """Name of the tensor; `{layer}` stands for the layer's index."""
    inputs: int = 1
    """Number of leading input axes of the kernel; 0: not a Linear, the shape is the same."""

    def names(self, num_layers: int) -> list[str]:
        """The tensors' names, in the order of the parameter's layer axis if it has one."""
        return [self.name.format(layer=i) for i in range(num_layers if self.per_layer else 1)]

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, from the parameter's shape without layer axis."""
        if not self.inputs:
            return tuple(shape)
        return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The tensor, from the parameter without layer axis."""
        shape = self.torch_shape(array.shape)
        return array.reshape(shape[::-1]).T if self.inputs else array

    def from_torch(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The parameter without layer axis, of shape `shape`, from the tensor."""
        return tensor.T.reshape(shape) if self.inputs else tensor


def attention_entries(config: AttentionConfig) -> list[Entry]:
    """The table of one attention layer, with the authors' names."""
    maps = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    if config.variant != "gqa":
        maps["router"] = "router"
    if config.variant == "gqe":
        maps["shared_query"] = "q_shared"
        if config.shared_kv == "own":  # not in the authors' module, so the names are ours
            maps |= {"shared_key": "k_shared", "shared_value": "v_shared"}
    entries = [Entry((ours, "kernel"), f"{name}.weight") for ours, name in maps.items()]
    entries.append(Entry(("out", "kernel"), "o_proj.weight", inputs=2))
    if config.selection_bias:  # the name is ours
        entries.append(Entry(("selection_bias",), "router.selection_bias", inputs=0))
    if config.qk_norm:
        for ours, name in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            entries.append(Entry((ours, "scale"), f"{name}.weight", inputs=0))
    return entries


def model_entries(config: ModelConfig) -> list[Entry]:
    """The table of a whole model."""
    entries = [Entry(("embedding", "embedding"), "model.embed_tokens.weight", inputs=0)]
    block = "model.layers.{layer}."
    for ours, name in (
        ("attention_norm", "input_layernorm"),
        ("mlp_norm", "post_attention_layernorm"),
    ):
        entries.append(Entry(("layers", ours, "scale"), f"{block}{name}.weight", inputs=0))
    for entry in attention_entries(config.attention):
        path, name = ("layers", "attention", *entry.path), f"{block}self_attn.{entry.name}"
        entries.append(Entry(path, name, entry.inputs))
    for ours in ("gate", "up", "down"):
        entries.append(Entry(("layers", "mlp", ours, "kernel"), f"{block}mlp.{ours}_proj.weight"))
    entries.append(Entry(("final_norm", "scale"), "model.norm.weight", inputs=0))
    if not config.tied_embedding:
        entries.append(Entry(("unembedding", "embedding"), "lm_head.weight", inputs=0))
    return entries


@functools.cache
def abstract_params(config: ModelConfig) -> nnx.State:
    """The model's parameters as abstract arrays, with logical axes on any mesh."""
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), nnx.Param)


def torch_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a model, layer by layer."""
    return {name: entry.torch_shape(shape) for name, entry, _, shape in tensor_table(config)}


def torch_reader(config: ModelConfig, params: nnx.State) -> Callable[[str], np.ndarray]:
    """A function that maps a tensor's name to its float32 values in `params`."""
    parts = {name: (entry, layer) for name, entry, layer, _ in tensor_table(config)}
    flat = dict(nnx.to_flat_state(params))

    def read(name: str) -> np.ndarray:
        entry, layer = parts[name]
        param = flat[entry.path][...]
        return entry.to_torch(np.asarray(param if layer is None else param[layer]))

    return read


def read_params(config: ModelConfig, tensors: Tensors, shardings: nnx.State | None) -> nnx.State:
    """Reads a model's parameters from the tensors of `torch_shapes`, one parameter at a time.

    Args:
      config: the model's configuration.
      tensors: the files.
      shardings: a sharding per parameter; None: all on the first device.

    Raises:
      WeightsError: a tensor is missing, unexpected, or has the wrong shape or type; names it.
    """
    tied = config.tied_embedding
    tensors.check(
        torch_shapes(config),
        # Old Llama files store RoPE's frequencies; some tied models store the embedding twice.
        lambda name: name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"),
    )
    if tied and "lm_head.weight" in tensors:
        tensors.check_equal("lm_head.weight", "model.embed_tokens.weight")
    abstract = dict(nnx.to_flat_state(abstract_params(config)))
    places = {} if shardings is None else dict(nnx.to_flat_state(shardings))
    read = []
    for entry in model_entries(config):
        variable = abstract[entry.path]
        shape = variable.shape[1:] if entry.per_layer else variable.shape
        names = entry.names(config.num_layers)
        arrays = [entry.from_torch(tensors.read(name), shape) for name in names]
        array = np.stack(arrays) if entry.per_layer else arrays[0]
        place = places[entry.path].get_value() if places else None
        read.append((entry.path, variable.replace(jax.device_put(array, place))))
    return nnx.from_flat_state(read)


def layer_to_torch(layer: GroupedQueryExperts | GroupedQueryAttention) -> dict[str, np.ndarray]:
    """The layer's weights as the authors' state_dict, in NumPy: `q_proj.weight` and so on."""
    params = dict(nnx.to_flat_state(nnx.state(layer, nnx.Param)))
    return {
        entry.name: entry.to_torch(np.asarray(params[entry.path][...]))
        for entry in attention_entries(layer.config)
    }


def layer_from_torch(
    tensors: Tensors, config: AttentionConfig, **kwargs
) -> GroupedQueryExperts | GroupedQueryAttention:
    """Our layer with the weights of the authors' module.

    Args:
      tensors: the module's state_dict in a safetensors file.
      config: the layer's geometry.
      kwargs: arguments of the layer, such as `dtype` and `implementation`.

    Raises:
      WeightsError: a tensor is missing, unexpected, or has the wrong shape or type; names it.
    """
    layer = make_attention(config, rngs=nnx.Rngs(0), **kwargs)
    params = dict(nnx.to_flat_state(nnx.state(layer, nnx.Param)))
    entries = attention_entries(config)
    tensors.check(
        {entry.name: entry.torch_shape(params[entry.path].shape) for entry in entries},
        lambda name: False,
    )
    for entry in entries:
        variable = params[entry.path]
        variable[...] = jax.numpy.asarray(
            entry.from_torch(tensors.read(entry.name), variable.shape), variable.dtype
        )
    return layer


def tensor_table(
    config: ModelConfig,
) -> Iterator[tuple[str, Entry, int | None, tuple[int, ...]]]:
    """Yields (name, entry, layer or None, parameter shape without layer axis), layer by layer."""
    abstract = dict(nnx.to_flat_state(abstract_params(config)))
    entries = model_entries(config)
    within = [i for i, entry in enumerate(entries) if entry.per_layer]
    for entry in entries[: within[0]]:
        yield entry.name, entry, None, abstract[entry.path].shape
    for layer in range(config.num_layers):
        for entry in entries[within[0] : within[-1] + 1]:
            yield entry.name.format(layer=layer), entry, layer, abstract[entry.path].shape[1:]
    for entry in entries[within[-1] + 1 :]:
        yield entry.name, entry, None, abstract[entry.path].shape
