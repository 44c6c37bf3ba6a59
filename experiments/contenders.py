"""Models that a model of Grouped Query Experts is held against, and what each of them costs."""

import dataclasses
from collections.abc import Mapping

from gqe_jax.compile_for import compile_step, hlo
from gqe_jax.compile_for.topology import get_topology
from gqe_jax.config import AttentionConfig, ConfigError, MeshConfig, RunConfig
from gqe_jax.model.flops import matmul_flops_per_token
from gqe_jax.model.transformer import count_parameters

LENGTHS = 2048, 32_768
GQE, DENSE, FEWER_HEADS = "GQE", "dense, all heads", "dense, the selected heads"
TIED_HARD = "tied experts, hard slots alone"
WIDER_MLP, AS_LARGE = "dense, the selected heads, wider MLP", "GQE, as many parameters as dense"


def attention_of(base: RunConfig, **fields: object) -> RunConfig:
    """`base` with other fields of the attention; head_dim stays."""
    attention = base.model.attention
    fields = {"head_dim": attention.resolved_head_dim} | fields
    attention = dataclasses.replace(attention, **fields)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, attention=attention))


def mlp_of(base: RunConfig, width: int) -> RunConfig:
    """`base` with an MLP of another width."""
    return dataclasses.replace(base, model=dataclasses.replace(base.model, mlp_dim=width))


def widened(dense: RunConfig, other: RunConfig) -> RunConfig:
    """`dense` with an MLP so wide that a token needs the FLOPs of `other` at its own length."""
    dense_flops, flops = (
        matmul_flops_per_token(run.model, other.sequence_length) for run in (dense, other)
    )
    a_column = 2 * 3 * dense.model.embed_dim * dense.model.num_layers  # FLOPs of one of the MLP
    return mlp_of(dense, dense.model.mlp_dim + round((flops - dense_flops) / a_column))


def of_equal_cost(base: RunConfig) -> Mapping[str, RunConfig]:
    """GQE, and the models that cost as much as it does, or more, each in its own way.

    Args:
      base: a run of the variant `gqe`, with fewer selected heads than query experts.

    Dense with all heads is the paper's baseline. Dense with the selected heads has k·G query heads,
    one fewer than GQE computes for a token; G does not divide k·G + 1. With the FLOPs that it needs
    fewer than GQE at the run's own length, its MLP is widened. Last, GQE with an MLP that gives it
    as many parameters as the dense model.
    """
    attention = base.model.attention
    dense = attention_of(base, variant="gqa")
    heads = attention.top_k * attention.num_kv_heads
    fewer = attention_of(base, variant="gqa", num_query_experts=heads, top_k=1)
    a_column = 3 * base.model.embed_dim * base.model.num_layers  # weights of one of the MLP
    lacks = count_parameters(dense.model) - count_parameters(base.model)
    return {
        GQE: base,
        DENSE: dense,
        FEWER_HEADS: fewer,
        WIDER_MLP: widened(fewer, base),
        AS_LARGE: mlp_of(base, base.model.mlp_dim + round(lacks / a_column)),
    }


def of_experts(base: RunConfig, experts: tuple[int, ...] = (2, 4, 8)) -> Mapping[str, RunConfig]:
    """GQE with so many experts in each group, of which as many as in `base` are selected.

    First dense with the selected heads alone, then the recipe of `base`, then experts that are tied
    at first, with hard slots alone, then the first with the FLOPs of each of those in its MLP.
    """
    groups = base.model.attention.num_kv_heads
    more = {f"M = {m}": attention_of(base, num_query_experts=m * groups) for m in experts}
    hard = {f"{name}, {TIED_HARD}": tied(run, variant="hard_concat") for name, run in more.items()}
    fewer = of_equal_cost(base)[FEWER_HEADS]
    wider = {
        f"{WIDER_MLP}, as M = {m}": widened(fewer, run)
        for m, run in zip(experts, hard.values(), strict=True)
    }
    return {FEWER_HEADS: fewer} | more | hard | wider


def of_sizes(base: RunConfig) -> Mapping[str, RunConfig]:
    """GQE and dense at half and twice the width, tokens in proportion to the parameters."""
    found = {}
    for factor in (0.5, 1.0, 2.0):
        attention = base.model.attention
        scaled = dataclasses.replace(
            attention,
            embed_dim=round(attention.embed_dim * factor),
            head_dim=round(attention.resolved_head_dim * factor),
        )
        model = dataclasses.replace(
            base.model, attention=scaled, mlp_dim=round(base.model.mlp_dim * factor)
        )
        share = count_parameters(model) / count_parameters(base.model)
        sized = dataclasses.replace(base, model=model, steps=max(1, round(base.steps * share)))
        for name, run in ((GQE, sized), (DENSE, attention_of(sized, variant="gqa"))):
            found[f"{name}, {count_parameters(model) / 1e6:.1f}M"] = run
    return found


