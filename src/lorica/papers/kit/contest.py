"""The commonest experiment: several methods on one task, each with its own tuned learning rate, compared by quality.

In: settings that name a task; contestants (what names the row, method, rates). Out: `run`, `listed` and `plots`; a
paper adds who competes and how to judge. Refuses to know any method.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from lorica.methods.base import Method
from lorica.papers.base import PaperCheck, Say
from lorica.papers.kit.arena import COLUMNS, OPTIMIZER, Arena, race, rates
from lorica.papers.kit.judging import quality
from lorica.papers.kit.plot import Plot, Series
from lorica.papers.kit.table import Row, Table, Value
from lorica.papers.kit.task import TaskSettings, open_arena
from lorica.training.optimizer import AdamWConfig


@dataclass(frozen=True, slots=True)
class Contestant:
    """A method with settings, what names its rows (all keys but `lr`), and the rates to choose from."""

    key: Row
    method: Method
    lrs: tuple[float, ...]
    optimizer: AdamWConfig = OPTIMIZER

    @property
    def label(self) -> str:
        """`lora, rank 4`: how plots and sentences call it."""
        return label(self.key)


T = TypeVar("T", bound=TaskSettings)


class Contest(PaperCheck[T]):
    """A paper whose experiment is a contest. `keys` are those of the contestants, and `lr` last."""

    columns: ClassVar = COLUMNS
    chosen_by: ClassVar[str] = "validation loss"
    with_base: ClassVar[bool] = False
    """Whether the untrained base is a line too, `{"method": "base"}`."""

    @abstractmethod
    def contestants(self, settings: T) -> Iterable[Contestant]:
        """Who competes. Keys differ; a key's `method` is the registered name, or a word for a variant of it."""

    def run(self, settings: T, seed: int, say: Say) -> list[Row]:
        entries = [
            entry for own in self.contestants(settings) for entry in rates(own.key, own.method, own.lrs, own.optimizer)
        ]
        arena = open_arena(settings, seed)
        base: list[Row] = []
        if self.with_base:
            base.append({"method": "base", **arena.untrained("validation"), **arena.untrained("test")})
        rows = race(arena, entries, steps=settings.steps, seed=seed, say=say)
        return [*base, *({**row, **own} for row, own in zip(rows, self.inspect(settings, arena), strict=True))]

    def inspect(self, settings: T, arena: Arena) -> list[Row]:
        """More columns for each of the arena's adapters, which are trained by now; none unless overridden."""
        return [{} for _ in arena.adapters]

    def listed(self, table: Table) -> Table:
        """Each contestant at the rate with the best mean validation loss."""
        return table.tuned(self.chosen_by, over="lr")

    def plots(self, table: Table) -> tuple[Plot, ...]:
        """Quality over trained parameters, one series for each method; and how each bears other rates."""
        measure = quality(table)
        table = Table([line for line in table if line.key.get("method") != "base"], table.keys)
        best = self.listed(table)
        names = [str(name) for name in table.values("method")]
        found = tuple(best.series(name, "parameters", measure.column, method=name) for name in names)
        dots = tuple(Series(s.label, s.x, s.y, s.spread, "line" if len(s.x) > 1 else "points") for s in found)
        keys = list(dict.fromkeys(tuple((k, v) for k, v in line.key.items() if k != "lr") for line in table))
        tuning = tuple(table.series(label(dict(key)), "lr", self.chosen_by, **dict(key)) for key in keys)
        return (
            Plot("quality over trained parameters", "trained parameters", measure.column, dots, log_x=True),
            Plot("choosing the learning rate", "learning rate", self.chosen_by, tuning, log_x=True, log_y=True),
        )


def label(key: dict[str, Value]) -> str:
    """`lora, rank 4` for {"method": "lora", "rank": 4}."""
    rest = [f"{name} {value}" for name, value in key.items() if name not in ("method", "lr")]
    return ", ".join([str(key.get("method", "")), *rest]).strip(", ")
