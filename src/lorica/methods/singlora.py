"""SingLoRA: one matrix on both sides of the low-rank product, ramped up from nothing.

In: a site. Out: one factor, of which A and B are slices, and a count of optimiser steps. There is no second factor
whose size could drift from the first one's. Refuses to know rows, micro-batches and optimisers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, LowRank, ParamSpec
from lorica.methods.base import BaseWeight, Method, Paper, Step
from lorica.methods.lora import check_rank, uniform


class SingLoRA(Method):
    """Single-matrix adaptation: `y = x W₀ᵀ + b₀ + s·u(t)·x A_i A_oᵀ`, `s = α/r`, `u(t) = min(t/T, 1)`.

    A is [max(out, in), r], `A_i` its first `in` rows, `A_o` its first `out`; where out = in the change `s·u·A Aᵀ` is
    symmetric and positive. t counts optimiser steps, neither forward passes nor micro-batches, and is saved. Step 0 is
    the base, and as u(0) = 0 the first step only advances t. Entries of A are Θ(1/√max(out, in)). Decay of A shrinks
    the change as its square. Parameters: r·max(out, in) a site. Raises MethodError when the rank exceeds a site. Paper:
    arXiv 2507.05566.
    """

    name: ClassVar[str] = "singlora"
    summary: ClassVar[str] = "low-rank product of one matrix with itself, ramped up from nothing"
    paper: ClassVar[Paper] = Paper("SingLoRA: Low Rank Adaptation Using a Single Matrix", "arXiv 2025", "2507.05566")
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert", "conv"})

    rank: int = Field(8, ge=1, description="rank r of the update; it costs about half of LoRA's parameters")
    alpha: float = Field(8.0, gt=0, description="numerator of the scaling s = alpha / rank")
    ramp: int = Field(
        10, ge=1, description="optimiser steps T over which u rises from 0 to 1; the paper takes about 1 % of the run"
    )
    init_dist: Literal["kaiming", "normal"] = Field(
        "kaiming", description="initial A: U(±1/√n) or N(0, 1/n), with n = max(out, in)"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the low-rank path, in training only")

    def params(self, site: Site) -> dict[str, ParamSpec]:
        check_rank(self.rank, site)
        return {"A": ParamSpec((_longer(site), self.rank), group="A")}

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        # the fan is the longer side, not the rank: `kaiming_uniform_` on a tensor [n, r] would make A √(n/r) too large
        n = _longer(site)
        if self.init_dist == "kaiming":
            return {"A": uniform((n, self.rank), n**-0.5, rng)}
        return {"A": torch.empty(n, self.rank).normal_(std=n**-0.5, generator=rng)}

    def global_params(self, sites: Sequence[Site]) -> dict[str, ParamSpec]:
        return {"t": ParamSpec((1,), trainable=False, changes=True)}

    def init_global(self, sites: Sequence[Site], rng: torch.Generator) -> dict[str, Tensor]:
        return {"t": torch.zeros(1)}

    def after_step(self, step: Step) -> None:
        # counted here rather than read from `step.done`: a new optimiser must not send a trained adapter back to u = 0
        step.shared.values["t"].add_(1)

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        A_NR = p["A"]
        u = (p["t"] / self.ramp).clamp(max=1).to(A_NR.dtype)
        A_RI = A_NR[: math.prod(site.shape[1:])].T.reshape(self.rank, *site.shape[1:])
        factor = LowRank(A_RI, u * A_NR[: site.out_features], self.alpha / self.rank)
        return LinearUpdate(factors=(factor,), dropout=self.dropout)


def _longer(site: Site) -> int:
    """`max(out, in)`; a convolution's kernel counts as inputs."""
    return max(site.out_features, math.prod(site.shape[1:]))
