"""LoftQ: LoRA that starts from what quantising took from each weight; and QPiSSA, which quantises what LoRA leaves.

In: a packed weight and its residual. Out: factors whose product restores the weight as far as their rank allows.
Refuses to know rows, optimisers, how the full weights are reached, and how codes are chosen (`adapters.alternation`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorica.core.errors import MethodError
from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, LowRank, ParamSpec
from lorica.methods.base import BaseWeight, Paper, PeftNames
from lorica.methods.lora import LearningRates, check_rank, uniform
from lorica.methods.pissa import Triplets, leading


class LoftQ(LearningRates):
    """LoRA beside a quantised weight Q, started to minimise `‖W − Q − sBA‖`: `y = x Qᵀ + b₀ + s·x AᵀBᵀ`, `s = α/r`.

    With `U Σ Vᵀ ≈ W − Q` (the r largest), `B = U √(Σ/s)` [out, r] and `A = √(Σ/s) Vᵀ` [r, in]: the division by √s,
    which the published code lacks, makes the start the same for every α (rsLoRA: `s = α/√r`). With `iterations: 1` Q is
    the plain quantised base, shared by all, and its full weights have to be at hand. More iterations quantise `W − sBA`
    in turn with that; their best Q is a base of the adapter's own (`adapters.private_base`, `lorica train`). With
    `start: principal` (QPiSSA, arXiv 2404.02948; five iterations there) `U Σ Vᵀ ≈ W` is first and Q has the rest, in
    turn, ending with Q: always a base of its own. A weight there in full has nothing to restore: it starts as LoRA's,
    B = 0. There is no dropout and no decay (the factors carry a part of the base). Parameters: r(in + out) a site.
    Raises MethodError when the rank exceeds a site or a shared base would have to change, MissingError without the full
    weights. Paper: arXiv 2310.08659.
    """

    name: ClassVar[str] = "loftq"
    summary: ClassVar[str] = "LoRA that starts from what quantising took from each weight"
    paper: ClassVar[Paper] = Paper(
        "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", "ICLR 2024", "2310.08659"
    )
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert", "conv"})
    peft: ClassVar[PeftNames | None] = PeftNames(
        "LORA",
        tensors={"A": "lora_A.weight", "B": "lora_B.weight"},
        fields={"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora"},
        fixed={"use_dora": False},
    )
    restores_rounding: ClassVar[bool] = True

    rank: int = Field(8, ge=1, description="rank r of the update, and of what is restored")
    alpha: float = Field(
        16.0, gt=0, description="numerator of s = alpha / rank; it changes step sizes, not the initial function"
    )
    rslora: bool = Field(False, description="s = alpha / sqrt(rank)")
    iterations: int = Field(
        1, ge=1, description="alternations T; 1 leaves the base as it is, more need a base of the adapter's own"
    )
    start: Literal["rounding", "principal"] = Field(
        "rounding",
        description="what the factors begin with: what quantising took, or (QPiSSA, on a base of its own) the "
        "principal directions of the weight, of which codes keep the rest",
    )
    svd: Literal["exact", "lowrank"] = Field(
        "exact", description="full decomposition, or seeded subspace iteration (faster, nearly equal)"
    )
    niter: int = Field(4, ge=0, description="power iterations of `svd: lowrank`")

    @property
    def private(self) -> bool:
        """Whether it chooses the codes of a packed weight, so that nobody else can share them."""
        return self.iterations > 1 or self.start == "principal"

    def scaling(self) -> float:
        """`α/r`, or `α/√r` with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        check_rank(self.rank, site)
        return {
            "A": ParamSpec((self.rank, *site.shape[1:]), decay=False, group="A"),
            "B": ParamSpec((site.out_features, self.rank), decay=False, group="B"),
        }

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        residual_OI = weight.residual()
        if residual_OI is None:
            return {"A": uniform(self.params(site)["A"].shape, math.prod(site.shape[1:]) ** -0.5, rng)}
        if self.private:
            how = f"{self.iterations} iterations" if self.iterations > 1 else "start: principal"
            raise MethodError(
                f"LoftQ with {how} chooses the codes of site {site.name!r} anew, and this base is one that others "
                "share.",
                hint="Leave `iterations` at 1 and `start` at rounding, or train with a base of its own: `lorica train` "
                "makes one.",
            )
        return self.factors(leading(residual_OI, self.rank, self.steps, rng))

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        return LinearUpdate(factors=(LowRank(p["A"], p["B"], self.scaling()),))

    @property
    def steps(self) -> int | None:
        """Steps of the subspace iteration; None decomposes exactly."""
        return None if self.svd == "exact" else self.niter

    def factors(self, triplets: Triplets) -> dict[str, Tensor]:
        """A and B with `sBA = U Σ Vᵀ`. A direction with σ = 0 keeps a row of A, so that it can learn from B = 0."""
        U_OR, S_R, V_RI = triplets
        root_R = (S_R / self.scaling()).sqrt()
        return {"A": torch.where(root_R > 0, root_R, 3**-0.5)[:, None] * V_RI, "B": U_OR * root_R}
