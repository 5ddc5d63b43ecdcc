"""MiLoRA: LoRA that starts from the minor singular directions of each weight, or only from their subspace (MiLoRA++).

In: a site's frozen weight. Out: trained factors and, where they hold a part of the weight, its counter-term.
Refuses to know rows and optimisers.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorica.methods.base import Paper
from lorica.methods.pissa import CounterTerm, Triplets


class MiLoRA(CounterTerm):
    """Minor-direction LoRA: `y = x W₀ᵀ + b₀ + s·x AᵀBᵀ − s·x A₀ᵀB₀ᵀ`, `s = α/r` (rsLoRA: `α/√r`).

    `U Σ Vᵀ` are the r smallest of the min(out, in) singular triplets of W₀. With `start: split`, the paper's method,
    A, B start at the frozen `A₀ = √(Σ/s) Vᵀ` [r, in] and `B₀ = U √(Σ/s)` [out, r]; nothing decays. With `start:
    subspace` (MiLoRA++) A starts as Vᵀ, B at zero, and there is no counter-term: LoRA with a chosen A, decayed like
    LoRA. Neither has dropout. The decomposition is exact, since iterations find large directions only; a direction with
    σ = 0 has `A = B = 0` in `split` and cannot move. Exported as a plain LoRA of rank 2r (`subspace`: r). Parameters:
    r(in + out) a site, and as many frozen in `split`. Raises MethodError when the rank exceeds a site. Paper: arXiv
    2406.09044.
    """

    name: ClassVar[str] = "milora"
    summary: ClassVar[str] = "LoRA from the minor singular directions of each weight"
    paper: ClassVar[Paper] = Paper(
        "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning",
        "NAACL 2025",
        "2406.09044",
    )

    start: Literal["split", "subspace"] = Field(
        "split",
        description="split: factors hold the minor part of the weight; subspace: A spans it and B is zero (MiLoRA++)",
    )

    @property
    def split(self) -> bool:
        return self.start == "split"

    def triplets(self, W_OI: Tensor, rng: torch.Generator) -> Triplets:
        U, S, V = torch.linalg.svd(W_OI, full_matrices=False)
        return U[:, -self.rank :], S[-self.rank :], V[-self.rank :]
