"""How alike the changes of several adapters are: the subspaces that they move, and the angle between them.

In: bases of subspaces, pairs of changes, or adapters each over a backbone of its own. Out: overlaps, cosines, and
records of all pairs. Factors are never multiplied out. Refuses to know files and what the adapters do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.analysis.sites import Unread, change_at
from lorica.adapters.analysis.spectrum import count_for
from lorica.adapters.merging.change import Change
from lorica.core.errors import MethodError, MismatchError
from lorica.models.backbone import Backbone

Source = tuple[Adapter, Backbone]
"""An adapter and the backbone, or outline, that it is on."""


def subspace_overlap(U_DI: Tensor, V_DJ: Tensor) -> float:
    """`φ = ‖UᵀV‖² / min(i, j)` of two bases with orthonormal columns, 0 (orthogonal) to 1 (one holds the other).

    Of random subspaces of D dimensions it is max(i, j) / D. Raises MethodError for bases of different spaces or without
    columns. Paper: arXiv 2106.09685, section 7.2.
    """
    _check_bases(U_DI, V_DJ)
    return float((U_DI.T @ V_DJ).square().sum()) / min(U_DI.shape[1], V_DJ.shape[1])


def principal_angles(U_DI: Tensor, V_DJ: Tensor) -> Tensor:
    """The min(i, j) principal angles of two subspaces in radians, ascending: `arccos` of the singular values of UᵀV.

    The columns are orthonormal. `Σ cos² / min(i, j)` is `subspace_overlap`. Raises MethodError as that does.
    """
    _check_bases(U_DI, V_DJ)
    cosines: Tensor = torch.linalg.svdvals(U_DI.T @ V_DJ)
    return cosines.clamp(max=1.0).arccos()


def _check_bases(U_DI: Tensor, V_DJ: Tensor) -> None:
    if U_DI.ndim != 2 or V_DJ.ndim != 2 or U_DI.shape[0] != V_DJ.shape[0] or not (U_DI.shape[1] and V_DJ.shape[1]):
        shapes = f"{tuple(U_DI.shape)} and {tuple(V_DJ.shape)}"
        raise MethodError(f"Bases of shapes {shapes} cannot be compared; [D, i] and [D, j] with i, j ≥ 1 are right.")


def inner(one: Change, two: Change) -> float:
    """`⟨ΔW₁, ΔW₂⟩ = Σ ΔW₁ ⊙ ΔW₂`; of factors `s₁s₂ Σ (B₁ᵀB₂) ⊙ (A₁A₂ᵀ)`, so that `‖ΔW‖² = s² tr((BᵀB)(AAᵀ))`.

    Raises MismatchError for changes of weights of different shapes.
    """
    if one.shape != two.shape:
        raise MismatchError(
            f"Changes of weights of shapes {list(one.shape)} and {list(two.shape)} cannot be compared; equal ones can."
        )
    if not one.factored:
        one, two = two, one
    if not one.factored:
        return float((one.matrix() * two.matrix()).sum())
    A_RI, B_OR = one.factors()
    if two.factored:
        A_SI, B_OS = two.factors()
        return one.scale * two.scale * float(((B_OR.T @ B_OS) * (A_RI @ A_SI.T)).sum())
    return one.scale * float(((B_OR.T @ two.matrix()) * A_RI).sum())


def cosine(one: Change, two: Change) -> float:
    """`⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖)` through factors, −1 to 1; NaN where one of them changes nothing."""
    return _cosine(inner(one, two), inner(one, one), inner(two, two))


def _cosine(product: float, first: float, second: float) -> float:
    return max(-1.0, min(1.0, product / math.sqrt(first * second))) if first > 0 and second > 0 else math.nan


@dataclass(frozen=True, slots=True)
class SiteSimilarity:
    """One site of a pair: the cosine of ΔW, and φ of the directions that hold 90 % of each, with what chance gives.

    `out` is on the output side (left singular vectors), `into` on the input side (right ones).
    """

    site: str
    cosine: float
    out: float
    out_chance: float
    into: float
    into_chance: float


@dataclass(frozen=True, slots=True)
class Similarity:
    """Two adapters: all sites together, and each that both change.

    Attributes:
        first, second: names. shared: sites that both change; alone: sites that only one does.
        cosine: of both changes as one long vector over all sites, those of one alone included; NaN for no change.
        out, into: mean φ over the shared matrices, and `out_chance`, `into_chance` the mean of what random subspaces
            of the same sizes have; None where no matrix is shared.
    """

    first: str
    second: str
    shared: int
    alone: int
    cosine: float
    out: float | None
    out_chance: float | None
    into: float | None
    into_chance: float | None
    sites: tuple[SiteSimilarity, ...]


@dataclass(slots=True)
class _Pair:
    """What is summed up over sites."""

    product: float = 0.0
    shared: int = 0
    sites: list[SiteSimilarity] = field(default_factory=list)


@torch.no_grad()
def similarities(sources: Sequence[Source]) -> tuple[Similarity, ...]:
    """Every pair of adapters, in order. Sites are matched by name; one site of each adapter is held at a time.

    Sites that cannot be read are as if not adapted. Raises MismatchError where a site has different shapes.
    """
    names = [site for adapter, _ in sources for site in adapter.layout.sites]
    pairs = {pair: _Pair() for pair in combinations(range(len(sources)), 2)}
    squares, acting = [0.0] * len(sources), [0] * len(sources)
    for site in dict.fromkeys(names):
        changes = {n: found for n, source in enumerate(sources) if (found := _acting(source, site)) is not None}
        sides = {n: _sides(change) for n, change in changes.items()}
        for n, change in changes.items():
            squares[n] += inner(change, change)
            acting[n] += 1
        for first, second in combinations(changes, 2):
            pair = pairs[first, second]
            pair.shared += 1
            pair.product += inner(changes[first], changes[second])
            one, two = sides[first], sides[second]
            if one is not None and two is not None:
                pair.sites.append(_site(site, cosine(changes[first], changes[second]), one, two))
    return tuple(
        _summary(
            (sources[i][0].name, sources[j][0].name),
            pair,
            acting[i] + acting[j] - 2 * pair.shared,
            _cosine(pair.product, squares[i], squares[j]),
        )
        for (i, j), pair in pairs.items()
    )


def _acting(source: Source, site: str) -> Change | None:
    """An adapter's change of a site, or None where it changes nothing there or it cannot be read."""
    adapter, backbone = source
    if site not in adapter.layout.sites:
        return None
    found = change_at(adapter, backbone, site)
    return None if isinstance(found, Unread) or inner(found, found) == 0 else found


