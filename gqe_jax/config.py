"""Configuration as frozen dataclasses, which are checked at construction.

Errors name the field, its value and the valid values.
"""

import dataclasses
import math
from typing import Any, Literal, get_args

from gqe_jax.errors import UserError
from gqe_kernels import ImplementationName

Variant = Literal["gqe", "hard_concat", "weighted_concat", "gqa"]
SharedKV = Literal["mean", "group_0", "own"]
RopeScalingKind = Literal["none", "linear", "llama3"]
Dtype = Literal["float32", "bfloat16"]
OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["wsd", "cosine", "linear"]
Remat = Literal["keep_everything", "keep_dots", "keep_attention", "offload", "keep_nothing"]
LibtpuFlags = Literal["default", "overlap"]
MAX_SIZE = (1 << 31) - 1
_MAX_ELEMENTS = 1 << 48  # of a parameter; sizes beyond 2⁶³ overflow in JAX


class ConfigError(UserError, ValueError):
    """A field of a configuration has an invalid value."""


def _check(config: Any, field: str, is_right: bool, remedy: str) -> None:
    if not is_right:
        raise ConfigError(f"{field} is {getattr(config, field)!r}; {remedy}")


def _check_positive(config: Any, *fields: str) -> None:
    for field in fields:
        _check(config, field, 0 < getattr(config, field) < math.inf, "it must be positive")


def _check_not_negative(config: Any, *fields: str) -> None:
    for field in fields:
        _check(config, field, 0 <= getattr(config, field) < math.inf, "it must be >= 0 and finite")


def _check_sizes(config: Any) -> None:
    for field, value in vars(config).items():
        if type(value) is int:
            _check(config, field, value <= MAX_SIZE, f"it must be at most {MAX_SIZE}")


def _check_choice(config: Any, field: str, choices: Any) -> None:
    names = get_args(choices)
    _check(config, field, getattr(config, field) in names, f"it must be one of {', '.join(names)}")


