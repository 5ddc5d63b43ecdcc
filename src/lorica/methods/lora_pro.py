"""LoRA-Pro: LoRA whose steps follow the full weight's gradient as closely as two factors can.

In: LoRA's factors and their gradients. Out: the same lowering, and gradients replaced before a step so that the change
of `sBA` is the projection of a full step. The full gradient is never needed. Refuses to know rows and learning rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from lorica.core.errors import ConfigError
from lorica.core.tangent import Choice, Tangent, tangent
from lorica.methods.base import Paper, SiteStep, Step
from lorica.methods.lora import LoRA

BLOCK = 2**17
"""Elements of a weight's shape that go through Adam at a time on a CPU, fewer of which would cost too many calls."""


class LoRAPro(LoRA):
    """LoRA with adjusted gradients: `h_A = (1/s²)(BᵀB)⁻¹g_A + XA`, `h_B = (1/s²)(I − P_B) g_B (AAᵀ)⁻¹ − BX`.

    With them `g̃ = s·B h_A + s·h_B A = P_B G + (I − P_B) G P_A` is the projection of the weight's gradient G [out, in]
    on what the factors can reach, whatever X [r, r], s and the split of BA. `optimizer: adamw` with `state: full` keeps
    Adam's moments of g̃, [out, in] a site, and projects Adam's direction; with `state: factor` h_A and h_B go through
    AdamW; `sgd` steps by h_A, h_B. Rates are those of full fine-tuning. While B = 0, `h_A = 0`. The optimiser's state
    has `overshoot`, the largest `lr·s‖h_B h_A‖ / ‖g̃‖` of a site: the part of a step that the projection neglects.
    Parameters: LoRA's. Raises MethodError when the rank exceeds a site. Paper: arXiv 2407.18242.
    """

    name: ClassVar[str] = "lora_pro"
    summary: ClassVar[str] = "LoRA whose steps follow the full gradient as closely as two factors can"
    paper: ClassVar[Paper] = Paper("LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", "ICLR 2025", "2407.18242")

    lora_bias: bool = Field(False, description="always false: the adjustment is for two factors")
    lr_ratio: float = Field(1.0, gt=0, description="always 1: the two factors' steps belong together")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="what the projected gradient goes through")
    state: Literal["full", "factor"] = Field(
        "full", description="where Adam's moments live: in the weight's shape (2·out·in a site) or in the factors'"
    )
    x_choice: Choice = Field(
        "sylvester", description="the free r×r matrix X: nearest to the plain gradients, evenly split, or none"
    )
    damping: float = Field(
        1e-8, ge=0, lt=1, description="directions whose share of a factor's squared norm is below this are left alone"
    )

    @field_validator("lora_bias")
    @classmethod
    def _no_bias(cls, value: bool) -> bool:
        if value:
            raise ValueError("LoRA-Pro trains no bias; use the method 'bias' beside it, or LoRA")
        return value

    @field_validator("lr_ratio")
    @classmethod
    def _one_rate(cls, value: float) -> float:
        if value != 1:
            raise ValueError("LoRA-Pro steps both factors with one rate; LoRA+ is for LoRA")
        return value

    @model_validator(mode="after")
    def _no_state(self) -> Self:
        if self.optimizer == "sgd" and self.state == "factor":
            raise ConfigError("LoRAPro.state is 'factor', but optimizer 'sgd' keeps no state; leave it out.")
        return self

    @property
    def plain_steps(self) -> bool:
        return self.optimizer == "sgd" or self.state == "full"

    def before_step(self, step: Step) -> None:
        full = self.optimizer == "adamw" and self.state == "full"
        overshoots = []
        for names in _alike(step.sites):
            sites = [step.sites[name] for name in names]
            at = _tangent(sites, self.damping)
            gA_SRI = torch.stack([own.grads["A"].flatten(1) for own in sites]).to(at.A_SRI)
            gB_SOR = torch.stack([own.grads["B"] for own in sites]).to(at.B_SOR)
            if full:
                gA_SRI, gB_SOR = _through_adam(step, names, at, *at.solve(gA_SRI, gB_SOR, "zero"))
            hA_SRI, hB_SOR = at.solve(gA_SRI, gB_SOR, self.x_choice)
            overshoots.append(step.lr * at.overshoot(gA_SRI, gB_SOR, hA_SRI, hB_SOR))
            for own, hA_RI, hB_OR in zip(sites, hA_SRI, hB_SOR, strict=True):
                own.grads["A"].copy_(hA_RI.view_as(own.grads["A"]))
                own.grads["B"].copy_(hB_OR)
        step.state["overshoot"] = torch.cat(overshoots).max()


