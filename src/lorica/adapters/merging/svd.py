"""SVD truncation: the exact weighted sum, cut to a rank.

In: changes of any kind. Out: factors of at most the rank. A sum of factors is never multiplied out. Refuses to know
files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lorica.adapters.merging.base import Merging
from lorica.adapters.merging.change import Change
from lorica.adapters.merging.task_arithmetic import add_changes
from lorica.core.errors import ConfigError
from lorica.core.site import Site


def truncate(change: Change, rank: int, clamp: float | None = None) -> tuple[Tensor, Tensor]:
    """`A = V_rᵀ`, `B = U_r S_r` of a change's leading singular triplets; no more than it has.

    The sign of a triplet is such that the largest entry of its column of U is positive. With `clamp`, entries of both
    factors are cut to ±t, where t is that quantile of all their entries.
    """
    U_OR, S_R, V_RI = change.svd()
    U_OR, S_R, V_RI = U_OR[:, :rank], S_R[:rank], V_RI[:rank]
    at_1R = U_OR.abs().argmax(0, keepdim=True)
    sign_R = torch.where(U_OR.gather(0, at_1R)[0] < 0, -1.0, 1.0).to(U_OR)
    A_RI, B_OR = sign_R[:, None] * V_RI, U_OR * (sign_R * S_R)
    if clamp is None:
        return A_RI, B_OR
    entries = torch.cat([B_OR.reshape(-1), A_RI.reshape(-1)]).sort().values
    place = clamp * (entries.numel() - 1)  # torch.quantile takes no more than 2²⁴ entries
    low = int(place)
    bound = float(entries[low].lerp(entries[min(low + 1, entries.numel() - 1)], place - low))
    if bound < 0:
        raise ConfigError(f"The clamp {clamp:g} is a quantile below zero of the factors' entries; 0.99, say, is right.")
    return A_RI.clamp(-bound, bound), B_OR.clamp(-bound, bound)


class Svd(Merging):
    """`Σ w_n ΔW_n` cut to `rank` singular triplets, `A = V_rᵀ`, `B = U_r S_r`: the nearest change of that rank.

    The singular values come from QR of the stacked A and B, in time (in + out)(Σr)². Raises ConfigError where no rank
    is given and a parent's change is dense.
    """

    name: ClassVar[str] = "svd"
    summary: ClassVar[str] = "the exact weighted sum, cut to a rank by singular values"

    rank: int | None = Field(None, ge=1, description="ranks kept; null is the largest of the parents' at the site")
    clamp: float | None = Field(
        None, gt=0, le=1, description="cut entries of both factors to this quantile of them (PEFT's svd_clamp)"
    )

    def merge(self, site: Site, changes: Sequence[Change], weights: Sequence[float], survey: Any = None) -> Change:
        total = add_changes(changes, weights)
        if len(site.shape) == 1 or not total.rank:
            return total
        if self.rank is None and not total.factored:
            dense = next(change for change in changes if not change.factored)
            raise ConfigError(
                f"'svd' needs a rank: {dense.source or 'a parent'} changes site {site.name!r} densely and has none of "
                "its own there."
            )
        rank = self.rank or max(change.rank for change in changes)
        return Change.of_factors(site.shape, *truncate(total, rank, self.clamp), bias_O=total.bias_O)
