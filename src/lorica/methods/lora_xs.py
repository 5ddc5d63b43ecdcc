"""LoRA-XS: a trained r × r matrix between frozen singular directions of each weight.

In: a site's frozen weight. Out: factors, of which r² numbers are trained. Refuses to know rows and optimisers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, LowRank, ParamSpec
from lorica.methods.base import BaseWeight, Method, Paper
from lorica.methods.lora import check_rank
from lorica.methods.pissa import leading


class LoRAXS(Method):
    """LoRA with a trained core: `y = x W₀ᵀ + b₀ + s · drop(x) Aᵀ Rᵀ Bᵀ`, `s = α/r`.

    With the r largest singular triplets `W₀ ≈ U Σ Vᵀ`, `A = Vᵀ` [r, in] and `B = U Σ` [out, r] are frozen; R is [r, r].
    R starts at zero: its gradient `s Bᵀ G Aᵀ` is not zero there, and step 0 is the base bit for bit. The paper draws R
    from N(0, 10⁻¹⁰) instead (`init_std: 1e-5`): then step 0 is the base up to `s · ‖BRA‖` only, about 1e-5 of the
    weight. R decays towards the base. Parameters: r² a site; r(in + out) frozen, which are kept with the adapter, as
    singular vectors are unique up to sign alone. Raises MethodError when the rank exceeds a site. Paper: arXiv
    2405.17604.
    """

    name: ClassVar[str] = "lora_xs"
    summary: ClassVar[str] = "a small trained matrix between frozen singular directions"
    paper: ClassVar[Paper] = Paper(
        "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", "ECAI 2025", "2405.17604"
    )
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert", "conv"})

    rank: int = Field(16, ge=1, description="number r of singular directions; r² parameters a site")
    alpha: float = Field(16.0, gt=0, description="numerator of s = alpha / rank")
    init_std: float = Field(
        0.0, ge=0, description="standard deviation of R at the start; the paper has 1e-5, and step 0 is not the base"
    )
    svd: Literal["exact", "lowrank"] = Field(
        "exact", description="full decomposition, or seeded subspace iteration (faster, nearly equal)"
    )
    niter: int = Field(4, ge=0, description="power iterations of `svd: lowrank`")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the low-rank path, in training only")

    def scaling(self) -> float:
        """`α/r`."""
        return self.alpha / self.rank

    def params(self, site: Site) -> dict[str, ParamSpec]:
        check_rank(self.rank, site)
        return {
            "R": ParamSpec((self.rank, self.rank), group="R"),
            "A": ParamSpec((self.rank, *site.shape[1:]), trainable=False),
            "B": ParamSpec((site.out_features, self.rank), trainable=False),
        }

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        W_OI = weight.matrix().flatten(1)
        W_OI = W_OI.to(torch.promote_types(W_OI.dtype, torch.float32))
        R = torch.empty(self.rank, self.rank).normal_(generator=rng) * self.init_std
        U_OR, S_R, V_RI = leading(W_OI, self.rank, None if self.svd == "exact" else self.niter, rng)
        return {"R": R, "A": V_RI.reshape(-1, *site.shape[1:]), "B": U_OR * S_R}

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        return LinearUpdate(factors=(LowRank(p["A"], p["B"] @ p["R"], self.scaling()),), dropout=self.dropout)
