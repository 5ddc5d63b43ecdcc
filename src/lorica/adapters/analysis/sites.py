"""What an adapter does to each weight: the shape and the size of its change, site by site and in groups.

In: an adapter over its backbone, or over an outline that has shapes alone. Out: plain records, and for sites that
cannot be measured the reason. Refuses to know files, how records are shown, and what is normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.analysis.spectrum import (
    count_for,
    effective_rank,
    numerical_rank,
    participation_ratio,
    parts_of,
    stable_rank,
)
from lorica.adapters.layout import GLOBAL
from lorica.adapters.merging.change import Change, change_from
from lorica.adapters.outline import Outline
from lorica.core.errors import MissingError
from lorica.core.site import Site
from lorica.core.update import LinearUpdate, SoftPrompt
from lorica.models.backbone import Backbone

Reason = Literal["not finite", "needs the base", "changes no weight"]


@dataclass(frozen=True, slots=True)
class Unread:
    """A site without measures: why, and in words what was found there."""

    site: str
    reason: Reason
    says: str


@dataclass(frozen=True, slots=True)
class SiteMeasures:
    """The change ΔW of one site's weight, with singular values σ (descending).

    Attributes:
        site, kind, role, layer, shape: which weight.
        factored: whether ΔW is a product of factors; its spectrum then cost r² instead of the weight's size.
        rank: the own rank: how many directions the adapter has there; of a dense change the most that fit.
        moving: directions with σ above 1e-6 σ₁.
        effective_rank, stable_rank, participation_ratio: see `spectrum`. k90: the smallest k that holds 90 % of Σσ².
        rank_use: effective rank over own rank.
        norm: ‖ΔW‖, Frobenius. rms: norm / √(out · in). relative: norm / ‖W₀‖, None without the base.
        energy: share of this site of the Σ‖ΔW‖² of the whole adapter.
        bias: norm of the change of the bias.
        singular_values: σ; empty for a norm, whose change is a vector: its ranks are 0 then.
    """

    site: str
    kind: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    factored: bool
    rank: int
    moving: int
    effective_rank: float
    stable_rank: float
    participation_ratio: float
    k90: int
    rank_use: float
    norm: float
    rms: float
    relative: float | None
    energy: float
    bias: float
    singular_values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class GroupMeasures:
    """Sites of one layer or of one role together: sums of energy, means of the rest over those with a spectrum.

    `norm` is the root of Σ‖ΔW‖²; `relative` and `largest` are the mean and the largest ‖ΔW‖ / ‖W₀‖ of a site.
    """

    name: str
    sites: int
    norm: float
    energy: float
    relative: float | None
    largest: float | None
    effective_rank: float | None
    rank_use: float | None
    k90: float | None


def changes_of(adapter: Adapter, backbone: Backbone) -> Iterator[tuple[Site, Change | Unread]]:
    """Every site's change in float64, one at a time in backbone order, or why there is none to be measured."""
    for name, site in adapter.layout.sites.items():
        yield site, change_at(adapter, backbone, name)


@torch.no_grad()
def change_at(adapter: Adapter, backbone: Backbone, name: str) -> Change | Unread:
    """The change of one adapted site in float64, or why there is none to be measured."""
    wrong = _not_finite(adapter, name)
    if wrong:
        return Unread(name, "not finite", wrong)
    weight = backbone.weight(name)
    try:
        update = adapter.update(name, weight)
        if not isinstance(update, LinearUpdate):
            what = "virtual tokens" if isinstance(update, SoftPrompt) else "keys and values"
            return Unread(name, "changes no weight", f"it adds {what}")
        change = change_from(update, weight, backbone.bias(name))
    except MissingError as error:
        if not isinstance(backbone, Outline):
            raise
        return Unread(name, "needs the base", str(error))
    parts = [*parts_of(change), *([] if change.bias_O is None else [change.bias_O])]
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        return Unread(name, "not finite", "its values are finite, and the change that they make is not")
    return change


def _not_finite(adapter: Adapter, name: str) -> str:
    """Which of a site's tensors, or of those that all sites share, hold NaN or infinity, and how many."""
    found = []
    for owner in (name, GLOBAL):
        for param, value in adapter.values(owner).items():
            nan, inf = int(value.isnan().sum()), int(value.isinf().sum())
            if nan or inf:
                counts = [f"{count:,} {word}" for count, word in ((nan, "NaN"), (inf, "infinite")) if count]
                where = f"{param} (shared by all sites)" if owner == GLOBAL else param
                found.append(f"{' and '.join(counts)} of {value.numel():,} values of {where}")
    return "; ".join(found)


