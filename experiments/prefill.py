"""Speed of GQE against dense GQA on this machine's device: the op, layers, models, training steps.

    python -m experiments.prefill
    python -m experiments.prefill --budget-minutes 9 --json out/prefill.json
    python -m experiments.prefill --levels op step --lengths 2048 16384

`kernels.benchmarks.prefill` times the op alone, and says how contenders are timed. Layers and
models run the kernels that were best in the op at the nearest length, at their best block sizes.
There, "default" is GQE that names no kernel.
"""

import dataclasses
import functools
import pathlib
import sys
from typing import Literal

import jax

from configs import CONFIGS
from experiments import experts, whole
from experiments.whole import ModelScale
from gqe_jax.commands import parse
from gqe_jax.config import AttentionConfig, ModelConfig
from kernels.benchmarks.command_line import typed
from kernels.benchmarks.prefill import SpeedOptions, is_small, run
from kernels.benchmarks.speed import cases as sizes
from kernels.benchmarks.speed.cases import SpeedCase, at_lengths, op_cases
from kernels.benchmarks.speed.document import Known
from kernels.benchmarks.speed.op import op
from kernels.benchmarks.speed.timing import Contender

PROG = "experiments.prefill"
RESULTS = pathlib.Path(__file__).parent / "results" / "prefill.json"
FULL = ModelScale(**vars(sizes.FULL), model=CONFIGS["gqe_250m"].model, step_lengths=(2048, 16_384))
SMALL = ModelScale(
    **vars(sizes.SMALL),
    model=ModelConfig(
        attention=AttentionConfig(embed_dim=64, num_query_experts=16, num_kv_heads=8, head_dim=8),
        num_layers=2,
        mlp_dim=64,
        vocab_size=256,
        dtype="float32",
    ),
    step_lengths=(128,),
)


@dataclasses.dataclass(frozen=True)
class PrefillConfig(SpeedOptions):
    """Time GQE against dense GQA."""

    levels: tuple[Literal["op", "layer", "model", "step", "projection"], ...] = (
        *("op", "layer", "model", "step", "projection"),
    )
    """The attention op, the attention layer, the model's prefill and its gradients, the training
    step, and the ways to project queries where a group has many experts."""


def cases(scale: ModelScale) -> list[SpeedCase]:
    """All cases, the most important first: a budget may end before the list does."""
    small, *others = scale.head_dims
    short = scale.lengths[0]

    def of(level: str, training: bool, lengths, head_dim: int, top_k: int = 1) -> list[SpeedCase]:
        return at_lengths(scale, level, training, lengths, head_dim, top_k)

    op_level = [case for case in op_cases(scale) if case.level == "op"]
    forward, both = len(scale.first_lengths), 2 * len(scale.first_lengths)
    rates = both + len(scale.head_dims)
    found = op_level[:forward] + of("layer", False, scale.first_lengths, small)
    found += op_level[forward:rates] + of("step", True, scale.step_lengths, small)
    found += of("layer", False, scale.lengths, small) + of("model", False, scale.lengths, small)
    found += op_level[rates:] + of("layer", True, scale.lengths, small)
    found += [
        SpeedCase(
            *("projection", training, short, scale.tokens // short, small),
            experts_per_group=number,
            sides=("selected", "all"),
        )
        for number in (8, 16)
        for training in (False, True)
    ]
    found += of("model", True, scale.lengths, small)
    for head_dim, top_k in [(d, 1) for d in others] + [(d, 2) for d in scale.head_dims]:
        for level in ("layer", "model"):
            for training in (False, True):
                found += of(level, training, scale.lengths, head_dim, top_k)
    return list(dict.fromkeys(found))


def contenders(scale: ModelScale, platform: str, case: SpeedCase, known: Known) -> list[Contender]:
    """All contenders of a case.

    Args:
      known: the best options of the best kernels, by side and name, where the op has been timed;
        layers and models try no others.
    """
    if case.level == "op":
        return op(case, scale, platform)
    if case.level == "projection":
        return experts.projection(case, scale)
    return whole.contenders(case, scale, platform, known)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if arguments is None else arguments
    config = parse(PrefillConfig, given, prog=f"python -m {PROG}", description=__doc__)
    scale = SMALL if is_small(config) else FULL
    wanted = [case for case in cases(scale) if case.level in config.levels]
    build = functools.partial(contenders, scale, jax.default_backend())
    run(config, typed(PROG, given), scale, wanted, build, RESULTS)


if __name__ == "__main__":
    main()