def _alike(sites: Mapping[str, SiteStep]) -> list[list[str]]:
    """The sites whose factors have the same shapes: their many small products are a few larger ones."""
    found: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for name, own in sites.items():
        found.setdefault((own.values["A"].shape, own.values["B"].shape), []).append(name)
    return list(found.values())


def _tangent(sites: list[SiteStep], damping: float) -> Tangent:
    """The closed form at sites of one shape, with the scaling that each one's rank and alpha give."""
    scalings = [own.method.scaling() for own in sites if isinstance(own.method, LoRAPro)]
    A_SRI = torch.stack([own.values["A"].flatten(1) for own in sites])
    return tangent(A_SRI, torch.stack([own.values["B"] for own in sites]), scalings, damping)


def _through_adam(step: Step, names: list[str], at: Tangent, hA_SRI: Tensor, hB_SOR: Tensor) -> tuple[Tensor, Tensor]:
    """`sBᵀD` and `sDAᵀ` of Adam's direction D [out, in] for g̃ at each site, whose moments move on; by blocks of rows
    that stay in the cache.
    """
    left_SOK, right_SKI = at.sides(hA_SRI, hB_SOR)
    B_SRO = at.B_SOR.mT.contiguous()
    gA_SRI, gB_SRO = torch.zeros_like(at.A_SRI), torch.empty_like(B_SRO)
    height, width = at.B_SOR.shape[1], at.A_SRI.shape[2]
    rows = min(height, max(1, BLOCK // width)) if at.A_SRI.device.type == "cpu" else height
    # one for all: fresh pages for each block would take longer than its arithmetic
    blocks = at.A_SRI.new_empty(2, rows, width)
    count = torch.tensor(step.done + 1.0, device=at.A_SRI.device)
    for i, name in enumerate(names):
        moments = [_moment(step, f"{name}/{kind}", at, (height, width)) for kind in ("exp_avg", "exp_avg_sq")]
        for start in range(0, height, rows):
            own = slice(start, start + rows)
            g_OI, adam_OI = blocks[:, : len(left_SOK[i, own])]
            torch.mm(left_SOK[i, own], right_SKI[i], out=g_OI)
            _adam(step, count, g_OI, adam_OI.zero_(), *(moment[own] for moment in moments))
            gA_SRI[i].addmm_(B_SRO[i, :, own], adam_OI)
            gB_SRO[i, :, own] = at.A_SRI[i] @ adam_OI.T  # kernels are slow where the narrow side comes second
    return gA_SRI.mul_(at.s_S11), gB_SRO.mT * at.s_S11


def _moment(step: Step, name: str, at: Tangent, shape: tuple[int, int]) -> Tensor:
    if name not in step.state:
        step.state[name] = at.A_SRI.new_zeros(shape)
    return step.state[name]


def _adam(step: Step, count: Tensor, g_OI: Tensor, direction_OI: Tensor, first_OI: Tensor, second_OI: Tensor) -> None:
    """Adam's direction `m̂ / (√v̂ + ε)` for g̃, whose moments move on: a step of torch's kernel from zero, at a rate
    of 1. What `torch.optim` does around the kernel would take as long as a block.
    """
    torch._fused_adamw_(
        [direction_OI], [g_OI], [first_OI], [second_OI], [], [count], lr=1.0, beta1=step.betas[0], beta2=step.betas[1],
        weight_decay=0.0, eps=step.eps, amsgrad=False, maximize=True,
    )  # fmt: skip