@torch.no_grad()
def measure_sites(adapter: Adapter, backbone: Backbone) -> tuple[tuple[SiteMeasures, ...], tuple[Unread, ...]]:
    """The measures of every site whose change can be had, and the others with the reason.

    Time: (in + out) r² a factored site; a dense change is one singular value decomposition of the weight's size.
    """
    found: list[SiteMeasures] = []
    unread: list[Unread] = []
    for site, change in changes_of(adapter, backbone):
        if isinstance(change, Unread):
            unread.append(change)
        else:
            size = None if isinstance(backbone, Outline) else base_norm(backbone, site.name)
            found.append(_measure(site, change, size))
    whole = math.fsum(m.norm**2 for m in found)
    return tuple(replace(m, energy=m.norm**2 / whole if whole else 0.0) for m in found), tuple(unread)


def base_norm(backbone: Backbone, site: str) -> float:
    """‖W₀‖, Frobenius, of a site's frozen weight."""
    return float(backbone.weight(site).row_square_norm().double().sum().sqrt())


def _measure(site: Site, change: Change, size: float | None) -> SiteMeasures:
    matrix = len(site.shape) > 1
    values = change.singular_values() if matrix and change.rank else torch.zeros(0, dtype=torch.float64)
    norm = float(values.norm() if matrix else change.matrix().norm())
    rank = min(change.rank, *change.sides) if matrix else 0
    effective = effective_rank(values)
    return SiteMeasures(
        site=site.name,
        kind=site.kind,
        role=site.role,
        layer=site.layer,
        shape=site.shape,
        factored=change.factored,
        rank=rank,
        moving=numerical_rank(values),
        effective_rank=effective,
        stable_rank=stable_rank(values),
        participation_ratio=participation_ratio(values),
        k90=count_for(values),
        rank_use=effective / rank if rank else 0.0,
        norm=norm,
        rms=norm / math.sqrt(math.prod(site.shape)),
        relative=None if size is None else _ratio(norm, size),
        energy=0.0,
        bias=0.0 if change.bias_O is None else float(change.bias_O.norm()),
        singular_values=tuple(_floats(values)),
    )


def _ratio(norm: float, size: float) -> float:
    """`norm / size`; of a weight of zeros, 0 where nothing changes and infinite elsewhere."""
    return norm / size if size else (math.inf if norm else 0.0)


def _floats(values: Tensor) -> list[float]:
    found: list[float] = values.tolist()
    return found


def by_role(sites: Sequence[SiteMeasures]) -> tuple[GroupMeasures, ...]:
    """Sites grouped by the last part of their name (`q_proj`), in order of appearance."""
    return _grouped(sites, lambda m: m.role)


def by_layer(sites: Sequence[SiteMeasures]) -> tuple[GroupMeasures, ...]:
    """Sites grouped by layer; those outside blocks are under `-`, last."""
    ordered = sorted(sites, key=lambda m: math.inf if m.layer is None else m.layer)
    return _grouped(ordered, lambda m: "-" if m.layer is None else str(m.layer))


def _grouped(sites: Sequence[SiteMeasures], key: Callable[[SiteMeasures], str]) -> tuple[GroupMeasures, ...]:
    groups: dict[str, list[SiteMeasures]] = {}
    for site in sites:
        groups.setdefault(key(site), []).append(site)
    return tuple(_group(name, members) for name, members in groups.items())


def _group(name: str, members: Sequence[SiteMeasures]) -> GroupMeasures:
    relative = [m.relative for m in members if m.relative is not None]
    ranked = [m for m in members if m.rank]
    return GroupMeasures(
        name=name,
        sites=len(members),
        norm=math.sqrt(math.fsum(m.norm**2 for m in members)),
        energy=math.fsum(m.energy for m in members),
        relative=_mean(relative),
        largest=max(relative, default=None),
        effective_rank=_mean([m.effective_rank for m in ranked]),
        rank_use=_mean([m.rank_use for m in ranked]),
        k90=_mean([float(m.k90) for m in ranked]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
