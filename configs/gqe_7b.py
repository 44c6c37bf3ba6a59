"""Seven billion parameters, in the geometry of current 7B models: 32 query heads, 8 groups.

Width, depth, SwiGLU and groups are Mistral 7B's and Llama 3 8B's (4096, 32, 14336, 8 of width 128),
so a group has M = 4 experts, of which one is active; `gqe_7b_top2` has two. The vocabulary is that
of `gqe_1b`, for the same reasons.

The mesh fills any slice: 32 shards, each 128 of the 4096 columns, and copies beside them. It is 8 x
32 on v5e:16x16 and v6e:16x16, 4 x 32 on v5p:4x4x8, and 8 x 32 on two slices of v5p:4x4x8, with four
copies on each. The batch is 4.2M tokens, in four parts so that it fits a v5e: a sequence a chip on
256, two on 128.
"""

from gqe_jax.config import (
    AttentionConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)

GQE_7B = RunConfig(
    model=ModelConfig(
        attention=AttentionConfig(
            variant="gqe",
            embed_dim=4096,
            num_query_experts=32,
            num_kv_heads=8,
            top_k=1,
            rope_theta=500_000.0,
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
