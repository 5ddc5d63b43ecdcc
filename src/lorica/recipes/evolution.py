"""Evolutionary search over the GLoRA configurations of several sites, within a budget of trained parameters.

In: sites, a rank, settings, and any function that scores a configuration. Out: the best one, and how the search went.
It is a function of its seed and of the scores, so that a search whose scores are kept resumes exactly. Refuses to know
models, data and how a score comes about.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import Field, model_validator

from lorica.core.config import Config
from lorica.core.errors import ConfigError
from lorica.core.glora_choices import OPTIONS, Choice
from lorica.core.site import Site

Genome = tuple[Choice, ...]
"""One choice for each site, in the order of the sites."""
TRIES = 10
"""Attempts at each new candidate, on average, before a generation takes fewer of a kind."""


class EvolutionConfig(Config):
    """The settings of GLoRA's search (arXiv 2306.07967), with the published defaults."""

    population: int = Field(50, ge=1, description="candidates of one generation")
    keep: int = Field(10, ge=1, description="best candidates so far, which the next generation descends from")
    mutations: int = Field(25, ge=0, description="candidates made from one of these by drawing options anew")
    crossovers: int = Field(25, ge=0, description="candidates that take each option from one of two of these")
    mutate: float = Field(0.2, ge=0, le=1, description="share of options that a mutation draws anew")
    generations: int = Field(20, ge=1, description="generations, the first of which is random")
    smallest: int = Field(1, ge=1, description="fewest trained parameters of a candidate")
    largest: int | None = Field(None, ge=1, description="most trained parameters of a candidate")
    seed: int = Field(0, ge=0, description="seed of the search")

    @model_validator(mode="after")
    def _fits(self) -> EvolutionConfig:
        if self.mutations + self.crossovers > self.population:
            raise ConfigError(
                f"{self.mutations} mutations and {self.crossovers} crossovers are more than a population of "
                f"{self.population}."
            )
        if self.largest is not None and self.smallest > self.largest:
            raise ConfigError(f"No configuration has at least {self.smallest} and at most {self.largest} parameters.")
        return self


@dataclass(frozen=True, slots=True)
class Scored:
    """A configuration, its score (higher is better) and the parameters that it trains."""

    genome: Genome
    score: float
    parameters: int


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search: the best configurations, best first, and the best score after each generation."""

    top: tuple[Scored, ...]
    history: tuple[float, ...]
    evaluated: int

    @property
    def best(self) -> Scored:
        return self.top[0]


class Evolution:
    """One search. Its candidates never repeat, and every one is within the budget.

    Raises ConfigError where no configuration of these sites is.
    """

    def __init__(self, config: EvolutionConfig, sites: Sequence[Site], rank: int) -> None:
        self.config = config
        self.sites = tuple(sites)
        self.rank = rank
        # without a bias D scales nothing: configurations that differ in it alone are one
        self._options = [OPTIONS if site.bias else OPTIONS | {"D": ("none",)} for site in self.sites]
        self._rng = random.Random(f"glora search {config.seed}")
        self._seen: set[Genome] = set()
        self._sizes: dict[tuple[tuple[int, ...], bool, Choice], int] = {}
        high = self.parameters((Choice("lora", "lora", "lora", "vector", "vector"),) * len(self.sites))
        if config.smallest > high:
            raise ConfigError(
                f"Configurations of these {len(self.sites)} sites train at most {high:,} parameters at rank {rank}; "
                f"none has {config.smallest:,}."
            )

    def parameters(self, genome: Genome) -> int:
        """The parameters that a configuration trains."""
        total = 0
        for site, choice in zip(self.sites, genome, strict=True):
            key = (site.shape, site.bias, choice)
            if key not in self._sizes:
                self._sizes[key] = choice.trained(site, self.rank)
            total += self._sizes[key]
        return total

    def excess(self, genome: Genome) -> int:
        """How many parameters a configuration is outside the budget; 0 inside."""
        config, size = self.config, self.parameters(genome)
        over = 0 if config.largest is None else size - config.largest
        return max(0, over, config.smallest - size)

    def random(self) -> Genome:
        """A configuration drawn uniformly; where that is outside the budget, walked into it by single options.

        Of narrow budgets, which hardly any draw would meet, the walk's configurations are not uniform.
        """
        genome = tuple(Choice(*map(self._rng.choice, options.values())) for options in self._options)
        far = self.excess(genome)
        for _ in range(1000 * len(self.sites)):
            if not far:
                return genome
            at, letter = self._rng.randrange(len(self.sites)), self._rng.choice(list(OPTIONS))
            changed = genome[at]._replace(**{letter: self._rng.choice(self._options[at][letter])})
            other = (*genome[:at], changed, *genome[at + 1 :])
            distance = self.excess(other)
            if distance <= far:
                genome, far = other, distance
        raise ConfigError(
            f"No configuration of these {len(self.sites)} sites was found within {self.config.smallest:,} to "
            f"{self.config.largest or 'any number of'} parameters; a wider budget is right."
        )

    def mutated(self, parent: Genome) -> Genome:
        """Each option of each site drawn anew with probability `mutate`."""
        rng, p = self._rng, self.config.mutate
        return tuple(
            Choice(*(rng.choice(o) if rng.random() < p else word for o, word in zip(own.values(), c, strict=True)))
            for own, c in zip(self._options, parent, strict=True)
        )

    def crossed(self, one: Genome, two: Genome) -> Genome:
        """Each option of each site from either parent."""
        return tuple(
            Choice(*(self._rng.choice(pair) for pair in zip(a, b, strict=True))) for a, b in zip(one, two, strict=True)
        )

    def generation(self, parents: Sequence[Genome]) -> list[Genome]:
        """The next candidates: mutations, crossovers, and random ones up to the population; of none, all random."""
        config, rng = self.config, self._rng
        fresh: list[Genome] = []
        if parents:
            self._add(fresh, config.mutations, lambda: self.mutated(rng.choice(parents)))
            self._add(fresh, config.crossovers, lambda: self.crossed(rng.choice(parents), rng.choice(parents)))
        self._add(fresh, config.population - len(fresh), self.random)
        return fresh

    def _add(self, fresh: list[Genome], count: int, make: Callable[[], Genome]) -> None:
        """Up to `count` candidates that are new and within the budget."""
        wanted = len(fresh) + count
        for _ in range(TRIES * count):
            if len(fresh) == wanted:
                return
            genome = make()
            if genome not in self._seen and not self.excess(genome):
                self._seen.add(genome)
                fresh.append(genome)

    def run(self, score: Callable[[Genome], float], told: Callable[[int, Scored], None] | None = None) -> Found:
        """All generations. `told` hears the number of each and the best so far. A score of NaN counts as −∞."""
        top: list[Scored] = []
        history: list[float] = []
        for number in range(1, self.config.generations + 1):
            candidates = self.generation([one.genome for one in top[: self.config.keep]])
            if not candidates:  # every configuration within the budget has been seen
                break
            for genome in candidates:
                value = score(genome)
                top.append(Scored(genome, -math.inf if math.isnan(value) else value, self.parameters(genome)))
            # stable, so that of equals the earlier one stays ahead
            top = sorted(top, key=lambda one: -one.score)[: max(self.config.population, self.config.keep)]
            history.append(top[0].score)
            if told is not None:
                told(number, top[0])
        return Found(tuple(top), tuple(history), len(self._seen))