def check_kernel(config: Any) -> None:
    """Checks that the field `attention_kernel` is None or the name of an implementation."""
    if config.attention_kernel is not None:
        _check_choice(config, "attention_kernel", ImplementationName)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary embedding, for sequences longer than in pre-training."""

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
    """llama3: the sequence length of pre-training."""

    def __post_init__(self) -> None:
        _check_choice(self, "kind", RopeScalingKind)
        _check_positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_length")
        exceeds = self.high_freq_factor > self.low_freq_factor
        remedy = f"it must exceed low_freq_factor ({self.low_freq_factor})"
        _check(self, "high_freq_factor", exceeds, remedy)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Geometry of one attention layer."""

    variant: Variant = "gqe"
    """The slots from which the output is projected; `gqa` is the dense baseline."""
    embed_dim: int = 1024
    """Width of the model, d."""
    num_query_experts: int = 16
    """Number of routed query-head experts, N; the query heads of the dense baseline."""
    num_kv_heads: int = 8
    """Number of groups, each with one key/value head, G."""
    top_k: int = 1
    """Active experts per group and token, k."""
    head_dim: int | None = None
    """Width of a head, D; None: embed_dim / num_query_experts."""
    shared_kv: SharedKV = "mean"
    """Keys and values of the shared head: the mean over groups, those of group 0, or its own."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths."""
    rope_scaling: RopeScaling = RopeScaling()
    qk_norm: bool = False
    """Apply RMSNorm over head_dim to queries and keys before the rotary embedding, as in Qwen3. All
    query heads, the shared one included, have one scale, and all key heads another."""
    qk_norm_epsilon: float = 1e-6
    """Epsilon of QK-norm."""
    router_init_std: float = 0.02
    """Standard deviation of the router's initial weights. At 0, the authors' choice, all
    probabilities tie, and every token of the first step selects expert 0 of each group."""
    expert_init_spread: float = 1.0
    """How far apart the query experts of a group start, from 0, where they are copies of one head,
    to 1, where they are independent; the variance of the weights is the same. Not in the paper."""
    extra_slot_scale: float = 1.0
    """Scale of W_out's initial rows for the weighted and the shared slot, from 0 to 1. At 0 the
    model starts as `hard_concat`, and learns to use these slots. Not in the paper."""
    straight_through: bool = False
    """Let the router learn from the hard slots: each is multiplied by p / stop_gradient(p), which
    is 1, where p is its expert's probability. Not in the paper."""
    selection_bias: bool = False
    """Add a bias to each expert's logit for the selection alone, which balances the experts without
    a loss, at `optimizer.selection_bias_rate` (arXiv 2408.15664). Not in the paper."""

    def __post_init__(self) -> None:
        _check_choice(self, "variant", Variant)
        _check_choice(self, "shared_kv", SharedKV)
        _check_positive(self, "embed_dim", "num_query_experts", "num_kv_heads", "top_k")
        _check_positive(self, "rope_theta", "qk_norm_epsilon")
        _check_sizes(self)
        _check_not_negative(self, "router_init_std")
        weighted = self.straight_through and self.variant == "weighted_concat"
        remedy = "the slots of weighted_concat are weighted by the probabilities already"
        _check(self, "straight_through", not weighted, remedy)
        biased = self.selection_bias and self.variant == "gqa"
        _check(self, "selection_bias", not biased, "gqa selects no experts, so it must be False")
        for field in ("expert_init_spread", "extra_slot_scale"):
            _check(self, field, 0 <= getattr(self, field) <= 1, "it must be between 0 and 1")
        experts, groups = self.num_query_experts, self.num_kv_heads
        remedy = f"it must be a multiple of num_query_experts ({experts}), or head_dim be given"
        _check(self, "embed_dim", self.head_dim is not None or not self.embed_dim % experts, remedy)
        head_dim = self.resolved_head_dim
        if head_dim <= 0 or head_dim % 2:
            raise ConfigError(
                f"head_dim is {head_dim}; rotary embedding rotates pairs, so it must be even and "
                "positive"
            )
        remedy = f"it must be a multiple of num_kv_heads ({groups})"
        _check(self, "num_query_experts", experts % groups == 0, remedy)
        remedy = f"a group has {experts // groups} experts (num_query_experts / num_kv_heads), so "
        _check(self, "top_k", self.top_k <= experts // groups, remedy + "it must be at most that")

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
        """The number of slots of width head_dim that the output projection reads."""
        if self.variant == "gqa":
            return self.num_query_experts
        return self.top_k * self.num_kv_heads + (2 if self.variant == "gqe" else 0)

    @property
    def num_active_heads(self) -> int:
        """The number of query heads that are computed for a token."""
        if self.variant == "gqa":
            return self.num_query_experts
        return self.top_k * self.num_kv_heads + (1 if self.variant == "gqe" else 0)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model: pre-norm, SwiGLU, rotary embedding."""

    attention: AttentionConfig = AttentionConfig()
    num_layers: int = 16
    """Number of decoder blocks."""
    mlp_dim: int = 3072
    """Hidden width of SwiGLU."""
    vocab_size: int = 50304
    """Rows of the embedding; at least the tokenizer's vocabulary size."""
    tied_embedding: bool = True
    """Use the embedding for the logits too; False: the logits have their own table."""
    norm_epsilon: float = 1e-6
    """Epsilon of RMSNorm."""
    embedding_init_std: float = 0.02
    """Standard deviation of the initial embedding."""
    dtype: Dtype = "bfloat16"
    """Dtype of activations and matrix products; parameters, router and loss are float32."""
    remat: Remat = "keep_dots"
    """Activations that each block saves for its backward pass: all (`keep_everything`), the outputs
    of matrix products with weights and of the attention (`keep_dots`), the block's input and the
    output of the attention (`keep_attention`), both in the host's memory (`offload`), or only the
    block's input (`keep_nothing`)."""

    def __post_init__(self) -> None:
        _check_positive(self, "num_layers", "mlp_dim", "vocab_size", "norm_epsilon")
        _check_not_negative(self, "embedding_init_std")
        _check_sizes(self)
        _check_choice(self, "dtype", Dtype)
        _check_choice(self, "remat", Remat)
        attention = self.attention
        heads = attention.num_query_experts * attention.resolved_head_dim
        elements = attention.embed_dim * max(
            self.num_layers * max(heads, self.mlp_dim), self.vocab_size
        )
        if elements > _MAX_ELEMENTS:
            raise ConfigError(
                f"a parameter has {elements} elements, by num_layers {self.num_layers}, mlp_dim "
                f"{self.mlp_dim}, vocab_size {self.vocab_size}, embed_dim {attention.embed_dim} "
                f"and {attention.num_query_experts} heads of {attention.resolved_head_dim}; it can "
                f"have at most {_MAX_ELEMENTS}"
            )

    @property
    def embed_dim(self) -> int:
        return self.attention.embed_dim


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The corpus, and options for reading it."""

    corpus: str = "stdlib"
    """`stdlib` (the Python standard library's source, bytes as tokens) or a directory written by
    `python -m gqe_jax.data.prepare`. With a mixture it gives the tokenizer and the held-out text
    by which checkpoints are compared; its training text is read only if the mixture names it."""
    mixture: tuple[str, ...] = ()
    """Corpora to train on and their shares of the sequences, each as NAME=DIRECTORY:WEIGHT; none:
    `corpus` alone."""
    decay_mixture: tuple[str, ...] = ()
    """The mixture of the decay phase of the schedule `wsd`; none: that of the steps before."""
    document_masking: bool = False
    """Restrict attention to documents: each document of a window is a segment."""
    verify_checksums: bool = True
    """Read the corpus once at the start and verify its checksums; sizes are always verified."""
    read_threads: int = 4
    """Number of threads that read batches ahead."""
    prefetch: int = 8
    """Number of batches to read ahead."""

    def __post_init__(self) -> None:
        _check(self, "corpus", bool(self.corpus), "name a corpus or a directory")
        _check_positive(self, "read_threads", "prefetch")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its schedule, ZClip, and the weights of the losses."""

    name: OptimizerName = "adamw"
    """`adamw`, or `muon` (arXiv 2502.16982) for the matrices of attention and MLP and AdamW for the
    embeddings, the router and the norms; both take the same learning rates and weight decay."""
    schedule: Schedule = "wsd"
    """Learning rate after the warm-up: constant, then linear to the floor over `decay_fraction`
    (`wsd`), or to the floor along half a cosine (`cosine`) or a line (`linear`) at once."""
    peak_learning_rate: float = 5e-4
    """Learning rate after the warm-up."""
    final_learning_rate: float = 1e-5
    """Learning rate at the last step of the schedule."""
    schedule_steps: int | None = None
    """Length of the learning-rate schedule; None: the run's `steps`. After it the learning rate
    stays at `final_learning_rate`."""
    warmup_fraction: float = 0.1
    """Fraction of the schedule with linear warm-up from 0 (the paper: 3B of 30B tokens)."""
    decay_fraction: float = 0.2
    """wsd: fraction of the schedule, at its end, with linear decay; the paper does not give its
    value."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-7
    weight_decay: float = 0.1
    """Decoupled weight decay of all parameters except the scales of norms."""
    first_moment_dtype: Dtype = "float32"
    """Dtype in which the mean of gradients is stored; bfloat16 saves two bytes a parameter."""
    shard_state_over_data: bool = False
    """Shard the optimizer state over `mesh.data` too (ZeRO-1, arXiv 1910.02054): each replica
    updates its part of the parameters, which are then gathered."""
    zclip: bool = True
    """Clip gradient norms adaptively (arXiv 2504.02507); False: only at `clip_cap`."""
    zclip_alpha: float = 0.97
    """Decay of ZClip's running mean and variance."""
    zclip_threshold: float = 2.5
    """z-score above which a gradient norm is a spike."""
    zclip_warmup_steps: int = 25
    """Steps whose norms initialise ZClip's mean and variance."""
    clip_cap: float = 1.0
    """Upper bound of the gradient norm."""
    skip_spikes: float | None = None
    """Skip a step whose loss or gradient norm is not finite, or exceeds its running mean by so many
    standard deviations, such as 8: the state stays as it was. None: no step is skipped."""
    average_decay: float | None = None
    """Decay of an exponential average of the parameters, such as 0.999, which is evaluated and
    exported in their place; None: no average."""
    router_learning_rate_factor: float = 1.0
    """The router's learning rate as a multiple of that of all other parameters; its weight decay
    stays the same."""
    selection_bias_rate: float = 1e-3
    """With `model.attention.selection_bias`, what a step adds to the bias of each expert that fewer
    tokens than the mean of its group select, and takes from those with more; in logits."""
    tied_fraction: float = 0.0
    """Fraction of the schedule in which the query experts of a group are tied, at first whole and
    then less and less: of an expert's update, the mean over the group takes the place of a part
    that falls from 1 to 0. Not in the paper."""
    load_balancing_weight: float = 0.01
    """Weight of the sum over layers of the load-balancing loss."""
    router_z_loss_weight: float = 0.0
    """Weight of the sum over layers of the router's z-loss; not in the paper, off."""
    z_loss_weight: float = 0.0
    """Weight of the mean squared logsumexp of the vocabulary's logits; not in the paper, off."""
    distillation_weight: float = 0.5
    """With a teacher: weight w of the KL divergence from its predictions; the cross-entropy has
    weight 1 - w."""

    def phases(self, steps: int) -> tuple[int, int, int]:
        """The steps of the warm-up, of the decay, and of the whole schedule, by default `steps`.

        A phase of the schedule `wsd` whose fraction is not 0 has at least one step. If the schedule
        is too short for all, the warm-up goes first, then the decay: two steps are the peak and the
        floor, a single one is the peak. The other schedules have no plateau.
        """
        length = self.schedule_steps or steps
        decay = round(self.decay_fraction * length)
        decay = min(max(decay, 1), length - 1) if self.decay_fraction else 0
        reserved = decay if self.schedule == "wsd" else min(1, length - 1)
        warmup = round(self.warmup_fraction * length)
        warmup = min(max(warmup, 1), length - 1 - reserved) if self.warmup_fraction else 0
        return warmup, decay if self.schedule == "wsd" else length - 1 - warmup, length

    def __post_init__(self) -> None:
        _check_positive(self, "peak_learning_rate", "epsilon", "zclip_warmup_steps", "clip_cap")
        _check_positive(self, "zclip_threshold")
        _check_choice(self, "first_moment_dtype", Dtype)
        if self.skip_spikes is not None:
            _check_positive(self, "skip_spikes")
        if self.average_decay is not None:
            fits = 0 < self.average_decay < 1
            _check(self, "average_decay", fits, "it must be between 0 and 1, or None")
        if self.schedule_steps is not None:
            _check_positive(self, "schedule_steps")
        for field in ("warmup_fraction", "decay_fraction", "distillation_weight", "tied_fraction"):
            _check(self, field, 0 <= getattr(self, field) <= 1, "it must be between 0 and 1")
        _check_not_negative(self, "router_learning_rate_factor", "selection_bias_rate")
        _check_choice(self, "name", OptimizerName)
        _check_choice(self, "schedule", Schedule)
        fits = self.schedule != "wsd" or self.warmup_fraction + self.decay_fraction <= 1
        remedy = f"with decay_fraction ({self.decay_fraction}) it must not exceed 1"
        _check(self, "warmup_fraction", fits, remedy)
        fits = 0 <= self.final_learning_rate <= self.peak_learning_rate
        remedy = f"it must be between 0 and peak_learning_rate ({self.peak_learning_rate})"
        _check(self, "final_learning_rate", fits, remedy)
        for field in ("beta1", "beta2", "zclip_alpha"):
            fits = 0 <= getattr(self, field) < 1
            _check(self, field, fits, "it must be at least 0 and less than 1")
        _check_not_negative(self, "weight_decay", "load_balancing_weight")
        _check_not_negative(self, "router_z_loss_weight", "z_loss_weight")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh's axes; one may be -1, which takes the remaining devices."""

    data: int = -1
    """Replicas of the model; each takes a part of the batch."""
    fsdp: int = 1
    """Shards of parameters and optimizer state; each takes a part of the batch."""
    context: int = 1
    """Shards of every sequence, and of parameters and optimizer state."""
    tensor: int = 1
    """Shards of the groups, the MLP and the vocabulary."""

    def __post_init__(self) -> None:
        for field, size in self.sizes.items():
            _check(self, field, size > 0 or size == -1, "it must be positive, or -1 to fill up")
        free = [field for field, size in self.sizes.items() if size == -1]
        if len(free) > 1:
            raise ConfigError(f"{', '.join(free)} is -1; at most one axis can be -1")

    @property
    def sizes(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @property
    def named(self) -> "MeshConfig | None":
        """The mesh, or None at its default: a command line that names no axis."""
        return None if self == MeshConfig() else self

    def resolve(self, num_devices: int) -> dict[str, int]:
        """The sizes for `num_devices` devices, with -1 replaced.

        Raises:
          ConfigError: the axes do not multiply to `num_devices`.
        """
        sizes = self.sizes
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if fixed > num_devices:
            raise ConfigError(
                f"mesh is {sizes!r}; it needs {fixed} devices and there are {num_devices}: make an "
                "axis smaller"
            )
        for field, size in sizes.items():
            if size == -1:
                if num_devices % fixed:
                    raise ConfigError(
                        f"mesh.{field} is -1; the other axes take {fixed} devices, which does not "
                        f"divide {num_devices}"
                    )
                return sizes | {field: num_devices // fixed}
        if fixed < num_devices:
            raise ConfigError(
                f"mesh is {sizes!r}; it uses {fixed} of {num_devices} devices: set one axis to -1 "
                "to use all"
            )
        return sizes


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A window of steps that JAX's profiler records into `profile/` in the run's directory."""

    start: int | None = None
    """The first step that is recorded; None: nothing is. A resumed run that is beyond it records
    nothing."""
    steps: int = 3
    """Number of steps that are recorded."""
    all_hosts: bool = False
    """Record on every host; False: on the first."""

    def __post_init__(self) -> None:
        _check_positive(self, "steps")
        if self.start is not None:
            _check_positive(self, "start")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The complete configuration of a training run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    teacher: str | None = None
    """Run directory of a teacher, from which this model is distilled."""
    run_dir: str = "runs/default"
    """Directory of config.json, checkpoints, metrics and the report; an existing run is resumed."""
    resume_step: int | None = None
    """Step of a saved checkpoint from which the run restarts, with other values of `optimizer` if
    given; later checkpoints and metrics are deleted. The same command, started again, resumes the
    restarted run. None: the latest."""
    steps: int = 28610
    """Total number of optimizer steps."""
    batch_size: int = 512
    """Sequences per step, over all devices."""
    sequence_length: int = 2048
    """Predicted tokens per sequence."""
    attention_kernel: ImplementationName | None = None
    """The implementation of `gqe_kernels.routed_attention` for training; None: the best that is
    known to work on the platform."""
    accumulation_steps: int = 1
    """Number of microbatches per step, whose gradients are accumulated to save memory."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the data."""
    log_every: int = 10
    """Steps between records of metrics."""
    eval_every: int = 1000
    """Steps between evaluations on held-out text; the last step is always evaluated."""
    eval_batches: int | None = 64
    """Number of held-out batches per evaluation, from the start of the split; None: all."""
    held_out: tuple[str, ...] = ()
    """Further held-out text, each as NAME=DIRECTORY of a corpus: its validation split is scored at
    every evaluation and recorded under its name."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step and the best evaluated step are always saved."""
    checkpoint_minutes: float | None = None
    """Minutes after which a checkpoint is saved too, by the clock of the first process; None: only
    every `checkpoint_every` steps."""
    keep_checkpoints: int = 3
    """Number of latest checkpoints to keep, besides the one with the lowest held-out loss."""
    profile: ProfileConfig = ProfileConfig()
    watchdog_seconds: float | None = 1800.0
    """When no step, batch of an evaluation or checkpoint ends for so long, every host prints the
    stack of each of its threads; None: never."""
    watchdog_exit: bool = False
    """End the job then."""
    compilation_cache: str | None = "default"
    """Directory or bucket in which compiled programs are kept for the next start; `default`:
    `gqe_jax/programs` in the user's cache directory; None or empty: none are kept."""
    compiled: str | None = None
    """A file of `--compile-for SLICE --save FILE`, whose program trains. It is code that runs: name
    only a file that you trust."""
    libtpu_flags: LibtpuFlags = "default"
    """Options of the compiler for TPUs: its own, or those that are published for overlapping
    collectives with matrix products."""
    wandb: str | None = None
    """Project of Weights & Biases for the metrics; None: none. WANDB_MODE=offline keeps them in the
    run's directory."""

    def __post_init__(self) -> None:
        _check(self, "run_dir", bool(self.run_dir), "name a directory")
        _check_choice(self, "libtpu_flags", LibtpuFlags)
        if self.watchdog_seconds is not None:
            _check_positive(self, "watchdog_seconds")
        watched = self.watchdog_seconds is not None
        _check(
            self, "watchdog_exit", watched or not self.watchdog_exit, "it needs watchdog_seconds"
        )
        for field in ("compiled", "wandb"):
            _check(self, field, getattr(self, field) != "", "it must be None or a name")
        _check_positive(self, "steps", "batch_size", "sequence_length", "accumulation_steps")
        _check_positive(self, "log_every", "eval_every", "checkpoint_every", "keep_checkpoints")
        fits = 0 <= self.seed < 2**63
        _check(self, "seed", fits, "it must be between 0 and 2**63 - 1")
        if self.resume_step is not None:
            _check_not_negative(self, "resume_step")
        if self.checkpoint_minutes is not None:
            _check_positive(self, "checkpoint_minutes")
        check_kernel(self)
        if self.eval_batches is not None and self.eval_batches <= 0:
            raise ConfigError(
                f"eval_batches is {self.eval_batches}; it must be positive, or None for all"
            )
        divides = self.batch_size % self.accumulation_steps == 0
        remedy = f"it must be a multiple of accumulation_steps ({self.accumulation_steps})"
        _check(self, "batch_size", divides, remedy)
        if self.optimizer.tied_fraction and self.model.attention.variant == "gqa":
            raise ConfigError(
                f"optimizer.tied_fraction is {self.optimizer.tied_fraction}; variant gqa has no "
                "experts to tie: set it to 0"
            )
