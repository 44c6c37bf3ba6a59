"""`gqe_7b` on sequences of 131,072 tokens, each over 16 chips.

The batch is the same 4.2M tokens: 32 sequences, in two parts of 16. The mesh is data 2, fsdp 8,
context 16 on v5e:16x16 and v6e:16x16: a chip has 8192 tokens of one sequence at a time. It is data
1, fsdp 8, context 16 on v5p:4x4x8, a chip with pieces of two sequences, and data 2 on two slices.
"""

import dataclasses

from configs.gqe_7b import GQE_7B
from gqe_jax.config import MeshConfig

GQE_7B_128K = dataclasses.replace(
    GQE_7B,
    mesh=MeshConfig(data=-1, fsdp=8, context=16),
    run_dir="runs/gqe_7b_128k",
    batch_size=32,
    sequence_length=131_072,
    accumulation_steps=2,
)