def tied(base: RunConfig, **fields: object) -> RunConfig:
    """GQE whose experts of a group start as copies, tied less and less for half of the steps."""
    copies = attention_of(base, expert_init_spread=0.0, **fields)
    return dataclasses.replace(
        copies, optimizer=dataclasses.replace(base.optimizer, tied_fraction=0.5)
    )


def of_recipes(base: RunConfig) -> Mapping[str, RunConfig]:
    """GQE with one change of its recipe at a time."""

    def optimizer(**fields: float) -> RunConfig:
        changed = dataclasses.replace(base.optimizer, **fields)
        return dataclasses.replace(base, optimizer=changed)

    return {
        "the paper's": base,
        "no balancing": optimizer(load_balancing_weight=0.0),
        "balancing x 0.1": optimizer(
            load_balancing_weight=base.optimizer.load_balancing_weight / 10
        ),
        "balancing x 10": optimizer(
            load_balancing_weight=base.optimizer.load_balancing_weight * 10
        ),
        "balancing by a bias": dataclasses.replace(
            attention_of(base, selection_bias=True),
            optimizer=dataclasses.replace(base.optimizer, load_balancing_weight=0.0),
        ),
        "router's z-loss 0.001": optimizer(router_z_loss_weight=1e-3),
        "router starts at 0": attention_of(base, router_init_std=0.0),
        "router starts at 0.2": attention_of(base, router_init_std=0.2),
        "router's learning rate x 0.1": optimizer(router_learning_rate_factor=0.1),
        "router's learning rate x 10": optimizer(router_learning_rate_factor=10.0),
        "experts start alike": attention_of(base, expert_init_spread=0.1),
        "router learns from hard slots": attention_of(base, straight_through=True),
        "weighted and shared slot start at 0": attention_of(base, extra_slot_scale=0.0),
        "tied experts": tied(base),
        "tied, weighted and shared slot start at 0": tied(base, extra_slot_scale=0.0),
        TIED_HARD: tied(base, variant="hard_concat"),
        "tied, hard slots alone, from which the router learns": tied(
            base, variant="hard_concat", straight_through=True
        ),
        "no shared head": attention_of(base, variant="hard_concat"),
        "no shared head, slots weighted": attention_of(base, variant="weighted_concat"),
        "shared head with own K and V": attention_of(base, shared_kv="own"),
    }


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
      parameters: of the model.
      flops: of the forward pass for one token of a sequence of 2,048 and of 32,768, matrix products
        alone: experts that are projected and not selected count, masked keys do not.
    """

    parameters: int
    flops: tuple[float, float]


def cost(run: RunConfig) -> Cost:
    """The cost of a run's model."""
    short, long = (matmul_flops_per_token(run.model, length) for length in LENGTHS)
    return Cost(count_parameters(run.model), (short, long))


def static_cycles(run: RunConfig) -> tuple[float, float]:
    """Cycles of the forward pass for a token of a sequence of 2,048 and of 32,768, on a v5e.

    The model computes in bfloat16. The cycles are the compilers' own, of XLA's instructions and of
    the kernels, as `compile_for` adds them up.

    Raises:
      ConfigError: libtpu is not installed, or the cycles of a kernel or a loop are not known, as
        where heads have fewer features than the attention kernel takes.
    """
    topology = get_topology("v5e:2x2")
    found = []
    for length in LENGTHS:
        rows = len(topology.devices) * max(1, LENGTHS[-1] // length)
        changed = dataclasses.replace(
            run,
            model=dataclasses.replace(run.model, dtype="bfloat16"),
            sequence_length=length,
            batch_size=rows,
            mesh=MeshConfig(),
        )
        try:
            step = compile_step(changed, topology, "eval")
        except hlo.UnknownTripsError as error:
            raise ConfigError(f"cycles is True; at {length:,} tokens {error}") from error
        if step.scheduled.not_counted:
            names = ", ".join(step.scheduled.not_counted)
            raise ConfigError(f"cycles is True; there are no static cycles of {names}")
        seconds = step.scheduled.xla + step.scheduled.kernels
        tokens = rows * length / len(topology.devices)
        found.append(seconds * topology.chip.clock / tokens)
    return found[0], found[1]


def is_routed(attention: AttentionConfig) -> bool:
    """Whether a router selects among experts."""
    return attention.variant != "gqa" and attention.top_k < attention.experts_per_group
