"""Factors of a change of a weight: by its singular values, in float64.

In: a frozen weight and an update of it. Out: A and B whose product is the change, exact or cut to a rank, and the share
of the change that was cut away. A sum of factors is never multiplied out. Refuses to know methods, adapters and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.adapters.fold import fold_weight
from lorica.core.update import LinearUpdate, LowRank


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

    One pair of factors within the rank is taken as it is. Several pairs, as PiSSA's, are joined through two QR
    decompositions and the singular values of a small core, so that what cancels between them does not stay. Anything
    else is the singular value decomposition of the dense change. Singular values up to `tolerance` times the largest
    are dropped, and those beyond `rank`; each factor takes the root of the rest. A change of nothing has rank one.
    """
    limit = min(weight.shape[0], weight[0].numel())
    most = limit if rank is None else min(rank, limit)
    if update.low_rank_only:
        pairs = [f.folded() for f in update.factors]
        if len(pairs) == 1 and pairs[0].rank <= most:
            return Factored(pairs[0].A_RI, pairs[0].B_OR)
        if pairs and sum(p.rank for p in pairs) < limit:
            return _cut(*_joined(pairs), weight.shape, most, tolerance)
    change_OI = (fold_weight(weight, [update]) - weight).flatten(1)
    U_OR, S_R, V_RI = torch.linalg.svd(change_OI, full_matrices=False)
    return _cut(U_OR, S_R, V_RI, weight.shape, most, tolerance)


def _joined(pairs: Sequence[LowRank]) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, Vᵀ of `Σ BA`, from factors of total rank R: time in R², not in the weight's size."""
    B_OR, A_RI = torch.cat([p.B_OR for p in pairs], 1), torch.cat([p.A_RI.flatten(1) for p in pairs])
    left_OR, upper_RR = torch.linalg.qr(B_OR)
    right_IR, lower_RR = torch.linalg.qr(A_RI.T)
    U, S, V = torch.linalg.svd(upper_RR @ lower_RR.T)
    return left_OR @ U, S, V @ right_IR.T


def _cut(U_OR: Tensor, S_R: Tensor, V_RI: Tensor, shape: Sequence[int], most: int, tolerance: float) -> Factored:
    """Balanced factors of the leading singular triplets."""
    counted = int(S_R.gt(tolerance * S_R[0]).sum())
    kept = max(1, min(counted, most))
    energy = float(S_R.square().sum())
    root_R = S_R[:kept].sqrt()
    A_RI, B_OR = root_R[:, None] * V_RI[:kept], U_OR[:, :kept] * root_R
    return Factored(A_RI.reshape(kept, *shape[1:]), B_OR, float(S_R[kept:].square().sum()) / energy if energy else 0.0)
