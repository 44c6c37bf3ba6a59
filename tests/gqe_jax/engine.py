"""vLLM's JAX back end on a CPU, which it is not made for: what needs a TPU is replaced.

    python tests/gqe_jax/engine.py EXPORTED TENSOR_PARALLEL MAX_TOKENS PROMPT...

serves the prompts, which are token ids with commas, and prints the new ones as JSON.
"""

import json
import os
import sys

import jax
import numpy as np

try:
    from tests.gqe_jax import pages
except ImportError:  # run as a program: the engine's wheel has a package `tests`
    import pages


def plain_kernel(
    query, key, value, cache, kv_lens, page_indices, cu_q_lens, distribution, *, sm_scale, **_
):
    """The engine's kernel in plain JAX, on its pages; other options are as by default."""
    from tpu_inference.kernels.ragged_paged_attention.v3 import kernel, kernel_hd64

    heads, dim = key.shape[1:]
    rows = (kernel_hd64 if dim == 64 else kernel).merge_kv(key, value)
    metadata = pages.Metadata(None, page_indices, kv_lens, cu_q_lens, distribution)

    def split(stored):
        stored = stored.reshape(*stored.shape[:2], -1, stored.shape[-1])
        if dim == 64:
            return stored[:, :, :heads, :64], stored[:, :, :heads, 64:]
        return stored[:, :, : 2 * heads : 2, :dim], stored[:, :, 1 : 2 * heads : 2, :dim]

    cache, out = pages.attend(query, rows, cache, metadata, sm_scale, split)
    return out.astype(query.dtype), cache


def replace_what_needs_a_tpu():
    """Before the engine's runner is imported."""
    import tpu_inference.models.common.compiler_options as options

    options.get_step_fn_compiler_options = options.get_sampling_compiler_options = dict  # XLA:TPU's
    import tpu_inference.utils as utils
    from tpu_inference.layers.common import attention_interface

    utils.get_device_hbm_limit = lambda: 1 << 30  # "Expected TPU devices"
    put = jax.device_put

    def put_copies(x, *arguments, **options):
        """A CPU reads an aligned NumPy array in place; the runner reuses it for the next step."""
        copies = jax.tree.map(lambda a: a.copy() if isinstance(a, np.ndarray) else a, x)
        return put(copies, *arguments, **options)

    jax.device_put = put_copies
    attention_interface.ragged_paged_attention = plain_kernel
    attention_interface.ragged_paged_attention_hd64 = plain_kernel


def serve(directory, shards, max_tokens, prompts):
    """The engine's answers, greedily, in one process."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "SKIP_JAX_PRECOMPILE": "1"}
    replace_what_needs_a_tpu()
    from vllm import LLM, SamplingParams

    llm = LLM(
        directory,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=64,
        tensor_parallel_size=shards,
        # The devices in this order: a CPU has no coordinates.
        additional_config={"sharding": {"sharding_strategy": {"device_indexes": [*range(shards)]}}},
    )
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    return [list(answer.outputs[0].token_ids) for answer in answers]


if __name__ == "__main__":
    directory, shards, max_tokens, *prompts = sys.argv[1:]
    prompts = [[int(token) for token in prompt.split(",")] for prompt in prompts]
    print("answers", json.dumps(serve(directory, int(shards), int(max_tokens), prompts)))
