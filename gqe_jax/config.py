"""Configuration: frozen dataclasses, checked once, at construction.

An error names the field, its value and what would be right.
"""

import dataclasses
from typing import Any, Literal, get_args

from gqe_jax.errors import UserError
from gqe_kernels import Implementation

Variant = Literal["gqe", "hard_concat", "weighted_concat", "gqa"]
SharedKV = Literal["mean", "group_0", "own"]
RopeScalingKind = Literal["none", "linear", "llama3"]
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["keep_everything", "keep_dots", "keep_nothing"]


class ConfigError(UserError, ValueError):
    """A configuration's field has a value that cannot work."""


def _check(condition: bool, field: str, value: Any, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{field} is {value!r}; {remedy}")


def _check_positive(config: Any, *fields: str) -> None:
    for field in fields:
        _check(getattr(config, field) > 0, field, getattr(config, field), "it must be positive")


def _check_choice(config: Any, field: str, choices: Any) -> None:
    names = ", ".join(get_args(choices))
    value = getattr(config, field)
    _check(value in get_args(choices), field, value, f"it must be one of {names}")


def check_kernel(config: Any) -> None:
    """Checks that the field `attention_kernel` is None or the name of an implementation."""
    if config.attention_kernel is not None:
        _check_choice(config, "attention_kernel", Implementation)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary embedding, for sequences longer than in the first training."""

    kind: RopeScalingKind = "none"
    """`linear` divides every frequency by `factor` (arXiv 2306.15595); `llama3` only those of long
    wavelength, as Llama 3.1 does."""
    factor: float = 1.0
    """Divisor of the frequencies."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_length / low_freq_factor are scaled by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_length / high_freq_factor are not scaled."""
    original_length: int = 8192
    """llama3: the sequence length of the first training."""

    def __post_init__(self) -> None:
        _check_choice(self, "kind", RopeScalingKind)
        _check_positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_length")
        _check(
            self.high_freq_factor > self.low_freq_factor,
            "high_freq_factor",
            self.high_freq_factor,
            f"it must exceed low_freq_factor ({self.low_freq_factor})",
        )


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Geometry of one attention layer."""

    variant: Variant = "gqe"
    """Which slots the output has; `gqa` is the dense baseline."""
    embed_dim: int = 1024
    """Width of the model, d."""
    num_query_experts: int = 16
    """Routed query-head experts, N; the query heads of the dense baseline."""
    num_kv_heads: int = 8
    """Groups, each with one key/value head, G."""
    top_k: int = 1
    """Experts active in each group for each token, k."""
    head_dim: int | None = None
    """Width of a head, D; None: embed_dim / num_query_experts."""
    shared_kv: SharedKV = "mean"
    """What the shared head attends to: the mean over groups of K and V, group 0's, or its own."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths."""
    rope_scaling: RopeScaling = RopeScaling()
    qk_norm: bool = False
    """RMSNorm of every query and key over head_dim, before the rotary embedding, as in Qwen3: one
    scale for all query heads, the shared one too, and one for all keys."""
    qk_norm_epsilon: float = 1e-6
    """Added to the mean square in that norm."""
    router_init_std: float = 0.02
    """Standard deviation of the router's initial weights. At 0, the authors' choice, all
    probabilities tie, and every token of the first step selects expert 0 of each group."""

    def __post_init__(self) -> None:
        _check_choice(self, "variant", Variant)
        _check_choice(self, "shared_kv", SharedKV)
        _check_positive(
            self, "embed_dim", "num_query_experts", "num_kv_heads", "top_k", "rope_theta"
        )
        _check_positive(self, "qk_norm_epsilon")
        if self.head_dim is None:
            _check(
                self.embed_dim % self.num_query_experts == 0,
                "embed_dim",
                self.embed_dim,
                f"it must be a multiple of num_query_experts ({self.num_query_experts}), "
                "or head_dim must be given",
            )
        head_dim = self.resolved_head_dim
        _check(
            head_dim > 0 and head_dim % 2 == 0,
            "head_dim",
            head_dim,
            "rotary embedding rotates pairs, so it must be even and positive",
        )
        _check(
            self.num_query_experts % self.num_kv_heads == 0,
            "num_query_experts",
            self.num_query_experts,
            f"it must be a multiple of num_kv_heads ({self.num_kv_heads})",
        )
        _check(
            self.top_k <= self.experts_per_group,
            "top_k",
            self.top_k,
            f"a group has {self.experts_per_group} experts (num_query_experts / num_kv_heads), "
            "so it must be at most that",
        )
        _check(self.router_init_std >= 0, "router_init_std", self.router_init_std, "must be >= 0")

    @property
    def resolved_head_dim(self) -> int:
        """D: `head_dim`, or embed_dim / num_query_experts where that is None."""
        return self.embed_dim // self.num_query_experts if self.head_dim is None else self.head_dim

    @property
    def experts_per_group(self) -> int:
        """M = N / G."""
        return self.num_query_experts // self.num_kv_heads

    @property
    def num_slots(self) -> int:
        """Slots of width head_dim that enter W_O."""
        if self.variant == "gqa":
            return self.num_query_experts
        return self.top_k * self.num_kv_heads + (2 if self.variant == "gqe" else 0)

    @property
    def num_active_heads(self) -> int:
        """Query-attention computations a token pays for."""
        if self.variant == "gqa":
            return self.num_query_experts
        return self.top_k * self.num_kv_heads + (1 if self.variant == "gqe" else 0)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model: pre-norm, SwiGLU, rotary embedding."""

    attention: AttentionConfig = AttentionConfig()
    num_layers: int = 16
    """Decoder blocks."""
    mlp_dim: int = 3072
    """Hidden width of SwiGLU."""
    vocab_size: int = 50304
    """Rows of the embedding: at least the tokenizer's vocabulary."""
    tied_embedding: bool = True
    """The embedding also gives the logits; False: the logits have a table of their own."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in RMSNorm."""
    embedding_init_std: float = 0.02
    """Standard deviation of the initial embedding."""
    dtype: Dtype = "bfloat16"
    """Type of activations and matrix products; parameters, router and loss are float32."""
    remat: Remat = "keep_dots"
    """What each block's forward pass keeps for its backward pass: all activations, the outputs of
    the matrix products with weights, or only the block's input."""

    def __post_init__(self) -> None:
        _check_positive(self, "num_layers", "mlp_dim", "vocab_size", "norm_epsilon")
        _check_choice(self, "dtype", Dtype)
        _check_choice(self, "remat", Remat)

    @property
    def embed_dim(self) -> int:
        return self.attention.embed_dim


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The corpus, and how it is read."""

    corpus: str = "stdlib"
    """`stdlib` (the Python standard library's source, bytes as tokens) or a directory written by
    `python -m gqe_jax.data.prepare`."""
    document_masking: bool = False
    """Keep attention inside documents: each document of a window is a segment."""
    verify_checksums: bool = True
    """Read the corpus once at the start and compare checksums; sizes are always compared."""
    read_threads: int = 4
    """Threads that read batches ahead."""
    prefetch: int = 8
    """Batches read ahead."""

    def __post_init__(self) -> None:
        _check(bool(self.corpus), "corpus", self.corpus, "name a corpus or a directory")
        _check_positive(self, "read_threads", "prefetch")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, warm-up-stable-decay schedule, ZClip, and the weights of the losses."""

    peak_learning_rate: float = 5e-4
    """Learning rate of the stable phase."""
    final_learning_rate: float = 1e-5
    """Floor, reached at the last step."""
    warmup_fraction: float = 0.1
    """Share of the steps with linear warm-up from 0 (the paper: 3B of 30B tokens)."""
    decay_fraction: float = 0.2
    """Share of the steps, at the end, with linear decay; the paper does not publish its value."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-7
    weight_decay: float = 0.1
    """Decoupled decay of all parameters but the norms' scales."""
    zclip: bool = True
    """Clip gradient norms adaptively (arXiv 2504.02507); False: only at `clip_cap`."""
    zclip_alpha: float = 0.97
    """Smoothing of ZClip's mean and variance."""
    zclip_threshold: float = 2.5
    """z-score above which a gradient norm is a spike."""
    zclip_warmup_steps: int = 25
    """Steps whose norms initialise ZClip's mean and variance."""
    clip_cap: float = 1.0
    """Absolute cap of the gradient norm."""
    load_balancing_weight: float = 0.01
    """Weight of the sum over layers of the load-balancing loss."""
    router_z_loss_weight: float = 0.0
    """Weight of the sum over layers of the router's z-loss; not in the paper, off."""
    z_loss_weight: float = 0.0
    """Weight of the mean squared logsumexp of the vocabulary's logits; not in the paper, off."""
    distillation_weight: float = 0.5
    """In a run with a teacher: weight of the divergence from its predictions; the cross-entropy of
    the text has one minus that."""

    def __post_init__(self) -> None:
        _check_positive(self, "peak_learning_rate", "epsilon", "zclip_warmup_steps", "clip_cap")
        _check_positive(self, "zclip_threshold")
        for field in ("warmup_fraction", "decay_fraction", "distillation_weight"):
            value = getattr(self, field)
            _check(0 <= value <= 1, field, value, "it must be between 0 and 1")
        _check(
            self.warmup_fraction + self.decay_fraction <= 1,
            "warmup_fraction",
            self.warmup_fraction,
            f"with decay_fraction ({self.decay_fraction}) it must not exceed 1",
        )
        _check(
            0 <= self.final_learning_rate <= self.peak_learning_rate,
            "final_learning_rate",
            self.final_learning_rate,
            f"it must be between 0 and peak_learning_rate ({self.peak_learning_rate})",
        )
        for field in ("beta1", "beta2", "zclip_alpha"):
            value = getattr(self, field)
            _check(0 <= value < 1, field, value, "it must be at least 0 and less than 1")
        for field in (
            "weight_decay",
            "load_balancing_weight",
            "router_z_loss_weight",
            "z_loss_weight",
        ):
            _check(getattr(self, field) >= 0, field, getattr(self, field), "it must be >= 0")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh's axes; at most one is -1, which takes what is left."""

    data: int = -1
    """Copies of the model; each takes a part of the batch."""
    fsdp: int = 1
    """Shards of parameters and optimizer state; each takes a part of the batch."""
    context: int = 1
    """Shards of every sequence, and of parameters and optimizer state."""
    tensor: int = 1
    """Shards of the groups, the MLP and the vocabulary."""

    def __post_init__(self) -> None:
        for field, size in self.sizes.items():
            _check(size > 0 or size == -1, field, size, "it must be positive, or -1 to fill up")
        free = [field for field, size in self.sizes.items() if size == -1]
        _check(len(free) <= 1, ", ".join(free), -1, "at most one axis can be -1")

    @property
    def sizes(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @property
    def named(self) -> "MeshConfig | None":
        """The mesh, or None at its default: a command line that names no axis."""
        return None if self == MeshConfig() else self

    def resolve(self, num_devices: int) -> dict[str, int]:
        """The sizes on a machine, -1 filled in.

        Raises:
          ConfigError: the axes do not multiply to `num_devices`.
        """
        sizes = self.sizes
        fixed = 1
        for size in sizes.values():
            fixed *= size if size != -1 else 1
        _check(
            fixed <= num_devices,
            "mesh",
            sizes,
            f"it needs {fixed} devices and there are {num_devices}: make an axis smaller",
        )
        for field, size in sizes.items():
            if size == -1:
                _check(
                    num_devices % fixed == 0,
                    f"mesh.{field}",
                    size,
                    f"the other axes take {fixed} devices, which does not divide {num_devices}",
                )
                sizes[field] = num_devices // fixed
                return sizes
        _check(
            fixed == num_devices,
            "mesh",
            sizes,
            f"it uses {fixed} of {num_devices} devices: set one axis to -1 to use all",
        )
        return sizes


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a training run depends on."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    teacher: str | None = None
    """Run directory of a model whose predictions this one also learns (distillation)."""
    run_dir: str = "runs/default"
    """Where config.json, checkpoints, metrics and the report go; a run found there is resumed."""
    steps: int = 28610
    """Optimizer steps in all."""
    batch_size: int = 512
    """Sequences in a step, over all devices."""
    sequence_length: int = 2048
    """Tokens that a sequence predicts."""
    attention_kernel: str | None = None
    """An implementation of `gqe_kernels.routed_attention` to train with; None: the best that is
    known to work on the platform. `pallas_gpu`, for Hopper, is taken by name only."""
    accumulation_steps: int = 1
    """Parts of the batch, computed one after the other to save memory; gradients are summed."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the data."""
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 1000
    """Steps between evaluations on held-out text; the last step is always evaluated."""
    eval_batches: int | None = 64
    """Batches of held-out text in an evaluation, the first ones; None: all."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step, and the best one evaluated, are always saved."""
    keep_checkpoints: int = 3
    """Latest checkpoints to keep, besides the one with the lowest held-out loss."""

    def __post_init__(self) -> None:
        _check(bool(self.run_dir), "run_dir", self.run_dir, "name a directory")
        _check_positive(
            self,
            "steps",
            "batch_size",
            "sequence_length",
            "accumulation_steps",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "keep_checkpoints",
        )
        _check(self.seed >= 0, "seed", self.seed, "it must be >= 0")
        check_kernel(self)
        _check(
            self.eval_batches is None or self.eval_batches > 0,
            "eval_batches",
            self.eval_batches,
            "it must be positive, or None for all",
        )
        _check(
            self.batch_size % self.accumulation_steps == 0,
            "batch_size",
            self.batch_size,
            f"it must be a multiple of accumulation_steps ({self.accumulation_steps})",
        )
