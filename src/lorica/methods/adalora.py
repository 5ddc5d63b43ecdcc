"""AdaLoRA: a low-rank update in the form of singular triplets, whose number is shared out between sites in training.

In: triplets with their gradients at a step. Out: the lowering, a push of P and Q towards orthonormal, and a mask of the
triplets that the budget has room for, over all sites at once. Refuses to know losses: what it adds, it adds to the
gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorica.core.budget import cubic_budget, keep_best, last_choice, orthogonality_gradient
from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, LowRank, ParamSpec
from lorica.methods.base import BaseWeight, Paper, PeftNames, SiteStep, Step
from lorica.methods.lora import LearningRates, check_rank

TRAINED: dict[str, int | None] = {"E": None, "P": 0, "Q": 1}
"""The trained tensors, and the axis over which a triplet's part of each is averaged."""
KEPT = ("importance", "uncertainty")


class AdaLoRA(LearningRates):
    """Adaptive budget allocation: `y = x W₀ᵀ + b₀ + s · drop(x) (P diag(E) Q)ᵀ`, `s = α / (r₀ + 1e-5)`.

    P is [out, r], E [r], Q [r, in]; E starts at zero. Every step adds the gradient of `orthogonality · mean over all P
    and Q of ‖PᵀP − I‖` to P's and Q's. After it, importances `I = |w · ∂L/∂w|` are smoothed, `Ī ← β₁Ī + (1−β₁)I`, `Ū ←
    β₂Ū + (1−β₂)|I − Ī|`, and a triplet scores `ĪŪ` of its E plus the means over its column of P and row of Q. The
    budget of all sites falls from b₀ = Σr to `keep · b₀` by a cubic; E of all but the best is set to 0, exactly as many
    as it leaves out. Parameters: r(in + out + 1) a site. Raises MethodError when the rank exceeds a site, and at the
    first step when nobody said how many there are. Paper: arXiv 2303.10512.
    """

    name: ClassVar[str] = "adalora"
    summary: ClassVar[str] = "singular triplets whose number is shared out between sites in training"
    paper: ClassVar[Paper] = Paper(
        "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", "ICLR 2023", "2303.10512"
    )
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert", "conv"})
    peft: ClassVar[PeftNames | None] = PeftNames(
        "ADALORA",
        tensors={"P": "lora_B", "E": "lora_E", "Q": "lora_A"},
        fields={
            "init_r": "rank",
            "lora_alpha": "alpha",
            "lora_dropout": "dropout",
            "tinit": "warmup",
            "tfinal": "final",
            "deltaT": "every",
            "beta1": "beta1",
            "beta2": "beta2",
            "orth_reg_weight": "orthogonality",
            "total_step": "steps",
        },
        fixed={"use_dora": False, "bias": "none"},
    )

    rank: int = Field(12, ge=1, description="triplets a site starts with")
    keep: float = Field(2 / 3, gt=0, le=1, description="share of all triplets that is left in the end")
    alpha: float = Field(8.0, gt=0, description="numerator of the scaling s = alpha / (scale_rank + 1e-5)")
    scale_rank: int | None = Field(
        None, ge=1, description="denominator of the scaling; null is `rank`. Pruning keeps it, so that s stays"
    )
    steps: int | None = Field(None, ge=1, description="optimiser steps of the whole run; null takes those planned")
    warmup: int = Field(0, ge=0, description="first steps, in which every triplet stays")
    final: int = Field(0, ge=0, description="last steps, in which the choice of triplets is fixed")
    every: int = Field(1, ge=1, description="steps from one choice of triplets to the next")
    beta1: float = Field(0.85, gt=0, lt=1, description="decay rate of the smoothed importance")
    beta2: float = Field(0.85, gt=0, lt=1, description="decay rate of its uncertainty")
    orthogonality: float = Field(0.5, ge=0, description="weight of the penalty on P and Q; the authors' code has 0.1")
    penalty: Literal["norm", "square"] = Field("norm", description="‖PᵀP − I‖ as in the authors' code, or its square")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the low-rank path, in training only")

    def scaling(self) -> float:
        """`α / (r₀ + 1e-5)`, of the rank before any pruning."""
        return self.alpha / ((self.scale_rank or self.rank) + 1e-5)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        check_rank(self.rank, site)
        return {
            "P": ParamSpec((site.out_features, self.rank), group="B"),
            "E": ParamSpec((self.rank,), group="E"),
            "Q": ParamSpec((self.rank, *site.shape[1:]), group="A"),
            "mask": ParamSpec((self.rank,), trainable=False, changes=True),
        }

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        drawn = {name: torch.empty(self.params(site)[name].shape).normal_(std=0.02, generator=rng) for name in "PQ"}
        return {**drawn, "mask": torch.ones(self.rank)}

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        # E is folded into P, so that rows of this method share one grouped product with plain LoRA
        return LinearUpdate(factors=(LowRank(p["Q"], p["P"] * p["E"], self.scaling()),), dropout=self.dropout)

    def before_step(self, step: Step) -> None:
        self.last(step)  # asked for before anything changes
        weight = self.orthogonality / (2 * len(step.sites))
        for own in step.sites.values() if weight else ():
            for param, matrix in (("P", own.values["P"]), ("Q", own.values["Q"].flatten(1).T)):
                push = weight * orthogonality_gradient(matrix, square=self.penalty == "square")
                own.grads[param].add_((push if param == "P" else push.T).reshape(own.grads[param].shape))

    def last(self, step: Step) -> int:
        """The step in which the choice becomes final. Raises MethodError where no step is left for choosing."""
        return last_choice(self.steps or step.total, self.warmup, self.final)

    def after_step(self, step: Step) -> None:
        t, last = step.done + 1, self.last(step)
        if t < last:
            for name, own in step.sites.items():
                self._smooth(step.state, name, own)
        masks = [own.values["mask"] for own in step.sites.values()]
        start = sum(len(mask) for mask in masks)
        budget, due = cubic_budget(t, start, max(1, round(self.keep * start)), self.warmup, last, self.every)
        if due and t <= last:
            keep_best([_score(step.state, name, own) for name, own in step.sites.items()], masks, budget)
        if due:
            for own, mask in zip(step.sites.values(), masks, strict=True):
                own.values["E"].masked_fill_(mask == 0, 0.0)
        if t == last:
            step.state.clear()

    def _smooth(self, state: dict[str, Tensor], name: str, own: SiteStep) -> None:
        for param in TRAINED:
            now = (own.values[param] * own.grads[param]).abs()
            for kind in KEPT:
                if f"{name}/{param}/{kind}" not in state:
                    state[f"{name}/{param}/{kind}"] = torch.zeros_like(now)
            importance, uncertainty = (state[f"{name}/{param}/{kind}"] for kind in KEPT)
            importance.lerp_(now, 1 - self.beta1)
            uncertainty.lerp_((now - importance).abs(), 1 - self.beta2)


def _score(state: Mapping[str, Tensor], name: str, own: SiteStep) -> Tensor:
    """Scores [r] of a site's triplets; zeros while nothing is kept of them."""
    total_R = torch.zeros_like(own.values["E"])
    for param, axis in TRAINED.items():
        if f"{name}/{param}/{KEPT[0]}" in state:
            both = state[f"{name}/{param}/{KEPT[0]}"] * state[f"{name}/{param}/{KEPT[1]}"]
            total_R += both if axis is None else both.flatten(1).mean(axis)
    return total_R
