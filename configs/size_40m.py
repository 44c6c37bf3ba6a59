"""Forty million parameters: for studies of quality on one GPU, or on a slice of eight chips.

The geometry is the paper's halved: 8 experts in 4 groups, one of two active, heads of 64. Prepare a
corpus with a tokenizer of at most 32,768 tokens into `corpora/fineweb-edu`, or name another
directory with `--data.corpus`.
"""

from configs.variants import variant_of
from gqe_jax import AttentionConfig, DataConfig, ModelConfig, OptimizerConfig, RunConfig

GQE = RunConfig(
    model=ModelConfig(
        attention=AttentionConfig(embed_dim=512, num_query_experts=8, num_kv_heads=4, top_k=1),
        num_layers=8,
        mlp_dim=1536,
        vocab_size=32768,
    ),
    data=DataConfig(corpus="corpora/fineweb-edu"),
    optimizer=OptimizerConfig(peak_learning_rate=2e-3, final_learning_rate=2e-5),
    run_dir="runs/gqe_40m",
    steps=800,  # 105M tokens
    batch_size=64,  # 131k tokens: 8 sequences a chip on 8
    sequence_length=2048,
)
CONFIGS = {"gqe_40m": GQE, "gqa_40m": variant_of(GQE, "gqa_40m", variant="gqa")}
