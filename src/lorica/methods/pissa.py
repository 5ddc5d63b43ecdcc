"""PiSSA: LoRA that starts from the principal singular directions of each weight; and what other SVD starts share.

In: a site's frozen weight. Out: trained factors and frozen copies of their initial values, so that the shared base
stays as it is. Refuses to know rows and optimisers.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, LowRank, ParamSpec
from lorica.methods.base import BaseWeight, Paper
from lorica.methods.lora import LearningRates, check_rank

Triplets = tuple[Tensor, Tensor, Tensor]
"""Singular triplets of a flattened weight: U [out, r], Σ [r], Vᵀ [r, in]."""


class CounterTerm(LearningRates):
    """LoRA whose factors start as a part `sB₀A₀` of the weight: `ΔW = s (BA − B₀A₀)`, `s = α/r` (rsLoRA: `α/√r`).

    It is lowered as `s (B − B₀) A + s B₀ (A − A₀)`: the same sum, but differences are taken in the masters' dtype, so
    that step 0 is the base bit for bit and a small change survives half precision. There is no dropout (the factors
    carry a part of the base) and no decay (zero is the base without that part). Subclasses choose the triplets.
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert", "conv"})

    rank: int = Field(8, ge=1, description="number of singular directions that are trained")
    alpha: float = Field(
        8.0, gt=0, description="numerator of s = alpha / rank; it changes step sizes, not the initial function"
    )
    rslora: bool = Field(False, description="s = alpha / sqrt(rank)")

    @property
    def split(self) -> bool:
        """Whether the factors hold a part of the weight, so that a counter-term is kept."""
        return True

    def scaling(self) -> float:
        """`α/r`, or `α/√r` with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @abstractmethod
    def triplets(self, W_OI: Tensor, rng: torch.Generator) -> Triplets:
        """The r singular triplets that are trained, of a flattened weight in float32 or wider."""

    def params(self, site: Site) -> dict[str, ParamSpec]:
        check_rank(self.rank, site)
        A, B = (self.rank, *site.shape[1:]), (site.out_features, self.rank)
        specs = {"A": ParamSpec(A, decay=not self.split, group="A"), "B": ParamSpec(B, decay=not self.split, group="B")}
        if self.split:
            specs |= {"A0": ParamSpec(A, trainable=False), "B0": ParamSpec(B, trainable=False)}
        return specs

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        W_OI = weight.matrix().flatten(1)
        U_OR, S_R, V_RI = self.triplets(W_OI.to(torch.promote_types(W_OI.dtype, torch.float32)), rng)
        if not self.split:
            return {"A": V_RI.reshape(-1, *site.shape[1:])}
        root_R = (S_R / self.scaling()).sqrt()
        A, B = (root_R[:, None] * V_RI).reshape(-1, *site.shape[1:]), U_OR * root_R
        return {"A": A, "B": B, "A0": A, "B0": B}

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        A, B, scale = p["A"], p["B"], self.scaling()
        if not self.split:
            return LinearUpdate(factors=(LowRank(A, B, scale),))
        return LinearUpdate(factors=(LowRank(A, B - p["B0"], scale), LowRank(A - p["A0"], p["B0"], scale)))


class PiSSA(CounterTerm):
    """Principal-direction LoRA: `y = x W₀ᵀ + b₀ + s·x AᵀBᵀ − s·x A₀ᵀB₀ᵀ`, `s = α/r` (rsLoRA: `α/√r`).

    With `W₀ ≈ U Σ Vᵀ` (the r largest), `B₀ = U √(Σ/s)` [out, r] and `A₀ = √(Σ/s) Vᵀ` [r, in] are frozen, and A, B
    start there. This is the paper's method with its residual base `W₀ − sB₀A₀` written as a counter-term: disabling
    restores the base bit for bit, and adapters can share it. There is no dropout (it would drop part of the base
    function) and no decay (it would pull towards the residual). Exported as a plain LoRA of rank 2r. Parameters: r(in
    + out) a site, and as many frozen. Raises MethodError when the rank exceeds a site. Paper: arXiv 2404.02948.
    """

    name: ClassVar[str] = "pissa"
    summary: ClassVar[str] = "LoRA from the principal singular directions of each weight"
    paper: ClassVar[Paper] = Paper(
        "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
        "NeurIPS 2024",
        "2404.02948",
    )

    svd: Literal["exact", "lowrank"] = Field(
        "exact", description="full decomposition, or seeded subspace iteration (faster, nearly equal)"
    )
    niter: int = Field(4, ge=0, description="power iterations of `svd: lowrank`")

    def triplets(self, W_OI: Tensor, rng: torch.Generator) -> Triplets:
        return leading(W_OI, self.rank, None if self.svd == "exact" else self.niter, rng)


def leading(W_OI: Tensor, rank: int, niter: int | None, rng: torch.Generator) -> Triplets:
    """The `rank` largest singular triplets: exact, or with `niter` by that many steps of subspace iteration.

    The iteration (arXiv 0909.4061) carries a few directions to spare; torch's own would draw global random numbers.
    """
    if niter is None:
        U, S, V = torch.linalg.svd(W_OI, full_matrices=False)
        return U[:, :rank], S[:rank], V[:rank]
    width = min(rank + 8, *W_OI.shape)
    Q = torch.randn(W_OI.shape[1], width, generator=rng).to(W_OI)
    for _ in range(niter):
        Q = torch.linalg.qr(W_OI.T @ torch.linalg.qr(W_OI @ Q)[0])[0]
    Q_OK = torch.linalg.qr(W_OI @ Q)[0]
    U, S, V = torch.linalg.svd(Q_OK.T @ W_OI, full_matrices=False)
    return (Q_OK @ U)[:, :rank], S[:rank], V[:rank]
