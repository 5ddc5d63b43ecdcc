"""What a paper of the index is: citation, claim with published figures, settings at three scales, one experiment.

In: settings and a seed. Out: rows of numbers for that seed, and a judgement of the table that all seeds make.
The framework runs the seeds, aggregates, plots and writes the page. Refuses to know files, terminals and plots' ink.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

from lorica.core.config import Config
from lorica.core.errors import ConfigError, did_you_mean
from lorica.papers.kit.plot import Plot
from lorica.papers.kit.table import Row, Table

Scale = Literal["reduced", "small", "full"]
SCALES: tuple[Scale, ...] = get_args(Scale)
Say = Callable[[str], None]
"""Tells the person who waits what is being done: `say("rank 8, lr 3e-3: loss 0.41")`."""

S = TypeVar("S", bound=Config)


@dataclass(frozen=True, slots=True)
class Figure:
    """One published number: what was measured, the value as printed, and where it was read ('' is the paper)."""

    what: str
    value: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the claim shows in a table, in one sentence with its numbers. None: these settings cannot tell."""

    shows: bool | None
    sentence: str


class PaperCheck(ABC, Generic[S]):
    """One published result and the experiment that checks it. A file of `lorica/papers` holds one subclass.

    The subclass's docstring describes the experiment; the page prints it. Class attributes are the declaration:
    """

    name: ClassVar[str]
    """How the command line and the files call it."""
    title: ClassVar[str]
    authors: ClassVar[str]
    """`Hu et al.`, or all of them."""
    venue: ClassVar[str]
    year: ClassVar[int]
    arxiv: ClassVar[str]
    """Its number; empty where arXiv does not have it, and then `link` says where it is."""
    link: ClassVar[str] = ""
    methods: ClassVar[tuple[str, ...]]
    """Registered methods that it is about; empty where it is about something else."""
    claim: ClassVar[str]
    """What the paper says, in one sentence of ours."""
    figures: ClassVar[tuple[Figure, ...]] = ()
    """What the paper measured."""
    limits: ClassVar[str] = ""
    """What this experiment cannot say."""
    keys: ClassVar[tuple[str, ...]]
    """Columns that name a row (method, rank, width): equal in every seed. All others are measured."""
    columns: ClassVar[Mapping[str, str]]
    """Measured columns → what they are, with their unit."""
    seeds: ClassVar[int] = 3
    """Seeds that a run takes unless told otherwise; more where a seed is cheap and differences are small."""
    revision: ClassVar[int] = 1
    """Raise it when the code of `run` changes what is measured: stored results then count as stale."""

    small: S
    """Minutes on one core, offline; what the page shows."""
    full: S
    """The paper's own scale: real models and data, through the same code."""
    reduced: S
    """Seconds: what the slow test runs."""

    @abstractmethod
    def run(self, settings: S, seed: int, say: Say) -> list[Row]:
        """The experiment for ONE seed. Each row holds some of `keys` and numbers for some of `columns`.

        Train through `lorica.attach` or a `TrainingClient` only. A number that was never reached is infinite, one that
        diverged is NaN; nothing is left out. All randomness comes from `seed`.
        """

    @abstractmethod
    def judge(self, table: Table) -> Verdict:
        """Whether the claim shows, from means and single seeds. A pure function of the table."""

    def cited(self) -> tuple[str, str]:
        """What stands for the paper in a citation, and the address behind it."""
        if self.arxiv:
            return f"arXiv {self.arxiv}", f"https://arxiv.org/abs/{self.arxiv}"
        return self.link.removeprefix("https://"), self.link

    def plots(self, table: Table) -> tuple[Plot, ...]:
        """The panels of the page's picture, as plain data; none is no picture."""
        return ()

    def listed(self, table: Table) -> Table:
        """The part of the table that the page prints (curves are better plotted); all of it unless overridden."""
        return table

    def settings(self, scale: str) -> S:
        """The settings of a scale. Raises ConfigError for an unknown one."""
        if scale not in SCALES:
            raise ConfigError(
                f"There is no scale {scale!r}; it must be one of {', '.join(SCALES)}.{did_you_mean(scale, SCALES)}"
            )
        found: Any = getattr(self, scale)
        settings: S = found
        return settings
