"""Rank-1 adapters seen as what they are: at each site one direction read, one written, and a scalar for each token.

    Δ_t = s · B (A · h_t) = c_t · B/‖B‖        c_t = s · (A · h_t) · ‖B‖

In: an adapter over its backbone. Out: both directions of each site; scalars of given inputs. The sign of c is nobody's
choice: (A, B) and (−A, −B) are one adapter. Refuses to know text, passes and files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.targets import Targets, select
from lorica.core.errors import MethodError
from lorica.core.site import Site
from lorica.core.update import LinearUpdate
from lorica.models.backbone import Backbone


@dataclass(frozen=True, slots=True, eq=False)
class RankOne:
    """One site: `read_I` is `s ‖B‖ A`, so that `c_t = read · h_t`, and `write_O` is `B/‖B‖`; both float64."""

    site: Site
    read_I: Tensor
    write_O: Tensor

    def scalars(self, h: Tensor) -> Tensor:
        """`c` of every token of h [..., I], in float64."""
        return h.detach().to(torch.float64) @ self.read_I.to(h.device)


def rank_ones(adapter: Adapter, backbone: Backbone, targets: Targets | None = None) -> dict[str, RankOne]:
    """What a rank-1 adapter reads and writes, by site, in backbone order; with `targets`, at some of its sites.

    Raises MethodError for a site that is not linear, where the update is more than one product of rank 1, or where B is
    zero, as it is before training; TargetError where the targets select none of the adapter's sites. Paper: arXiv
    2506.11618.
    """
    found = {}
    for name in chosen_sites(adapter, targets):
        site, weight = adapter.layout.sites[name], backbone.weight(name)
        with torch.no_grad():
            update = adapter.update(name, weight)
        if site.kind != "linear" or not isinstance(update, LinearUpdate):
            raise MethodError(f"Site {name!r} of kind {site.kind!r} has no scalar for each token; a linear site has.")
        if not update.low_rank_only or update.bias_O is not None or [f.rank for f in update.factors] != [1]:
            ranks = sum(factor.rank for factor in update.factors)
            raise MethodError(
                f"Adapter {adapter.name!r} does more at site {name!r} than write one direction (rank {ranks}).",
                hint="Scalars are of adapters of rank 1, such as `lorica train rank1` makes.",
            )
        plain = update.factors[0].folded()
        A_I, B_O = plain.A_RI[0].double(), plain.B_OR[:, 0].double()
        norm = B_O.norm()
        if not norm:
            raise MethodError(f"Adapter {adapter.name!r} writes nothing at site {name!r}: B is zero.")
        found[name] = RankOne(site, A_I * norm, B_O / norm)
    return found


def chosen_sites(adapter: Adapter, targets: Targets | None = None) -> Iterable[str]:
    """The adapter's sites that the targets name; all of them by default. Raises TargetError."""
    if targets is None:
        return tuple(adapter.layout.sites)
    return tuple(select(adapter.layout.sites, adapter.method, targets))
