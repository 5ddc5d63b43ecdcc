"""The spectrum of a change of weights: how many directions it moves, and how evenly.

In: singular values, a matrix, an update, or an adapter over its backbone. Out: ranks and counts. A low-rank update is
never multiplied out. Refuses to know files, models' names and data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.merging.change import Change, change_from
from lorica.core.errors import MethodError
from lorica.core.update import LinearUpdate
from lorica.models.backbone import Backbone
from lorica.models.frozen import FrozenWeight

NOTHING = 1e-6
"""Directions whose singular value is up to this share of the largest move nothing: float32 factors cannot tell."""


@dataclass(frozen=True, slots=True)
class Components:
    """How many singular directions of a site's change hold the share of its variance, of `most` that there could be."""

    site: str
    role: str
    layer: int | None
    count: int
    most: int


def effective_rank(values: Tensor) -> float:
    """`exp(−Σ p log p)` with `p = σ / Σσ`: n for n equal singular values; 0 for a change of nothing.

    Roy and Vetterli, EUSIPCO 2007. Raises MethodError for values that are not finite.
    """
    sigma = _checked(values)
    total = sigma.sum()
    return math.exp(float(torch.special.entr(sigma / total).sum())) if total > 0 else 0.0


def stable_rank(values: Tensor) -> float:
    """`Σσ² / σ₁²`; 0 for a change of nothing. Raises MethodError for values that are not finite."""
    share = _shares(values)
    return float(share.sum()) if len(share) else 0.0


def participation_ratio(values: Tensor) -> float:
    """`(Σσ²)² / Σσ⁴`; 0 for a change of nothing. Raises MethodError for values that are not finite."""
    share = _shares(values)
    return float(share.sum().square() / share.square().sum()) if len(share) else 0.0


def numerical_rank(values: Tensor) -> int:
    """How many singular values are above `NOTHING` times the largest."""
    sigma = _checked(values)
    return int((sigma > NOTHING * sigma.max()).sum()) if len(sigma) else 0


def _shares(values: Tensor) -> Tensor:
    """`σ² / σ₁²`, so that neither tiny nor huge changes leave the range of floats; empty for a change of nothing."""
    sigma = _checked(values)
    return (sigma / sigma.max()).square() if len(sigma) and sigma.max() > 0 else sigma[:0]


def _checked(values: Tensor) -> Tensor:
    return _finite(values.detach().double())


def components_for(change: Tensor, share: float = 0.9) -> int:
    """The smallest k with `Σ_{i ≤ k} σᵢ² ≥ share · Σ σᵢ²` for a matrix with singular values σ, descending; 0 for zero.

    A kernel's axes count as inputs. Nothing is centred: the variance is that about zero. Raises MethodError unless
    0 < share ≤ 1 and the change is finite and has two axes or more. Paper: arXiv 2405.09673, which takes 90 %.
    """
    if change.ndim < 2:
        raise MethodError(f"A change of shape {tuple(change.shape)} has no spectrum; it needs rows and columns.")
    return count_for(torch.linalg.svdvals(_finite(change.detach().flatten(1).double())), share)


def count_for(values: Tensor, share: float = 0.9) -> int:
    """The same from the singular values themselves, in any order. Raises MethodError unless 0 < share ≤ 1."""
    if not 0 < share <= 1:
        raise MethodError(f"The share is {share}; above 0 and at most 1 is right.")
    energy = _shares(values).sort(descending=True).values
    if not len(energy):
        return 0
    # what rounding adds to a sum of so many terms must not cost a component
    reached = energy.cumsum(0) >= share * energy.sum() * (1 - 1e-12)
    return int(reached.int().argmax()) + 1


def singular_values(update: LinearUpdate, weight: FrozenWeight) -> Tensor:
    """Singular values of `W' − W₀`, descending, float64; as many as the update can have.

    Factors alone go through QR of both sides and an SVD of their rank: time (in + out) r², no [out, in]. Raises
    MethodError where the change is not finite or the site is a norm, whose change is a vector.
    """
    if len(weight.shape) < 2:
        raise MethodError("A norm's change is a vector and has no spectrum.")
    change = change_from(update, weight)
    for part in parts_of(change):
        _finite(part)
    return change.singular_values()


def parts_of(change: Change) -> tuple[Tensor, ...]:
    """The tensors that a change of a weight consists of, its bias aside."""
    return change.factors() if change.matrix_OI is None else (change.matrix_OI,)


def components_of(adapter: Adapter, backbone: Backbone, share: float = 0.9) -> tuple[Components, ...]:
    """`components_for` at every site whose weight matrix the adapter changes, in backbone order.

    Raises MethodError unless 0 < share ≤ 1, and for an adapter with values that are not finite.
    """
    found = []
    for name, site in adapter.layout.sites.items():
        weight = backbone.weight(name)
        update = adapter.update(name, weight)
        if isinstance(update, LinearUpdate) and len(site.shape) > 1:
            count = count_for(singular_values(update, weight), share)
            found.append(Components(name, site.role, site.layer, count, min(site.shape[0], math.prod(site.shape[1:]))))
    return tuple(found)


def _finite(matrix: Tensor) -> Tensor:
    if not torch.isfinite(matrix).all():
        raise MethodError("The change holds NaN or infinity, so it has no spectrum.")
    return matrix
