"""LoRA-FA: LoRA whose A stays as it was drawn; only B is trained.

In: a site. Out: factors of which one is frozen, and on wish a correction of B's gradient before each step.
Refuses to know rows and how a step is made.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorica.core.site import Site, SiteKind
from lorica.core.update import ParamSpec
from lorica.methods.base import Paper, PeftNames, Step
from lorica.methods.lora import LoRA


class LoRAFA(LoRA):
    """LoRA with a frozen A: `y = x W₀ᵀ + b₀ + s · drop(x) Aᵀ Bᵀ (+ s·b_B)`, `s = α/r` (rsLoRA: `α/√r`).

    A is [r, in], random and frozen; B is [out, r] and starts at zero. For B's gradient `x Aᵀ` is enough, r numbers a
    token, so x need not be kept. With `correct`, each step uses `g (AAᵀ + δI)⁻¹ / s²` instead of B's gradient g, the
    change of B whose effect `s·ΔB·A` is nearest to the weight's own gradient; δ is the gradient's rounding error
    relative to AAᵀ. Parameters: r·out a site. Raises MethodError when the rank exceeds a site. Papers: arXiv
    2308.03303; the correction is that of HF PEFT's optimiser.
    """

    name: ClassVar[str] = "lora_fa"
    summary: ClassVar[str] = "LoRA that trains B only"
    paper: ClassVar[Paper] = Paper(
        "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", "2023", "2308.03303"
    )
    # not embeddings: their A starts at zero, and would stay there
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert", "conv"})
    peft: ClassVar[PeftNames | None] = LoRA.peft

    init_factor: Literal["a"] = Field("a", description="always a: a frozen factor of zeros could never act")
    correct: bool = Field(
        False,
        description="precondition B's gradient by (A Aᵀ)⁻¹ / s² before each step; it comes after clipping, and Adam "
        "undoes most of it where A is wide and random, so it is off unless asked for",
    )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        specs = super().params(site)
        return {**specs, "A": ParamSpec(specs["A"].shape, trainable=False)}

    def before_step(self, step: Step) -> None:
        for own in step.sites.values():
            if isinstance(own.method, LoRAFA) and own.method.correct:
                g_OR = own.grads["B"]
                g_OR.copy_(corrected(g_OR, own.values["A"], own.method.scaling()))


def corrected(g_OR: Tensor, A_RI: Tensor, scale: float) -> Tensor:
    """`g (AAᵀ + δI)⁻¹ / s²`, computed in float64: with `g = s G Aᵀ`, `s · result · A` is G projected on A's rows.

    δ is the mean of AAᵀ's diagonal times the rounding error of g: directions that g cannot tell apart are not blown up.
    """
    A_RI = A_RI.detach().flatten(1).double()
    gram_RR = A_RI @ A_RI.T
    damped_RR = gram_RR + torch.finfo(g_OR.dtype).eps * gram_RR.diagonal().mean() * torch.eye(len(gram_RR)).to(gram_RR)
    solved_RO: Tensor = torch.linalg.solve(damped_RR, g_OR.double().T)
    return (solved_RO.T / scale**2).to(g_OR.dtype)