def _sides(change: Change) -> tuple[Tensor, Tensor] | None:
    """The singular vectors of 90 % of a change, [O, k] and [I, k]; None for a vector."""
    if len(change.shape) < 2:
        return None
    U_OR, S_R, V_RI = change.svd()
    count = count_for(S_R)
    return U_OR[:, :count], V_RI[:count].T


def _site(site: str, angle: float, one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> SiteSimilarity:
    (out, out_chance), (into, into_chance) = (
        (subspace_overlap(a, b), max(a.shape[1], b.shape[1]) / a.shape[0]) for a, b in zip(one, two, strict=True)
    )
    return SiteSimilarity(site, angle, out, out_chance, into, into_chance)


def _summary(names: tuple[str, str], pair: _Pair, alone: int, angle: float) -> Similarity:
    def mean(values: Sequence[float]) -> float | None:
        return math.fsum(values) / len(values) if values else None

    return Similarity(
        *names,
        shared=pair.shared,
        alone=alone,
        cosine=angle,
        out=mean([s.out for s in pair.sites]),
        out_chance=mean([s.out_chance for s in pair.sites]),
        into=mean([s.into for s in pair.sites]),
        into_chance=mean([s.into_chance for s in pair.sites]),
        sites=tuple(pair.sites),
    )
