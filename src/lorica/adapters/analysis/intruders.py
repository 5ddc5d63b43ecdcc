"""Intruder dimensions: leading singular vectors of a tuned weight that are like none of the base's.

In: a base's left singular vectors and a tuned weight, or an adapter over its backbone. Out: for each of the leading
vectors how near the base's nearest one is, and which are intruders. Refuses to know files, and whether it matters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.analysis.bases import Bases
from lorica.adapters.analysis.sites import Unread, change_at
from lorica.adapters.merging.change import Change
from lorica.core.config import Config
from lorica.core.errors import MethodError
from lorica.core.site import Site, SiteKind
from lorica.models.backbone import Backbone

KINDS: frozenset[SiteKind] = frozenset({"linear", "expert", "conv"})
"""Sites that are looked at; an embedding is a table, and which of its sides is its output is a convention."""


class Search(Config):
    """What counts as an intruder. Defaults are the paper's (arXiv 2410.21228)."""

    top: int = Field(10, ge=1, description="k: how many leading singular vectors of each tuned weight are looked at")
    threshold: float = Field(
        0.5, gt=0, le=1, description="ε: an intruder is nearer than this cosine to no singular vector of the base"
    )


@dataclass(frozen=True, slots=True, eq=False)
class Leading:
    """The leading singular triplets of a tuned weight W₁ and, of each, the largest |cos| to the base's left vectors.

    `U_OK`, `S_K` descending, `V_KI`, `cosine_K`: `c_j = max_i |⟨u¹_j, u⁰_i⟩|` over all i.
    """

    U_OK: Tensor
    S_K: Tensor
    V_KI: Tensor
    cosine_K: Tensor

    def intruders(self, threshold: float) -> list[int]:
        """The j with `c_j < ε`."""
        found: list[int] = torch.nonzero(self.cosine_K < threshold).flatten().tolist()
        return found

    def part(self, which: list[int]) -> tuple[Tensor, Tensor]:
        """A [j, I] and B [O, j] of `Σ σ_j u_j v_jᵀ` over some of them, float64."""
        return self.V_KI[which].double(), (self.U_OK[:, which] * self.S_K[which]).double()


def leading(base_OM: Tensor, tuned_OI: Tensor, top: int = 10) -> Leading:
    """Compare the `top` leading left singular vectors of W₁ [out, in] with all of the base's, the columns of `base_OM`.

    Signs of singular vectors are arbitrary, so cosines are absolute. A thin singular value decomposition, exact: near
    singular values that lie close together an approximate one mixes vectors, which looks like intruders. Fewer than
    `top` where the weight has fewer. Raises MethodError where the base has another number of outputs.
    """
    if base_OM.shape[0] != tuned_OI.shape[0]:
        raise MethodError(
            f"The base's vectors have {base_OM.shape[0]} outputs and the tuned weight {tuned_OI.shape[0]}; equal "
            "numbers can be compared."
        )
    U_OR, S_R, V_RI = torch.linalg.svd(tuned_OI, full_matrices=False)
    cosine_K = (U_OR[:, :top].T @ base_OM.to(U_OR)).abs().max(1).values
    return Leading(U_OR[:, :top], S_R[:top], V_RI[:top], cosine_K)


@dataclass(frozen=True, slots=True)
class SiteIntruders:
    """One weight: of each leading singular vector of W₁ the singular value and the cosine; `which` are intruders."""

    site: str
    role: str
    layer: int | None
    values: tuple[float, ...]
    cosines: tuple[float, ...]
    which: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Intruders:
    """An adapter's intruder dimensions: those of each weight, and what was looked for. `unread` are weights whose
    change is not finite.
    """

    top: int
    threshold: float
    sites: tuple[SiteIntruders, ...]
    unread: tuple[Unread, ...] = ()

    @property
    def count(self) -> int:
        """The sum over weights; at most top · weights."""
        return sum(len(site.which) for site in self.sites)

    def at(self, threshold: float) -> int:
        """The count at another threshold ε; it never falls as ε rises."""
        return sum(cosine < threshold for site in self.sites for cosine in site.cosines)

    def by_layer(self) -> dict[str, int]:
        """Layer → count; weights outside blocks are under `-`."""
        return self._counted(lambda site: "-" if site.layer is None else str(site.layer))

    def by_role(self) -> dict[str, int]:
        """Role of a site → count."""
        return self._counted(lambda site: site.role)

    def _counted(self, key: Callable[[SiteIntruders], str]) -> dict[str, int]:
        counts = dict.fromkeys(map(key, self.sites), 0)
        return counts | Counter(key(site) for site in self.sites for _ in site.which)


@dataclass(frozen=True, slots=True, eq=False)
class Examined:
    """One site: its change, and the tuned weight's leading triplets."""

    site: Site
    change: Change
    leading: Leading


@torch.no_grad()
def examine(adapter: Adapter, backbone: Backbone, search: Search, bases: Bases) -> Iterator[Examined | Unread]:
    """Every site whose weight is changed and can be looked at, one at a time: `W₁ = W₀ + ΔW` against W₀.

    Computed in the base's dtype, float32 at least. Time: one singular value decomposition of each tuned weight, and
    one of each base weight that `bases` does not have yet.
    """
    for name, site in adapter.layout.sites.items():
        if site.kind not in KINDS:
            continue
        change = change_at(adapter, backbone, name)
        if isinstance(change, Unread):
            yield change
            continue
        weight_OI = backbone.weight(name).matrix().flatten(1)
        weight_OI = weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32))
        tuned_OI = (weight_OI.to(change.device, torch.float64) + change.matrix()).to(weight_OI.dtype)
        base_OM = bases.left(backbone, name, weight_OI)
        yield Examined(site, change, leading(base_OM.to(tuned_OI.device), tuned_OI, search.top))


def find_intruders(
    adapter: Adapter, backbone: Backbone, search: Search | None = None, *, bases: Bases | None = None
) -> Intruders:
    """The intruder dimensions of an adapter: `j ≤ k` with `max_i |⟨u¹_j, u⁰_i⟩| < ε`, over all base vectors i.

    Linear, expert and convolution weights are looked at (a kernel's axes count as inputs). `bases` keeps the base's
    vectors between calls, in memory or on the disk. Raises MissingError on an outline, which has no weights. Paper:
    arXiv 2410.21228.
    """
    search = search or Search()
    found = list(examine(adapter, backbone, search, bases or Bases()))
    return Intruders(
        search.top,
        search.threshold,
        tuple(_record(one, search.threshold) for one in found if isinstance(one, Examined)),
        tuple(one for one in found if isinstance(one, Unread)),
    )


def _record(one: Examined, threshold: float) -> SiteIntruders:
    seen = one.leading
    values: list[float] = seen.S_K.tolist()
    cosines: list[float] = seen.cosine_K.tolist()
    return SiteIntruders(
        one.site.name, one.site.role, one.site.layer, tuple(values), tuple(cosines), tuple(seen.intruders(threshold))
    )
