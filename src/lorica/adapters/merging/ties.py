"""TIES: trim each parent, elect a sign for every entry, average what agrees with it.

In: aligned tensors. Out: one. Two published versions differ in how they trim and in the sign of a tie; both are here.
Over the whole model, thresholds come from a first reading of all sites. Refuses to know factors and sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorica.adapters.merging.base import SiteChanges
from lorica.adapters.merging.entrywise import OnEither, Part
from lorica.adapters.merging.selection import Selection
from lorica.adapters.merging.tensors import keep_from, keep_largest, threshold_for, whole
from lorica.core.site import Site
from lorica.methods.base import Paper

Elect = Literal["total", "frequency", "majority"]
Trim = Literal["count", "threshold"]


@dataclass(frozen=True, slots=True)
class Survey:
    """What all sites together say: a threshold for each parent, and the sign that most entries' sums have (±1)."""

    thresholds: tuple[float, ...]
    majority: int


def trimmed(tensor: Tensor, density: float, trim: Trim = "count") -> Tensor:
    """The largest entries: exactly `⌊density n⌋`, or those from the `⌊(1 − density) n⌋`-th smallest on (one more)."""
    return keep_largest(tensor, density) if trim == "count" else keep_from(tensor, threshold_for(tensor, density))


def elect_signs(stacked: Tensor, elect: Elect = "total", majority: int | None = None) -> Tensor:
    """The sign of every entry of [N, …]: of the sum, or with `frequency` of the sum of signs.

    A sum of zero counts as plus; with `majority`, as the sign that most entries' sums have, which is counted here
    where it is not given.
    """
    votes = (stacked.sign() if elect == "frequency" else stacked).sum(0)
    if elect != "majority":
        return torch.where(votes >= 0, 1.0, -1.0).to(stacked)
    tie = majority_sign(votes) if majority is None else majority
    return torch.where(votes == 0, float(tie), votes.sign())


def majority_sign(votes: Tensor) -> int:
    """+1 or −1, whichever more entries have; +1 where as many have either."""
    return 1 if float(votes.sign().sum()) >= 0 else -1


def disjoint_mean(stacked: Tensor, weights: Sequence[float], signs: Tensor) -> Tensor:
    """`Σ w_n T_n / count` over the parents whose entry has the elected sign; their count, not the sum of weights."""
    agrees = stacked.sign() == signs
    weights_N = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)
    total = (stacked * agrees * weights_N.view(-1, *(1,) * (stacked.ndim - 1))).sum(0)
    return total / agrees.sum(0).clamp(min=1)


def ties(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    density: float = 0.2,
    *,
    elect: Elect = "total",
    trim: Trim = "count",
    survey: Survey | None = None,
) -> Tensor:
    """TIES of aligned tensors; with a survey, its thresholds and majority. Signs are elected before weighting."""
    if survey is None:
        kept = [trimmed(tensor, density, trim) for tensor in tensors]
    else:
        kept = [keep_from(tensor, least) for tensor, least in zip(tensors, survey.thresholds, strict=True)]
    stacked = torch.stack(kept)
    return disjoint_mean(stacked, weights, elect_signs(stacked, elect, None if survey is None else survey.majority))


class Ties(OnEither):
    """`ΔW = λ · mean over { n : sign(top(ΔW_n)) = elected sign } of w_n top(ΔW_n)`, entry by entry. arXiv 2306.01708.

    PEFT's version is the default: exactly `⌊density n⌋` entries of each tensor stay, and a sum of zero counts as plus.
    The paper's own code is `elect=majority`, `trim=threshold`, `scope=global`: one threshold for the whole model, and a
    sum of zero takes the sign that most entries of the whole model have. With `scope=global`, entries equal to the
    threshold all stay. All sites are then read three times or more before the merge; memory is that of one site.
    """

    name: ClassVar[str] = "ties"
    summary: ClassVar[str] = "trim, elect a sign for each entry, average what agrees"
    paper: ClassVar[Paper | None] = Paper(
        "TIES-Merging: Resolving Interference When Merging Models", "NeurIPS 2023", "2306.01708"
    )

    density: float = Field(0.2, gt=0, le=1, description="share of the entries that stays after trimming")
    elect: Elect = Field(
        "total",
        description="whose sign wins: `total` (sum of entries), `frequency` (count of signs), `majority` (sum; zeros "
        "take the sign that most entries have)",
    )
    trim: Trim = Field(
        "count", description="`count` keeps exactly that share, `threshold` from its threshold on (one more)"
    )
    scope: Literal["tensor", "global"] = Field(
        "tensor", description="what the share is of: each `tensor`, or all of the adapter (`global`)"
    )
    scale: float = Field(1.0, description="λ, on the result")

    def factor_of(self) -> float:
        return self.scale

    def survey(self, sites: Iterable[SiteChanges]) -> Survey | None:
        if self.scope == "tensor":
            return None
        sizes = [(part.tensors[0].numel(), len(part.tensors)) for part in self._all_parts(sites)]
        if not sizes:
            return None
        total, parents = sum(size for size, _ in sizes), sizes[0][1]
        # as many stay from this one on as `trim` says
        k = whole(1 - self.density, total) if self.trim == "threshold" else total - whole(self.density, total) + 1
        searches = [Selection(k) for _ in range(parents)]
        while any(search.value is None for search in searches):
            for part in self._all_parts(sites):
                for search, tensor in zip(searches, part.tensors, strict=True):
                    search.add(tensor.abs())
            for search in searches:
                search.settle()
        thresholds = tuple(float(search.value or 0.0) for search in searches)
        balance = 0
        for part in self._all_parts(sites) if self.elect == "majority" else ():
            kept = [keep_from(tensor, least) for tensor, least in zip(part.tensors, thresholds, strict=True)]
            balance += int(torch.stack(kept).sum(0).sign().sum())
        return Survey(thresholds, 1 if balance >= 0 else -1)

    def _all_parts(self, sites: Iterable[SiteChanges]) -> Iterable[Part]:
        for item in sites:
            yield from self.parts(item.site, item.changes, item.weights)

    def entries(self, part: Part, site: Site, survey: Any) -> Tensor:
        return ties(part.tensors, part.weights, self.density, elect=self.elect, trim=self.trim, survey=survey)
