"""What is measured: sizes, and the list of cases in the order in which they matter."""

import dataclasses
from typing import Literal

from configs import CONFIGS
from gqe_jax.config import AttentionConfig, ModelConfig, Variant

Level = Literal["op", "layer", "model", "step", "projection", "blocks"]
LEVELS: tuple[Level, ...] = ("op", "layer", "model", "step", "projection")  # without being told


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes that fit a device.

    Attributes:
      model: the geometry; of it the case replaces the variant, top_k, groups and head size.
      tokens: batch × length, where a length is not longer.
      first_lengths: those of the speeds to reach.
      rate_length: of the kernel's rate to reach.
      step_lengths: of the training steps.
      matmul: rows and columns of the matrix product whose rate is the yardstick.
      seconds: that one measurement of one contender should take.
    """

    model: ModelConfig
    tokens: int
    lengths: tuple[int, ...]
    first_lengths: tuple[int, ...]
    rate_length: int
    step_lengths: tuple[int, ...]
    head_dims: tuple[int, ...]
    matmul: int
    seconds: float


FULL = Scale(
    model=CONFIGS["gqe_250m"].model,
    tokens=32_768,
    lengths=tuple(1024 * 2**i for i in range(1, 8)),
    first_lengths=(2048, 4096, 8192, 32_768, 131_072),
    rate_length=16_384,
    step_lengths=(2048, 16_384),
    head_dims=(64, 128),
    matmul=8192,
    seconds=0.02,
)
SMALL = Scale(
    model=ModelConfig(
        attention=AttentionConfig(embed_dim=64, num_query_experts=16, num_kv_heads=8, head_dim=8),
        num_layers=2,
        mlp_dim=64,
        vocab_size=256,
        dtype="float32",
    ),
    tokens=256,
    lengths=(128, 256),
    first_lengths=(128, 256),
    rate_length=256,
    step_lengths=(128,),
    head_dims=(8,),
    matmul=256,
    seconds=0.005,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
      level: the attention op, the attention layer, the whole model (prefill; or its loss and
        gradients), a training step, the ways to project queries where a group has many experts, or
        block sizes of this project's GPU kernel.
      training: forward and backward; always so of a step.
      top_k: experts of a group that a token takes. With two, groups are of twice as many experts,
        so that 9 of 16 heads are computed with one and with two.
      experts_per_group: of the level "projection" only.
    """

    level: Level
    training: bool
    length: int
    batch: int
    head_dim: int
    top_k: int = 1
    experts_per_group: int | None = None

    @property
    def name(self) -> str:
        """Unique among the cases."""
        kind = "forward + backward" if self.training else "forward"
        which = f"k = {self.top_k}"
        if self.experts_per_group is not None:
            which += f", M = {self.experts_per_group}"
        return f"{self.level}, {kind}, {self.batch} × {self.length}, D = {self.head_dim}, {which}"

    def model(self, scale: Scale, variant: Variant) -> ModelConfig:
        """The model of this case."""
        attention = scale.model.attention
        experts, groups = attention.num_query_experts, attention.num_kv_heads // self.top_k
        if self.experts_per_group is not None:
            groups = attention.num_kv_heads
            experts = groups * self.experts_per_group
        attention = dataclasses.replace(
            attention,
            variant=variant,
            head_dim=self.head_dim,
            top_k=self.top_k,
            num_query_experts=experts,
            num_kv_heads=groups,
        )
        return dataclasses.replace(scale.model, attention=attention)


def cases(scale: Scale) -> list[Case]:
    """All cases, those of the speeds to reach first: a budget may end before the list does."""
    small, *others = scale.head_dims

    def of(level: Level, training: bool, lengths, head_dim: int, top_k: int = 1) -> list[Case]:
        return [
            Case(level, training, length, max(1, scale.tokens // length), head_dim, top_k)
            for length in lengths
        ]

    found = []
    for level, training in (("op", False), ("layer", False), ("op", True)):
        found += of(level, training, scale.first_lengths, small)
    for head_dim in scale.head_dims:
        found += of("op", False, [scale.rate_length], head_dim)
    found += of("step", True, scale.step_lengths, small)
    for level, training in (("op", False), ("layer", False), ("op", True)):
        found += of(level, training, scale.lengths, small)
    for head_dim in others:
        found += of("op", False, scale.lengths, head_dim)
    found += [
        Case("op", False, length // 2, 1, head_dim)  # one short sequence alone
        for head_dim in scale.head_dims
        for length in scale.lengths[:3]
    ]
    found += of("model", False, scale.lengths, small)
    found += of("layer", True, scale.lengths, small)
    for head_dim in others:
        found += of("op", True, scale.lengths, head_dim)
    found += [
        Case(
            "projection", training, scale.lengths[0], scale.tokens // scale.lengths[0], small, 1, m
        )
        for m in (8, 16)
        for training in (False, True)
    ]
    found += of("op", False, scale.lengths, small, top_k=2)
    found += of("model", True, scale.lengths, small)
    for head_dim in others:
        for level in ("layer", "model"):
            found += of(level, False, scale.lengths, head_dim)
            found += of(level, True, scale.lengths, head_dim)
    for head_dim in scale.head_dims:
        for level in ("op", "layer", "model"):
            for training in (False, True):
                found += of(level, training, scale.lengths, head_dim, top_k=2)
    for head_dim in scale.head_dims:
        for training in (False, True):
            found += of("blocks", training, [scale.rate_length], head_dim)
    return list(dict.fromkeys(found))
