"""A small engine: requests cut into steps over shuffled pages, and paged attention in plain JAX."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gqe_jax.config_json import to_dict
from gqe_jax.interop.layout import torch_reader, torch_shapes
from gqe_jax.interop.tensors import write_tensors

PAGE = 16  # tokens of a page
TABLE = 8  # pages of a request, at most
TOKENS = 48  # of one step, padded
NUM_PAGES = 40


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Metadata:
    """The fields of the engine's metadata that are read."""

    input_positions: jax.Array
    block_tables: jax.Array
    seq_lens: jax.Array
    query_start_loc: jax.Array
    request_distribution: jax.Array


def attend(query, rows, cache, metadata, scale, split):
    """Causal attention of ragged requests to their pages, into which the new rows are written.

    Args:
      query: [token, head, head_dim].
      rows: the new keys and values, [token, ...].
      cache: [page, token in page, ...].
      split: of rows [request, token, ...], the keys and the values [request, token, head, dim].
    """
    tokens, heads, head_dim = query.shape
    lengths, starts = metadata.seq_lens, metadata.query_start_loc
    table = metadata.block_tables.reshape(len(lengths), -1)
    row, page = jnp.arange(tokens), cache.shape[1]
    request = jnp.clip(jnp.searchsorted(starts[1:], row, side="right"), 0, len(lengths) - 1)
    position = lengths[request] - starts[request + 1] + row
    is_token = row < starts[metadata.request_distribution[2]]
    place = jnp.where(is_token, table[request, position // page], len(cache))
    cache = cache.at[place, position % page].set(rows, mode="drop")
    stored = cache[table]
    key, value = split(stored.reshape(len(lengths), -1, *cache.shape[2:]))
    query = query.reshape(tokens, key.shape[2], heads // key.shape[2], head_dim)
    logits = scale * jnp.einsum("tgmd,tsgd->tgms", query, key[request])
    seen = jnp.arange(key.shape[1]) <= position[:, None, None, None]
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)
    return cache, jnp.einsum("tgms,tsgd->tgmd", weights, value[request]).reshape(tokens, heads, -1)


def export(directory, model, **fields):
    """Writes what an export writes of a model that has no run."""
    directory.mkdir()
    config = {"model_type": "gqe", "model": to_dict(model.config), **fields}
    (directory / "config.json").write_text(json.dumps(config))
    read = torch_reader(model.config, nnx.state(model, nnx.Param))
    write_tensors(directory, torch_shapes(model.config), read, np.dtype("f4"), max_shard_bytes=4000)
    return directory


class Steps:
    """The requests of a batch, which go through `run` in steps of several tokens of each.

    Args:
      run: (caches, token ids, metadata) to (caches, logits [token, vocab]).
      caches: of all layers.
      prompts: tokens of each request.
      make: of the metadata's fields, the metadata.
    """

    def __init__(self, run, caches, prompts, make=Metadata):
        self.run, self.caches, self.prompts, self.make = run, caches, prompts, make
        self.done = [0] * len(prompts)
        pages = np.random.default_rng(0).permutation(NUM_PAGES)[: TABLE * len(prompts)]
        self.table = np.asarray(pages, np.int32)

    def __call__(self, counts):
        """One step over the next `counts` tokens of each request, and their logits."""
        ids, positions = np.zeros(TOKENS, np.int32), np.zeros(TOKENS, np.int32)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        for prompt, done, count, start in zip(
            self.prompts, self.done, counts, starts[:-1], strict=True
        ):
            ids[start : start + count] = prompt[done : done + count]
            positions[start : start + count] = np.arange(done, done + count)
        self.done = [done + count for done, count in zip(self.done, counts, strict=True)]
        requests = len(counts)
        decoding = requests if max(counts) == 1 else 0
        metadata = self.make(
            input_positions=jnp.asarray(positions),
            block_tables=jnp.asarray(self.table),
            seq_lens=jnp.asarray(self.done, jnp.int32),
            query_start_loc=jnp.asarray(starts),
            request_distribution=jnp.asarray([decoding, decoding, requests], jnp.int32),
        )
        self.caches, logits = self.run(self.caches, jnp.asarray(ids), metadata)
        return [logits[a:b] for a, b in itertools.pairwise(starts)]
