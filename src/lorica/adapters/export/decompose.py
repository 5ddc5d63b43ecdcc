"""Factors of a change of a weight: by its singular values, in float64.

In: a change, or a frozen weight and an update of it. Out: A and B whose product is the change, exact or cut to a rank,
and the share of the change that was cut away. A sum of factors is never multiplied out. Refuses to know methods,
adapters and files.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorica.adapters.merging.change import Change, change_from
from lorica.core.update import LinearUpdate

TOLERANCE = 1e-7
"""Singular values up to this share of the largest are dropped: float32, in which factors are stored, loses them."""


@dataclass(frozen=True, slots=True, eq=False)
class Factored:
    """`ΔW ≈ B A`: A is [r, *W's other axes], B [out, r], both float64. `lost` is the share Σσ²(cut) / Σσ²(all)."""

    A_RI: Tensor
    B_OR: Tensor
    lost: float = 0.0

    @property
    def rank(self) -> int:
        return self.A_RI.shape[0]


def factor(weight: Tensor, update: LinearUpdate, rank: int | None, tolerance: float) -> Factored:
    """Factors of `ΔW = effective(W) − W` for a float64 weight and update.

    One pair of factors within the rank is taken as it is. Several pairs, as PiSSA's, are joined, and singular values
    make what cancels between them disappear.
    """
    return cut(change_from(update, weight), rank, tolerance, as_is=len(update.factors) == 1)


def cut(change: Change, rank: int | None, tolerance: float, *, as_is: bool = True) -> Factored:
    """Factors of a change by `Change.svd`; with `as_is`, those that it has, if their rank is within `rank`.

    Singular values up to `tolerance` times the largest are dropped, and those beyond `rank`; each factor takes the
    root of the rest. A change of nothing has rank one.
    """
    limit, kernel = min(change.sides), change.shape[1:]
    most = limit if rank is None else min(rank, limit)
    if as_is and change.factored and 0 < change.rank <= most:
        A_RI, B_OR = change.factors()
        return Factored(A_RI.reshape(-1, *kernel), change.scale * B_OR)
    if change.rank == 0:
        A_RI, B_OR = change.factors()
        return Factored(A_RI.new_zeros(1, *kernel), B_OR.new_zeros(change.shape[0], 1))
    U_OR, S_R, V_RI = change.svd()
    kept = max(1, min(int(S_R.gt(tolerance * S_R[0]).sum()), most))
    energy, root_R = float(S_R.square().sum()), S_R[:kept].sqrt()
    lost = float(S_R[kept:].square().sum()) / energy if energy else 0.0
    return Factored((root_R[:, None] * V_RI[:kept]).reshape(kept, *kernel), U_OR[:, :kept] * root_R, lost)
