"""A billion parameters, in the paper's geometry: 16 experts in 8 groups, one of two active.

Heads are 128 wide, a TPU's lanes. The vocabulary is the 32,000 tokens of Llama 2 and Mistral,
rounded up to a power of two: ids fit in 16-bit shards, and the embedding is a small part of the
model, where 128 thousand tokens would make it a quarter. Prepare a corpus with such a tokenizer
into `corpora/fineweb-edu`, or name another directory with `--data.corpus`.

The mesh fills any slice: 16 shards, each 128 of the 2048 columns, and the rest are copies. It is
16 x 16 on v5e:16x16 and v6e:16x16, 8 x 16 on v5p:4x4x8, and 16 x 16 on two slices of v5p:4x4x8.
"""

from configs.variants import variant_of
from gqe_jax import AttentionConfig, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig

GQE = RunConfig(
    model=ModelConfig(
        attention=AttentionConfig(embed_dim=2048, num_query_experts=16, num_kv_heads=8, top_k=1),
        num_layers=20,
        mlp_dim=6144,
        vocab_size=32768,
        remat="keep_nothing",
    ),
    data=DataConfig(corpus="corpora/fineweb-edu"),
    optimizer=OptimizerConfig(peak_learning_rate=3e-4, final_learning_rate=3e-5),
    mesh=MeshConfig(data=-1, fsdp=16),
    run_dir="runs/gqe_1b",
    steps=50_000,  # 105B tokens
    batch_size=1024,  # 2.1M tokens: 4 sequences a chip on 256
    sequence_length=2048,
)
CONFIGS = {"gqe_1b": GQE, "gqa_1b": variant_of(GQE, "gqa_1b", variant="gqa")}
