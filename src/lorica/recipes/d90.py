"""d90: the fewest directions in which training reaches 90 % of full fine-tuning's metric.

In: any function that trains in d directions with a learning rate and returns a metric; a grid. Out: a row for each
dimension with its best learning rate, and the smallest that is enough. Refuses to know models, data and how training
goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import Field, field_validator, model_validator

from lorica.core.config import Config
from lorica.core.errors import ConfigError, MethodError
from lorica.recipes.compare.config import checked_rates

Train = Callable[[int | None, float, int], float]
"""Trains in so many directions (None: every weight) with a learning rate and a seed; returns a metric, higher being
better. A run that fails to converge returns NaN or −∞.
"""


class GridConfig(Config):
    """What a search for d90 tries."""

    smallest: int = Field(10, ge=1, description="smallest dimension of the grid")
    largest: int = Field(10_000, ge=1, description="largest dimension of the grid")
    per_decade: int = Field(4, ge=1, description="dimensions between one power of ten and the next")
    refinements: int = Field(0, ge=0, description="dimensions tried between the first that is enough and the one below")
    whole: bool = Field(False, description="try all dimensions, and do not stop at the first that is enough")
    rates: tuple[float, ...] = Field(
        (3e-3, 1e-2, 3e-2, 1e-1), description="learning rates in the subspace, tuned for each dimension"
    )
    full_rates: tuple[float, ...] = Field(
        (1e-4, 3e-4, 1e-3, 3e-3), description="learning rates of full fine-tuning, which is tuned too"
    )
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="a metric is the mean over these seeds")
    threshold: float = Field(0.9, gt=0, description="share of full fine-tuning's metric that is enough")

    @field_validator("rates", "full_rates")
    @classmethod
    def _rates(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(checked_rates(value)))

    @model_validator(mode="after")
    def _ordered(self) -> GridConfig:
        if self.smallest > self.largest:
            raise ConfigError(f"The grid's smallest dimension {self.smallest} is above its largest, {self.largest}.")
        return self

    def dimensions(self) -> list[int]:
        """The grid, ascending and evenly spaced in the logarithm; both ends belong to it."""
        count = max(1, math.ceil(self.per_decade * math.log10(self.largest / self.smallest)))
        ratio = self.largest / self.smallest
        return sorted({round(self.smallest * ratio ** (i / count)) for i in range(count + 1)})


@dataclass(frozen=True, slots=True)
class Tuned:
    """The best of the learning rates that were tried for a dimension (None: full fine-tuning)."""

    dimension: int | None
    metric: float
    lr: float
    tried: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """d90, or None where no dimension of the grid is enough; the rows that say so, ascending; and the metric wanted."""

    d90: int | None
    target: float
    full: Tuned
    rows: tuple[Tuned, ...]


def search_d90(train: Train, config: GridConfig, told: Callable[[Tuned], None] | None = None) -> Found:
    """The smallest dimension of the grid whose tuned metric is at least `threshold` times full fine-tuning's.

    Learning rates are climbed: from the best one of the dimension before (the middle one at first) to its neighbours
    as long as they are better. Raises MethodError unless full fine-tuning's metric is positive: a share of it would
    say nothing.
    """
    told = told or (lambda row: None)
    full = _tuned(train, None, config.full_rates, config.seeds, len(config.full_rates) // 2)
    told(full)
    if not full.metric > 0 or math.isinf(full.metric):
        raise MethodError(
            f"Full fine-tuning reaches a metric of {full.metric:g}, of which no share can be a target.",
            hint="Train longer, try other `full_rates`, or measure something that is positive.",
        )
    target, start = config.threshold * full.metric, len(config.rates) // 2
    rows: list[Tuned] = []

    def enough(dimension: int) -> bool:
        nonlocal start
        row = _tuned(train, dimension, config.rates, config.seeds, start)
        start = config.rates.index(row.lr)
        rows.append(row)
        told(row)
        return row.metric >= target

    below, first = 0, None
    for dimension in config.dimensions():
        reached = enough(dimension)
        if reached and first is None:
            first = dimension
            if not config.whole:
                break
        below = dimension if first is None else below
    for _ in range(config.refinements if first is not None and below else 0):
        assert first is not None
        middle = round(math.sqrt(below * first))
        if middle in (below, first):
            break
        below, first = (below, middle) if enough(middle) else (middle, first)
    return Found(first, target, full, tuple(sorted(rows, key=lambda row: row.dimension or 0)))


def _tuned(train: Train, dimension: int | None, rates: Sequence[float], seeds: Sequence[int], start: int) -> Tuned:
    """Climb over ascending rates; of equals, the one nearer the start stays."""
    known: dict[int, float] = {}

    def metric(at: int) -> float:
        if at not in known:
            values = [train(dimension, rates[at], seed) for seed in seeds]
            mean = sum(values) / len(values)
            known[at] = -math.inf if math.isnan(mean) else mean
        return known[at]

    best = start
    while True:
        near = [at for at in (best - 1, best + 1) if 0 <= at < len(rates)]
        better = max(near, key=metric, default=best)
        if not metric(better) > metric(best):
            return Tuned(dimension, metric(best), rates[best], tuple(rates[at] for at in sorted(known)))
        best = better
