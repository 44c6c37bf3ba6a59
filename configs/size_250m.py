"""The paper's main setting: 250M parameters, 30B tokens in steps of 512 sequences of 2048.

Depth, MLP and vocabulary are ours: the paper does not publish them. Prepare FineWeb-Edu, or another
text, with a tokenizer of at most 50,304 tokens, into `corpora/fineweb-edu` (`python -m
gqe_jax.data.prepare`), or name another directory with `--data.corpus`.
"""

from configs.variants import variant_of
from gqe_jax.config import AttentionConfig, DataConfig, ModelConfig, RunConfig

GQE = RunConfig(
    model=ModelConfig(
        attention=AttentionConfig(embed_dim=1024, num_query_experts=16, num_kv_heads=8, top_k=1),
        num_layers=16,
        mlp_dim=3072,
        vocab_size=50304,
    ),
    data=DataConfig(corpus="corpora/fineweb-edu"),
    run_dir="runs/gqe_250m",
    steps=28610,
    batch_size=512,
    sequence_length=2048,
)
CONFIGS = {
    "gqe_250m": GQE,
    "gqa_250m": variant_of(GQE, "gqa_250m", variant="gqa"),
    "hard_concat_250m": variant_of(GQE, "hard_concat_250m", variant="hard_concat"),
    "weighted_concat_250m": variant_of(GQE, "weighted_concat_250m", variant="weighted_concat"),
}
