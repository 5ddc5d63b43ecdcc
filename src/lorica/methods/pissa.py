"""PiSSA: LoRA that starts from the principal singular directions of each weight.

In: a site's frozen weight. Out: trained factors and frozen copies of their initial values with the opposite sign, so
that the shared base stays as it is. Refuses to know rows and optimisers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, LowRank, ParamSpec
from lorica.methods.base import BaseWeight, Method, Paper
from lorica.methods.lora import check_rank


class PiSSA(Method):
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
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert", "conv"})
    identity_at_init: ClassVar[str] = "rounding"

    rank: int = Field(8, ge=1, description="number of singular directions that are trained")
    alpha: float = Field(
        8.0, gt=0, description="numerator of s = alpha / rank; it changes step sizes, not the initial function"
    )
    rslora: bool = Field(False, description="s = alpha / sqrt(rank)")
    svd: Literal["exact", "lowrank"] = Field(
        "exact", description="full decomposition, or seeded subspace iteration (faster, nearly equal)"
    )
    niter: int = Field(4, ge=0, description="power iterations of `svd: lowrank`")

    def scaling(self) -> float:
        """`α/r`, or `α/√r` with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        check_rank(self.rank, site)
        A, B = (self.rank, *site.shape[1:]), (site.out_features, self.rank)
        return {
            "A": ParamSpec(A, decay=False, group="A"),
            "B": ParamSpec(B, decay=False, group="B"),
            "A0": ParamSpec(A, trainable=False),
            "B0": ParamSpec(B, trainable=False),
        }

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        W_OI = weight.matrix().flatten(1)
        W_OI = W_OI.to(torch.promote_types(W_OI.dtype, torch.float32))
        U_OR, S_R, V_RI = self._decompose(W_OI, rng)
        root_R = (S_R / self.scaling()).sqrt()
        A, B = (root_R[:, None] * V_RI).reshape(-1, *site.shape[1:]), U_OR * root_R
        return {"A": A, "B": B, "A0": A, "B0": B}

    def _decompose(self, W_OI: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The r leading singular triplets: U [out, r], Σ [r], Vᵀ [r, in]."""
        if self.svd == "exact":
            U, S, V = torch.linalg.svd(W_OI, full_matrices=False)
            return U[:, : self.rank], S[: self.rank], V[: self.rank]
        # subspace iteration (arXiv 0909.4061) with a few directions to spare; torch's own draws global random numbers
        width = min(self.rank + 8, *W_OI.shape)
        Q = torch.randn(W_OI.shape[1], width, generator=rng).to(W_OI)
        for _ in range(self.niter):
            Q = torch.linalg.qr(W_OI.T @ torch.linalg.qr(W_OI @ Q)[0])[0]
        Q_OK = torch.linalg.qr(W_OI @ Q)[0]
        U, S, V = torch.linalg.svd(Q_OK.T @ W_OI, full_matrices=False)
        return (Q_OK @ U)[:, : self.rank], S[: self.rank], V[: self.rank]

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        scale = self.scaling()
        return LinearUpdate(factors=(LowRank(p["A"], p["B"], scale), LowRank(p["A0"], p["B0"], -scale)))
