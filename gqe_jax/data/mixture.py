"""The order of training data from several corpora: a function of the row's number alone.

Row r of step s has the number s · batch_size + r. Within a stage, rows are assigned to corpora in a
pattern that repeats. It is an earliest-deadline-first schedule: of n rows of a stage, every corpus
has its weight times n, give or take less than one (the chairman assignment problem; Tijdeman 1980).
The n-th row of a corpus is window n of that corpus's endless sequence of epochs.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.data.corpus import Split

_FORM = "it must be NAME=DIRECTORY:WEIGHT, such as web=corpora/web:0.7"
_MAX_PERIOD = 100_000


@dataclasses.dataclass(frozen=True)
class Part:
    """A corpus of a mixture."""

    name: str
    directory: str
    weight: Fraction
    """Its share of the rows; those of a mixture sum to 1."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The mixture of the steps from `begin` to the next plan."""

    begin: int
    parts: tuple[Part, ...]


def parse_named(field: str, text: str, form: str) -> tuple[str, str]:
    """Splits NAME=REST.

    Raises:
      ConfigError: it has another form.
    """
    name, separator, rest = text.partition("=")
    if not (separator and rest and re.fullmatch(r"[\w.-]+", name)):
        raise ConfigError(f"{field} has {text!r}; {form}")
    return name, rest


def _parse(field: str, texts: Sequence[str]) -> tuple[Part, ...]:
    parts = []
    for text in texts:
        name, rest = parse_named(field, text, _FORM)
        directory, _, number = rest.rpartition(":")
        try:
            weight = Fraction(number)
        except (ValueError, ZeroDivisionError):
            weight = Fraction(0)
        if not directory or weight <= 0:
            raise ConfigError(f"{field} has {text!r}; {_FORM}, the weight positive")
        parts.append(Part(name, directory, weight))
    names = [part.name for part in parts]
    if len(set(names)) < len(names):
        raise ConfigError(f"{field} has the names {', '.join(names)}; they must differ")
    total = sum(part.weight for part in parts)
    parts = [dataclasses.replace(part, weight=part.weight / total) for part in parts]
    period = math.lcm(*(part.weight.denominator for part in parts))
    if period > _MAX_PERIOD:
        raise ConfigError(
            f"{field} has weights whose pattern repeats after {period} rows; it may have at most "
            f"{_MAX_PERIOD}: give weights of fewer digits that sum to 1 or 100"
        )
    return tuple(parts)


def plans(config: RunConfig) -> tuple[Plan, ...]:
    """The stages of a run's data: `data.mixture` or `data.corpus`, then `data.decay_mixture`.

    Raises:
      ConfigError: a mixture cannot be read, or there is no decay phase for the second.
    """
    data = config.data
    first = _parse("data.mixture", data.mixture) or (Part("corpus", data.corpus, Fraction(1)),)
    found = [Plan(0, first)]
    if data.decay_mixture:
        _, decay, length = config.optimizer.phases(config.steps)
        if config.optimizer.schedule != "wsd" or decay == 0:
            raise ConfigError(
                f"data.decay_mixture is {data.decay_mixture}; it needs optimizer.schedule wsd and "
                "an optimizer.decay_fraction above 0"
            )
        found.append(Plan(length - decay, _parse("data.decay_mixture", data.decay_mixture)))
    directories: dict[str, str] = {}
    for part in itertools.chain(*(plan.parts for plan in found)):
        if directories.setdefault(part.name, part.directory) != part.directory:
            raise ConfigError(
                f"data.decay_mixture has {part.name}={part.directory}; {part.name} is "
                f"{directories[part.name]} before the decay: use another name"
            )
    return tuple(found)


def pattern(weights: Sequence[Fraction]) -> np.ndarray:
    """Indices of the corpora of one period of rows, for weights that sum to 1."""
    period = math.lcm(*(weight.denominator for weight in weights))
    counts = [int(weight * period) for weight in weights]
    done = [0] * len(counts)
    rows = np.zeros(period, np.int64)
    for row in range(period):
        # Row i of a corpus is due from floor(i / weight) on, and before ceil((i + 1) / weight).
        due = [
            (-(-(i + 1) * period // count), k)
            for k, (i, count) in enumerate(zip(done, counts, strict=True))
            if i * period < (row + 1) * count
        ]
        _, rows[row] = min(due)
        done[rows[row]] += 1
    return rows


class _Stage:
    """Counts rows of a stage: `before[r, k]` of the first r rows of a period are of corpus k."""

    def __init__(self, plan: Plan):
        self.names = [part.name for part in plan.parts]
        self.pattern = pattern([part.weight for part in plan.parts])
        each = self.pattern[:, None] == np.arange(len(self.names))
        self.before = np.concatenate([np.zeros((1, len(self.names)), np.int64), each.cumsum(0)])

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """How many of the first `rows` rows are of each corpus, [..., corpus]."""
        periods, rest = np.divmod(rows, len(self.pattern))
        return periods[..., None] * self.before[-1] + self.before[rest]


class Mixture:
    """The corpus, and the place in its sequence, of each row of a run.

    Args:
      plans: the stages, from `plans`.
      splits: the text of each corpus by its name.
      batch_size: rows of a step.
    """

    def __init__(self, plans: Sequence[Plan], splits: Mapping[str, Split], batch_size: int):
        self.splits = dict(splits)
        self._batch_size = batch_size
        self._stages = [_Stage(plan) for plan in plans]
        self._begins = [plan.begin * batch_size for plan in plans]

    @classmethod
    def of(cls, split: Split, batch_size: int) -> "Mixture":
        """All rows from one split."""
        plan = Plan(0, (Part("corpus", "", Fraction(1)),))
        return cls([plan], {"corpus": split}, batch_size)

    def place(self, step: int, rows: Sequence[int] | np.ndarray) -> list[tuple[str, int]]:
        """The corpus of each row of a step, and which row of that corpus it is, from 0."""
        first = step * self._batch_size
        at = max(i for i, begin in enumerate(self._begins) if begin <= first)
        stage, earlier = self._stages[at], self._counts(self._begins[at])
        numbers = first + np.asarray(rows, np.int64) - self._begins[at]
        corpora = stage.pattern[numbers % len(stage.pattern)]
        indices = stage.counts(numbers)[np.arange(len(numbers)), corpora]
        names = [stage.names[k] for k in corpora]
        return [
            (name, int(index) + earlier.get(name, 0))
            for name, index in zip(names, indices, strict=True)
        ]

    def counts(self, step: int) -> dict[str, int]:
        """The number of rows of each corpus in the first `step` steps."""
        return dict.fromkeys(self.splits, 0) | self._counts(step * self._batch_size)

    def _counts(self, rows: int) -> dict[str, int]:
        total: dict[str, int] = {}
        ends = [*self._begins[1:], rows]
        for stage, begin, end in zip(self._stages, self._begins, ends, strict=True):
            length = np.array(max(min(end, rows) - begin, 0))
            for name, count in zip(stage.names, stage.counts(length), strict=True):
                total[name] = total.get(name, 0) + int(count)
        return total
