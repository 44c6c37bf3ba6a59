"""Seven billion parameters, in the geometry of current 7B models: 32 query heads, 8 groups.

Width, depth, SwiGLU and groups are those of Mistral 7B and Llama 3 8B (4096, 32, 14336, 8 of width
128), so a group has M = 4 experts, of which one is active, or two in `gqe_7b_top2`. The vocabulary
is that of `gqe_1b`, for the same reasons.

The mesh fills any slice: 32 shards, each 128 of the 4096 columns, and the rest are copies. It is
8 x 32 on v5e:16x16 and v6e:16x16, 4 x 32 on v5p:4x4x8, and 8 x 32 on two slices of v5p:4x4x8, with
four copies on each. The batch is 4.2M tokens, in four parts so that it fits a v5e: a sequence a
chip on 256, two on 128.

The configurations `_128k` have sequences of 131,072 tokens, each over 16 chips. The batch is the
same 4.2M tokens: 32 sequences, in two parts of 16. The mesh is data 2, fsdp 8, context 16 on
v5e:16x16 and v6e:16x16: a chip has 8192 tokens of one sequence at a time. It is data 1, fsdp 8,
context 16 on v5p:4x4x8, where a chip has pieces of two sequences, and data 2 on two slices.
"""

import dataclasses

from configs.variants import variant_of
from gqe_jax import AttentionConfig, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig

GQE = RunConfig(
    model=ModelConfig(
        attention=AttentionConfig(
            embed_dim=4096, num_query_experts=32, num_kv_heads=8, top_k=1, rope_theta=500_000.0
        ),
        num_layers=32,
        mlp_dim=14336,
        vocab_size=32768,
        remat="keep_nothing",
    ),
    data=DataConfig(corpus="corpora/fineweb-edu"),
    optimizer=OptimizerConfig(peak_learning_rate=3e-4, final_learning_rate=3e-5),
    mesh=MeshConfig(data=-1, fsdp=32),
    run_dir="runs/gqe_7b",
    steps=120_000,  # 503B tokens
    batch_size=1024,
    sequence_length=4096,
    accumulation_steps=4,
)
LONG = dataclasses.replace(
    GQE,
    mesh=MeshConfig(data=-1, fsdp=8, context=16),
    run_dir="runs/gqe_7b_128k",
    batch_size=32,
    sequence_length=131_072,
    accumulation_steps=2,
)
CONFIGS = {
    "gqe_7b": GQE,
    "gqe_7b_top2": variant_of(GQE, "gqe_7b_top2", top_k=2),
    "gqa_7b": variant_of(GQE, "gqa_7b", variant="gqa"),
    "gqe_7b_128k": LONG,
    "gqa_7b_128k": variant_of(LONG, "gqa_7b_128k", variant="gqa"),
}
