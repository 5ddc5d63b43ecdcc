"""Codes and low-rank factors of one weight, chosen together: LoftQ's alternation, and QPiSSA's.

In: a full weight, a format, a rank. Out: the best pair of the alternation and the error of each. Refuses to know
backbones, adapters and what becomes of the factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorica.methods.pissa import Triplets, leading
from lorica.models.quantize.formats import Format, Packed
from lorica.models.quantize.functions import packed_as


@dataclass(frozen=True, slots=True, eq=False)
class Alternation:
    """The best iterate: codes and triplets of its low-rank part, whose number is `chosen`. `errors[t]` is `‖W − Q_t −
    L_t‖` after t iterations, Frobenius; `errors[0]` is that of the plain codes alone.
    """

    packed: Packed
    triplets: Triplets
    errors: tuple[float, ...]

    @property
    def chosen(self) -> int:
        return min(range(1, len(self.errors)), key=self.errors.__getitem__)


def alternate(
    W_OI: Tensor,
    form: Format,
    rank: int,
    iterations: int,
    rng: torch.Generator,
    niter: int | None = None,
    *,
    start: Literal["rounding", "principal"] = "rounding",
) -> Alternation:
    """`Q_t = Q(W − L_{t−1})`, `L_t = SVD_r(W − Q_t)` for t = 1 … `iterations`, from `L_0 = 0` (LoftQ, arXiv
    2310.08659); the best of them. From `principal` directions `L_t = SVD_r(W − Q_{t−1})`, `Q_t = Q(W − L_t)`, from
    `Q_0 = 0` (QPiSSA, arXiv 2404.02948): the same two steps in turn, begun and ended by the other one.

    The error is not monotone in t. W is [out, in] of any dtype, Q_t in that dtype; `rank` 0 is plain quantising.
    Raises FormatError for values that are not finite.
    """
    W = W_OI.to(torch.promote_types(W_OI.dtype, torch.float32))

    def coded(L_OI: Tensor) -> tuple[Packed, Tensor]:
        """Codes of what a low-rank part leaves, and what codes leave of the weight."""
        packed = packed_as(form, W - L_OI)
        return packed, W - packed.dense(W_OI.dtype).to(W)

    packed, residual_OI = coded(torch.zeros_like(W))
    errors = [float(residual_OI.norm())]
    best: tuple[Packed, Triplets] | None = None
    for done in range(iterations):
        triplets = leading(W if start == "principal" and not done else residual_OI, rank, niter, rng)
        L_OI = (triplets[0] * triplets[1]) @ triplets[2]
        if start == "principal":
            packed, residual_OI = coded(L_OI)
        errors.append(float((residual_OI - L_OI).norm()))
        if best is None or errors[-1] < min(errors[1:-1]):
            best = packed, triplets
        if start == "rounding" and done + 1 < iterations:
            packed, residual_OI = coded(L_OI)
    assert best is not None
    return Alternation(*best, tuple(errors))
