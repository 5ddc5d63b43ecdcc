"""Several adapters made into one by a rule, site by site.

In: adapters over one backbone, a rule, weights. Out: an adapter and a report. One site's changes are in float64 at a
time, however many sites there are; a rule that surveys all sites reads them as often as it needs. A parent that does
not act at a site changes nothing there. Refuses to know files and what the rules do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.assemble import assemble
from lorica.adapters.export.decompose import TOLERANCE, cut
from lorica.adapters.lineage import Parent
from lorica.adapters.merging.base import Merging, SiteChanges
from lorica.adapters.merging.change import Change, change_of
from lorica.adapters.merging.checks import Weights, check_parents, weights_by_site
from lorica.adapters.merging.provenance import beneath, origins_of, weighed
from lorica.adapters.parents import merged
from lorica.core.errors import FormatError, MergeError
from lorica.models.backbone import Backbone


@dataclass(frozen=True, slots=True)
class CombineReport:
    """What a merge made.

    Attributes:
        how: the rule's name. settings: its parameters. parents: their names.
        weights: of each parent; None where they differ from site to site.
        sites: that the result changes. factored: of these, those with factors. parameters: of the result.
        lowest, highest: ranks of the factors; 0 where there are none.
        lost: largest share of a site's change, `Σσ²(cut) / Σσ²(all)`, that was cut away; worst: that site, or ''.
    """

    how: str
    settings: Mapping[str, object]
    parents: tuple[str, ...]
    weights: tuple[float, ...] | None
    sites: int
    factored: int
    parameters: int
    lowest: int
    highest: int
    lost: float
    worst: str

    def __str__(self) -> str:
        ranks = f"rank {self.lowest}" if self.lowest == self.highest else f"ranks {self.lowest} to {self.highest}"
        dense = self.sites - self.factored
        forms = [f"factors of {ranks} at {_sites(self.factored)}"] if self.factored else []
        forms += [f"dense changes at {_sites(dense)}"] if dense else []
        cut_away = (
            f"; up to {self.lost:.1%} of a site's change was cut away (at {self.worst})"
            if self.lost > TOLERANCE
            else ""
        )
        parents = f"{len(self.parents)} adapters" if len(self.parents) > 1 else "1 adapter"
        return f"{parents} by {self.how}: {' and '.join(forms)}, {self.parameters:,} parameters{cut_away}."


def _sites(count: int) -> str:
    return "1 site" if count == 1 else f"{count:,} sites"


class _Sites:
    """All sites that any parent adapts, in backbone order; every reading computes them anew, one at a time."""

    def __init__(
        self, parents: Sequence[Adapter], backbone: Backbone, weights: Mapping[str, tuple[float, ...]]
    ) -> None:
        self.parents, self.backbone, self.weights = parents, backbone, weights

    def __iter__(self) -> Iterator[SiteChanges]:
        for name, weights in self.weights.items():
            found = [change_of(parent, self.backbone, name) for parent in self.parents]
            shape, device = self._like(found)
            changes = tuple(Change.nothing(shape, device) if change is None else change for change in found)
            yield SiteChanges(self.backbone.sites[name], changes, weights)

    @staticmethod
    def _like(found: Sequence[Change | None]) -> tuple[tuple[int, ...], torch.device]:
        first = next(change for change in found if change is not None)
        return first.shape, first.device


@torch.no_grad()
def combine(
    parents: Sequence[Adapter],
    backbone: Backbone,
    rule: Merging,
    weights: Weights = None,
    *,
    name: str = "merged",
    rank: int | None = None,
    other_base: bool = False,
    origins: Sequence[Parent] | None = None,
) -> tuple[Adapter, CombineReport]:
    """One adapter that does at every site what the rule makes of the parents' changes there, computed in float64.

    Factors are kept as LoRA, dense changes exactly as `delta`, of a bias alone as `bias`, rounded once: to float32 or
    the widest dtype of the parents. What has more ranks than `rank`, or than a site can have, is cut by singular
    values. Parents may differ in method, rank and sites. Memory: one site in float64, and the result, twice at the end.

    Args:
        parents: one or more adapters of this backbone.
        rule: e.g. `make_merging("ties", density=0.3)`.
        weights: a number for each parent, or such a list by site; None is 1 each, or 1/N where the rule says so.
        name: of the result. rank: most ranks a site may keep; norms and biases are never cut.
        other_base: take parents that name another base, as after training beside quantised weights.
        origins: who the parents are for the result's lineage; None is their folders, where these hold the same.

    Raises: MergeError where the rule cannot combine what it is given; MismatchError for another base; ConfigError for
    weights or a rank that do not fit; FormatError for values that are not finite.
    """
    check_parents(parents, backbone, rank, other_base=other_base)
    union = [site for site in backbone.sites if any(site in parent.layout.sites for parent in parents)]
    shares = weights_by_site(rule, parents, union, weights)
    own = None if isinstance(weights, Mapping) else next(iter(shares.values()))
    known = origins_of(parents, backbone, own) if origins is None else weighed(origins, own)
    below = beneath(parents, known)
    kept, lost = _computed(rule, _Sites(parents, backbone, shares), rank, _dtype(parents))
    if not kept:
        raise MergeError("The merged adapter would change nothing: no parent changes a weight or a bias.")
    ranks = [change.rank for change in kept.values() if change.factored and change.rank]
    sites, base = len(kept), backbone.fingerprint()
    dtype, device = _dtype(parents), backbone.device
    made = assemble(name, kept, backbone.sites, seed=parents[0].seed, base=base, dtype=dtype, device=device)
    settings = rule.model_dump(mode="json")
    merged(made, backbone, (*below, *known), rule.name, settings if rank is None else {**settings, "rank": rank})
    worst = max(lost, key=lambda site: lost[site])
    return made, CombineReport(
        how=rule.name,
        settings=settings,
        parents=tuple(parent.name for parent in parents),
        weights=own,
        sites=sites,
        factored=len(ranks),
        parameters=made.layout.trainable_count(),
        lowest=min(ranks, default=0),
        highest=max(ranks, default=0),
        lost=lost[worst],
        worst=worst if lost[worst] else "",
    )


def _computed(
    rule: Merging, sites: Iterable[SiteChanges], rank: int | None, dtype: torch.dtype
) -> tuple[dict[str, Change], dict[str, float]]:
    """The combined changes by site, as they are kept, and the shares that were cut."""
    survey = rule.survey(sites)
    kept: dict[str, Change] = {}
    lost: dict[str, float] = {}
    for item in sites:
        change, lost[item.site.name] = _shrunk(_merged(rule, item, survey), rank)
        if change is not None:
            kept[item.site.name] = _rounded(change, dtype)
    return kept, lost


def _dtype(parents: Sequence[Adapter]) -> torch.dtype:
    dtype = torch.float32
    for parent in parents:
        dtype = torch.promote_types(dtype, parent.flat.dtype)
    return dtype


def _merged(rule: Merging, item: SiteChanges, survey: object) -> Change:
    change = rule.merge(item.site, item.changes, item.weights, survey)
    parts = (change.A_RI, change.B_OR, change.matrix_OI, change.bias_O)
    if not all(bool(torch.isfinite(part).all()) for part in parts if part is not None):
        raise FormatError(
            f"{rule.name!r} gives values that are not finite at site {item.site.name!r}.",
            hint="Smaller weights may help.",
        )
    return change


def _shrunk(change: Change, rank: int | None) -> tuple[Change | None, float]:
    """The change as it is kept, and the share that was cut; None where it is nothing at all."""
    if change.factored and not change.rank:
        return (None if change.bias_O is None else change), 0.0
    if len(change.shape) == 1:
        return Change.of_dense(change.shape, change.matrix(), change.bias_O), 0.0
    limit = min(change.sides)
    if rank is None and (not change.factored or change.rank <= limit):
        return change, 0.0
    found = cut(change, rank, TOLERANCE)
    return Change.of_factors(change.shape, found.A_RI, found.B_OR, bias_O=change.bias_O), found.lost


def _rounded(change: Change, dtype: torch.dtype) -> Change:
    """As the adapter will hold it, with the scale in B; sharing no memory with the parents."""

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype, copy=True)

    if change.factored and change.rank:
        A_RI, B_OR = change.factors()
        return Change.of_factors(
            change.shape, A_RI.to(dtype, copy=True), (change.scale * B_OR).to(dtype), 1.0, cast(change.bias_O)
        )
    return replace(change, matrix_OI=cast(change.matrix_OI), bias_O=cast(change.bias_O))
