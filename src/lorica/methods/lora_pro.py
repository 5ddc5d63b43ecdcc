"""LoRA-Pro: LoRA whose steps follow the full weight's gradient as closely as two factors can.

In: LoRA's factors and their gradients. Out: the same lowering, and gradients replaced before a step so that the change
of `sBA` is the projection of a full step. The full gradient is never needed. Refuses to know rows and learning rates.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.optim.adamw import adamw

from lorica.core.errors import ConfigError
from lorica.core.tangent import Choice, Tangent, tangents
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
        overshoots, ats = [], _tangents(list(step.sites.values()), self.damping)
        # one for all: fresh pages for each block would take longer than its arithmetic
        room = ats[0].A_RI.new_empty(2, max(_rows(at) * at.A_RI.shape[1] for at in ats) if full else 0)
        for (name, own), at in zip(step.sites.items(), ats, strict=True):
            gA_RI, gB_OR = own.grads["A"].flatten(1).to(at.A_RI), own.grads["B"].to(at.B_OR)
            if full:
                gA_RI, gB_OR = _through_adam(step, name, at, *at.solve(gA_RI, gB_OR, "zero"), room)
            hA_RI, hB_OR = at.solve(gA_RI, gB_OR, self.x_choice)
            overshoots.append(step.lr * at.overshoot(gA_RI, gB_OR, hA_RI, hB_OR))
            own.grads["A"].copy_(hA_RI.view_as(own.grads["A"]))
            own.grads["B"].copy_(hB_OR)
        step.state["overshoot"] = torch.stack(overshoots).max()


def _tangents(sites: list[SiteStep], damping: float) -> list[Tangent]:
    """The closed form at every site, with the scaling that its own rank and alpha give."""
    methods = [own.method for own in sites if isinstance(own.method, LoRAPro)]
    factors = [(own.values["A"], own.values["B"], m.scaling()) for own, m in zip(sites, methods, strict=True)]
    return tangents(factors, damping)


def _rows(at: Tangent) -> int:
    """How many rows of a weight's shape go through Adam at a time."""
    rows, columns = len(at.B_OR), at.A_RI.shape[1]
    return min(rows, max(1, BLOCK // columns)) if at.A_RI.device.type == "cpu" else rows


def _through_adam(
    step: Step, site: str, at: Tangent, hA_RI: Tensor, hB_OR: Tensor, room: Tensor
) -> tuple[Tensor, Tensor]:
    """`sBᵀD` and `sDAᵀ` of Adam's direction D [out, in] for g̃, by blocks of rows that stay in the cache. `room` has two
    rows as long as a block.
    """
    shape = len(at.B_OR), at.A_RI.shape[1]
    names = f"{site}/exp_avg", f"{site}/exp_avg_sq"
    for name in names:
        if name not in step.state:
            step.state[name] = at.A_RI.new_zeros(shape)
    moments = [step.state[name] for name in names]
    left_OK, right_KI = at.sides(hA_RI, hB_OR)
    gA_RI, gB_RO = torch.zeros_like(at.A_RI), at.B_OR.new_empty(at.B_OR.T.shape)
    rows = _rows(at)
    blocks = room[:, : rows * shape[1]].view(2, rows, shape[1])
    for start in range(0, shape[0], rows):
        own = slice(start, start + rows)
        g_OI, adam_OI = blocks[:, : len(left_OK[own])]
        _adam(step, torch.mm(left_OK[own], right_KI, out=g_OI), adam_OI.zero_(), *(moment[own] for moment in moments))
        gA_RI.addmm_(at.B_OR[own].T, adam_OI)
        gB_RO[:, own] = at.A_RI @ adam_OI.T  # kernels are slow where the narrow side comes second
    return gA_RI.mul_(at.s), gB_RO.T * at.s


def _adam(step: Step, g_OI: Tensor, direction_OI: Tensor, first_OI: Tensor, second_OI: Tensor) -> None:
    """Adam's direction `m̂ / (√v̂ + ε)` for g̃, whose moments move on: torch's own step from zero, at a rate of 1."""
    done = torch.tensor(float(step.done), device=g_OI.device)
    adamw(
        [direction_OI],
        [g_OI],
        [first_OI],
        [second_OI],
        [],
        [done],
        fused=True,
        amsgrad=False,
        beta1=step.betas[0],
        beta2=step.betas[1],
        lr=1.0,
        weight_decay=0.0,
        eps=step.eps,
        maximize=True,
    )
