"""The spectrum of a change of weights, and how many of its components hold a share of its variance.

In: a matrix, an update, or an adapter over its backbone. Out: singular values and counts. A low-rank update is never
multiplied out. Refuses to know files, models' names and data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.fold import doubled, fold_weight, work_device
from lorica.core.errors import MethodError
from lorica.core.update import LinearUpdate
from lorica.models.backbone import Backbone
from lorica.models.frozen import FrozenWeight


@dataclass(frozen=True, slots=True)
class Components:
    """How many singular directions of a site's change hold the share of its variance, of `most` that there could be."""

    site: str
    role: str
    layer: int | None
    count: int
    most: int


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
    energy = values.detach().double().square().sort(descending=True).values
    total = float(energy.sum())
    if total == 0:
        return 0
    # what rounding adds to a sum of so many terms must not cost a component
    reached = energy.cumsum(0) >= share * total * (1 - 1e-12)
    return int(reached.int().argmax()) + 1


def singular_values(update: LinearUpdate, weight: FrozenWeight) -> Tensor:
    """Singular values of `W' − W₀`, descending, float64; as many as the update can have.

    Factors alone go through QR of both sides and an SVD of their rank: time (in + out) r², no [out, in]. Raises
    MethodError where the change is not finite or the site is a norm, whose change is a vector.
    """
    if len(weight.shape) < 2:
        raise MethodError("A norm's change is a vector and has no spectrum.")
    device = work_device(weight)
    exact = doubled(update, device)
    rank = sum(factor.rank for factor in exact.factors)
    if exact.low_rank_only and 0 < rank < min(_sides(weight.shape)):
        folded = [factor.folded() for factor in exact.factors]
        B_OR = torch.cat([factor.B_OR for factor in folded], dim=1)
        A_RI = torch.cat([factor.A_RI.flatten(1) for factor in folded])
        right_RR = torch.linalg.qr(_finite(B_OR), mode="r").R
        left_RR = torch.linalg.qr(_finite(A_RI).T, mode="r").R
        matrix = right_RR @ left_RR.T
    else:
        before = weight.matrix().to(device=device, dtype=torch.float64)
        matrix = _finite((fold_weight(before, [exact]) - before).flatten(1))
    values: Tensor = torch.linalg.svdvals(matrix)
    return values


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
            found.append(Components(name, site.role, site.layer, count, min(_sides(site.shape))))
    return tuple(found)


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _finite(matrix: Tensor) -> Tensor:
    if not torch.isfinite(matrix).all():
        raise MethodError("The change holds NaN or infinity, so it has no spectrum.")
    return matrix
