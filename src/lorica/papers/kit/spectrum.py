"""The change that an adapter made to each weight, seen through singular values and through the weight's own subspaces.

In: a host and a trained adapter. Out: ΔW of every linear site, its effective rank, and the share of it that lies in the
leading singular subspace of the weight. Refuses to know tasks and papers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.analysis.spectrum import effective_rank
from lorica.adapters.fold import doubled, fold_weight
from lorica.core.update import LinearUpdate
from lorica.engine.host import Host
from lorica.methods.pissa import leading

EXACT, ITERATIONS = 1024, 16
"""Weights whose smaller side is larger are decomposed by so many steps of subspace iteration."""
Change = tuple[str, Tensor, Tensor]
"""A site's name, its weight W₀ [out, in] and the change ΔW [out, in], float64 on the CPU."""


@torch.no_grad()
def changes(host: Host, adapter: Adapter) -> Iterator[Change]:
    """ΔW at every linear site of an adapter: what merging it would add. It is zero before training."""
    cpu = torch.device("cpu")
    for name, site in adapter.layout.sites.items():
        if site.kind == "linear":
            weight = host.backbone.weight(name)
            update = adapter.update(name, weight)
            if isinstance(update, LinearUpdate):
                W_OI = weight.matrix().to(cpu, torch.float64)
                yield name, W_OI, fold_weight(W_OI, [doubled(update, cpu)]) - W_OI


def evenness(delta_OI: Tensor) -> tuple[float, float]:
    """(effective rank, share of the largest) of the singular values σ: `exp(−Σ p log p)` with `p = σ / Σσ`, and max p.

    The effective rank (Roy and Vetterli, EUSIPCO 2007) is k for k equal singular values. NaN where ΔW is zero.
    """
    sigma = torch.linalg.svdvals(delta_OI)
    total = float(sigma.sum())
    return (effective_rank(sigma), float(sigma.max()) / total) if total else (math.nan, math.nan)


class Principal:
    """The k leading singular directions of weights, kept once a site."""

    def __init__(self, k: int) -> None:
        self.k = k
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def shares(self, change: Change) -> tuple[float, float, float]:
        """(inside, touching, chance) of `‖ΔW‖²`, with the projections P on the k leading left singular vectors of W₀
        and Q on the right ones: inside is `‖P ΔW Q‖²`, touching `‖ΔW‖² − ‖(1 − P) ΔW (1 − Q)‖²`, both over `‖ΔW‖²`;
        chance is what touches of a ΔW without direction, `1 − (1 − k/out)(1 − k/in)`.
        """
        name, W_OI, delta_OI = change
        if name not in self._kept:
            rng = torch.Generator().manual_seed(0)
            U, _, V = leading(W_OI, self.k, None if min(W_OI.shape) <= EXACT else ITERATIONS, rng)
            self._kept[name] = U, V.T
        U_OK, V_IK = self._kept[name]
        left_KI, right_OK = U_OK.T @ delta_OI, delta_OI @ V_IK
        whole = float(delta_OI.square().sum())
        inside = float((left_KI @ V_IK).square().sum())
        touching = float(left_KI.square().sum()) + float(right_OK.square().sum()) - inside
        rows, cols = W_OI.shape
        chance = 1 - (1 - U_OK.shape[1] / rows) * (1 - V_IK.shape[1] / cols)
        return (inside / whole, touching / whole, chance) if whole else (math.nan, math.nan, chance)


def mean(values: list[float]) -> float:
    """The mean over sites."""
    return math.fsum(values) / len(values)
