"""The default: a byte-level model that learns Python source on two CPU cores in minutes."""

from gqe_jax.config import AttentionConfig, DataConfig, ModelConfig, OptimizerConfig, RunConfig

CONFIGS = {
    "tiny": RunConfig(
        model=ModelConfig(
            attention=AttentionConfig(embed_dim=128, num_query_experts=8, num_kv_heads=4),
            num_layers=4,
            mlp_dim=384,
            vocab_size=256,
            dtype="float32",  # bfloat16 is emulated on most CPUs
        ),
        data=DataConfig(corpus="stdlib", read_threads=1),
        optimizer=OptimizerConfig(peak_learning_rate=4e-3, final_learning_rate=1e-4),
        run_dir="runs/tiny",
        steps=700,
        batch_size=16,
        sequence_length=128,
        eval_every=500,
        eval_batches=None,
        checkpoint_every=250,
    )
}
