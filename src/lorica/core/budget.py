"""A budget of parts that shrinks in training, who stays within it, and the push that keeps parts comparable.

In: scores, a number of steps, matrices. Out: a number, masks that leave exactly so many, a gradient. It serves AdaLoRA,
arXiv 2303.10512, and its errors say so. Refuses to know sites, updates and optimisers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorica.core.errors import MethodError


def last_choice(total: int | None, warmup: int, final: int) -> int:
    """The step of a run of `total` in which the choice becomes final. Raises MethodError where there is none."""
    if total is None:
        raise MethodError(
            "AdaLoRA shares its budget out over the whole run, and nobody said how many steps there are.",
            hint="Set the method's `steps`.",
        )
    if warmup >= total - final:
        raise MethodError(
            f"AdaLoRA's {warmup} steps of warm-up and {final} final ones leave none of {total} to choose triplets in."
        )
    return total - final


def cubic_budget(t: int, start: int, target: int, warmup: int, last: int, every: int) -> tuple[int, bool]:
    """How many parts stay after `t` steps, and whether that is enforced at this one.

    `start` up to step `warmup`, `target` from step `last` on, and `⌊target + (start − target)(1 − (t − warmup) / (last
    − warmup))³⌋` between, enforced in every `every`-th step.
    """
    if t <= warmup:
        return start, False
    if t >= last:
        return target, True
    share = 1 - (t - warmup) / (last - warmup)
    return int((start - target) * share**3 + target), t % every == 0


def keep_best(scores: Sequence[Tensor], masks: Sequence[Tensor], budget: int) -> None:
    """Set masks to 1 for the `budget` parts of the highest scores over all masks together, and to 0 for the others.

    Exactly so many, whatever the scores: of equal ones the earlier stay.
    """
    order = torch.argsort(torch.cat(list(scores)), descending=True, stable=True)
    chosen = torch.zeros(len(order), device=order.device)
    chosen[order[:budget]] = 1.0
    for mask, part in zip(masks, chosen.split([len(mask) for mask in masks]), strict=True):
        mask.copy_(part)


def orthogonality_gradient(P_OR: Tensor, *, square: bool = False) -> Tensor:
    """`∂‖PᵀP − I‖ / ∂P = 2P(PᵀP − I) / ‖PᵀP − I‖`, 0 where P is orthonormal; of the norm's square, `4P(PᵀP − I)`."""
    off_RR = P_OR.T @ P_OR - torch.eye(P_OR.shape[1], dtype=P_OR.dtype, device=P_OR.device)
    if square:
        return 4 * P_OR @ off_RR
    norm = torch.linalg.matrix_norm(off_RR)
    return 2 * P_OR @ torch.where(norm > 0, off_RR / norm, 0.0)
