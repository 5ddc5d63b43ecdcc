"""MultiLoRA: several low-rank products beside each weight, each with a trained scale for its outputs.

In: a site. Out: one pair of stacked factors. Refuses to know rows and optimisers.
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
from lorica.methods.base import BaseWeight, Paper
from lorica.methods.lora import LearningRates, check_rank, uniform


class MultiLoRA(LearningRates):
    """Parallel LoRA modules with trained scales: `y = x W₀ᵀ + b₀ + s Σ_k c_k ⊙ (drop(x) A_kᵀ B_kᵀ)`, `s = α/r`.

    A is [n, r, in] and B is [n, out, r] for n modules; c is [n, out], or [n, 1] with `scales: scalar`. Every A_k and
    B_k starts Kaiming-uniform (`U(±1/√in)`, `U(±1/√r)`) and c at zero, so step 0 is the base and only c has a gradient
    there; A and B follow from the second step. c is not decayed. It is folded into B, so that all is one plain low-rank
    term of rank n·r, alone and in mixed batches. Parameters: n(r(in + out) + out), scalar n(r(in + out) + 1). Raises
    MethodError when n·r exceeds a site. Paper: arXiv 2311.11501, whose code is not public: the initial scales follow
    re-implementations.
    """

    name: ClassVar[str] = "multilora"
    summary: ClassVar[str] = "parallel low-rank products with trained output scales"
    paper: ClassVar[Paper] = Paper("MultiLoRA: Democratizing LoRA for Better Multi-Task Learning", "2023", "2311.11501")
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert", "conv"})

    rank: int = Field(8, ge=1, description="rank r of each module")
    modules: int = Field(3, ge=1, description="number n of parallel modules")
    alpha: float = Field(16.0, gt=0, description="numerator of s = alpha / rank")
    scales: Literal["vector", "scalar"] = Field(
        "vector", description="a scale for each output of a module, or one for the whole module"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the low-rank path, in training only")

    def scaling(self) -> float:
        """`α/r`."""
        return self.alpha / self.rank

    def params(self, site: Site) -> dict[str, ParamSpec]:
        n, out = self.modules, site.out_features
        check_rank(n * self.rank, site)
        return {
            "A": ParamSpec((n, self.rank, *site.shape[1:]), group="A"),
            "B": ParamSpec((n, out, self.rank), group="B"),
            "c": ParamSpec((n, out if self.scales == "vector" else 1), decay=False, group="c"),
        }

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        specs = self.params(site)
        return {
            "A": uniform(specs["A"].shape, math.prod(site.shape[1:]) ** -0.5, rng),
            "B": uniform(specs["B"].shape, self.rank**-0.5, rng),
        }

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        scaled_NOR = p["c"][:, :, None] * p["B"]
        joint = LowRank(p["A"].flatten(0, 1), scaled_NOR.movedim(0, 1).flatten(1), self.scaling())
        return LinearUpdate(factors=(joint,), dropout=self.dropout)
