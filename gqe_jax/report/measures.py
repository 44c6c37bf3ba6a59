"""Routing statistics: idle experts, co-selected pairs, and the tokens that prefer an expert."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

IDLE_BELOW = 0.1
"""An expert whose load is below this fraction of the uniform load, k / M, is idle."""


@dataclasses.dataclass(frozen=True, order=True)
class Expert:
    """Indices of one query expert of a model."""

    layer: int
    group: int
    expert: int


def final_load(
    load: Float[np.ndarray, "step layer group expert"],
) -> Float[np.ndarray, "layer group expert"]:
    """Mean load over the last tenth of the logged steps, relative to the uniform load k / M."""
    last = load[-max(1, len(load) // 10) :].mean(axis=0)
    return last / last.mean(axis=-1, keepdims=True)


def idle_experts(load: Float[np.ndarray, "step layer group expert"]) -> list[Expert]:
    """The experts that are idle at the end of training; a group with an idle expert collapsed."""
    return [Expert(*map(int, place)) for place in np.argwhere(final_load(load) < IDLE_BELOW)]


def chosen(
    expert_index: Int[np.ndarray, "layer token group k"], experts: int
) -> Bool[np.ndarray, "layer token group expert"]:
    """Mask of the experts that each token is routed to."""
    return (expert_index[..., None] == np.arange(experts)).any(axis=-2)


def pair_shares(
    taken: Bool[np.ndarray, "layer token group expert"],
) -> Float[np.ndarray, "layer n n"]:
    """Fraction of tokens routed to both of two experts; n = group · M + expert. The diagonal is
    each expert's load."""
    layers, tokens, *_ = taken.shape
    flat = taken.reshape(layers, tokens, -1).astype(np.float32)
    return np.einsum("lti,ltj->lij", flat, flat, optimize=True) / tokens


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two experts of one layer in different groups, and how often a token selects both."""

    first: Expert
    second: Expert
    together: float
    """Fraction of tokens routed to both."""
    independent: float
    """The product of their loads."""


def strongest_pairs(
    shares: Float[np.ndarray, "layer n n"], experts: int, count: int = 10
) -> list[Pair]:
    """The pairs across groups whose co-selection differs most from that of independent routers."""
    load = np.diagonal(shares, axis1=1, axis2=2)
    independent = load[:, :, None] * load[:, None, :]
    group = np.arange(shares.shape[1]) // experts
    difference = np.abs(shares - independent) * (group[:, None] < group)
    order = np.argsort(-difference, axis=None, kind="stable")[:count]
    pairs = []
    for layer, i, j in zip(*np.unravel_index(order, shares.shape), strict=True):
        if difference[layer, i, j] > 0:
            first, second = (Expert(int(layer), *map(int, divmod(n, experts))) for n in (i, j))
            together, product = shares[layer, i, j], independent[layer, i, j]
            pairs.append(Pair(first, second, float(together), float(product)))
    return pairs


@dataclasses.dataclass(frozen=True)
class Preference:
    """A token and the fraction of its occurrences that are routed to an expert."""

    token: int
    share: float
    count: int
    """Occurrences in the text."""


def preferring_tokens(
    tokens: Int[np.ndarray, "token"],
    taken: Bool[np.ndarray, "token group expert"],
    count: int = 12,
    prior: float = 10.0,
) -> list[list[list[Preference]]]:
    """The tokens that most prefer each expert of one layer, as lists [group][expert].

    The rank is (n + prior · load) / (total + prior), where n of a token's `total` occurrences are
    routed to the expert: the prior keeps rare tokens from leading. Tokens whose fraction is not
    above the expert's load are omitted.
    """
    ids, inverse, totals = np.unique(tokens, return_inverse=True, return_counts=True)
    _, groups, experts = taken.shape
    occurrences = np.zeros((len(ids), groups, experts))
    np.add.at(occurrences, inverse, taken)
    load = taken.mean(axis=0)
    total = totals[:, None, None]
    score = (occurrences + prior * load) / (total + prior)
    share = occurrences / total

    def preferring(group: int, expert: int) -> list[Preference]:
        order = np.argsort(-score[:, group, expert], kind="stable")[:count]
        return [
            Preference(int(ids[i]), float(share[i, group, expert]), int(totals[i]))
            for i in order
            if share[i, group, expert] > load[group, expert]
        ]

    return [[preferring(group, expert) for expert in range(experts)] for group in range(groups)]
