"""DoRA: a low-rank update of each weight row's direction, and a trained magnitude for each row.

In: a site and its frozen weight's row norms. Out: LoRA's factors and an output scale. The norm of the changed weight
comes from terms of rank r; the sum W₀ + sBA is never formed. Refuses to know rows and optimisers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, ParamSpec
from lorica.methods.base import BaseWeight, Paper, PeftNames
from lorica.methods.lora import LoRA

TINY = 1e-30
"""Smallest squared norm; the initial magnitude has the same floor, so a zero row also starts at a scale of 1."""


class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation: `y = (m / n) ⊙ (x W₀ᵀ + s·drop(x) Aᵀ Bᵀ) + b`, `n_j = ‖(W₀ + sBA)_j‖₂`.

    A is [r, in], B is [out, r], m is [out] and starts as the row norms of W₀. With `norm="detached"` n is a constant
    in backward (the paper's section 4.3, and what HF PEFT does); with "full" gradients flow through it. m is not
    decayed. Dropout acts on the low-rank path alone; the reference code also mixes the dropped input into the base
    term. Parameters: r(in + out) + out a site. Raises MethodError when the rank exceeds a site. Paper: arXiv
    2402.09353.
    """

    name: ClassVar[str] = "dora"
    summary: ClassVar[str] = "low-rank update of directions, and a trained magnitude for each output"
    paper: ClassVar[Paper] = Paper("DoRA: Weight-Decomposed Low-Rank Adaptation", "ICML 2024", "2402.09353")
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert", "embedding", "conv"})
    peft: ClassVar[PeftNames | None] = PeftNames(
        "LORA",
        tensors={"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"},
        fields={"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora"},
        fixed={"use_dora": True, "lora_bias": False},
    )

    lora_bias: bool = Field(False, description="always false: DoRA leaves the bias alone")
    norm: Literal["detached", "full"] = Field(
        "detached", description="whether the row norm is a constant in backward, or differentiated"
    )

    @field_validator("lora_bias")
    @classmethod
    def _no_bias(cls, value: bool) -> bool:
        if value:
            raise ValueError("DoRA trains no bias; use the method 'bias' beside it, or LoRA")
        return value

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {**super().params(site), "m": ParamSpec((site.out_features,), decay=False, group="m")}

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        return {**super().init(site, weight, rng), "m": weight.row_square_norm().clamp_min(TINY).sqrt()}

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        plain = super().lower(site, p, weight)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.norm == "full"):
            n_O = row_norm(weight, p["A"], p["B"], self.scaling()).to(p["m"].dtype)
        return LinearUpdate(factors=plain.factors, out_scale_O=p["m"] / n_O, dropout=plain.dropout)


def row_norm(weight: BaseWeight, A_RI: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """`‖(W₀ + sBA)_j‖₂` of each row, from `‖w_j‖² + 2s⟨(W₀Aᵀ)_j, B_j⟩ + s² B_j (AAᵀ) B_jᵀ`; [out], float32 or wider.

    The square is floored at `TINY`: where a row is cancelled almost wholly, rounding can make it negative.
    """
    square_O = weight.row_square_norm()
    W_OI, A_RI = weight.matrix().flatten(1), A_RI.flatten(1)
    # in the base's own dtype: of a half-precision base only the cross term is rounded, by no more than its weights were
    cross_OR = (W_OI @ A_RI.T.to(W_OI.dtype)).to(square_O.dtype)
    A_RI, B_OR = A_RI.to(square_O.dtype), B_OR.to(square_O.dtype)
    square_O = square_O + 2 * scale * (cross_OR * B_OR).sum(1) + scale**2 * ((B_OR @ (A_RI @ A_RI.T)) * B_OR).sum(1)
    return square_O.clamp_min(TINY).sqrt()
