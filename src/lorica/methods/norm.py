"""Norm tuning: the gains (and shifts) of normalisation layers are trained, nothing else.

In: a norm site. Out: the difference to its frozen weight and bias. Refuses to know rows and optimisers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, ParamSpec
from lorica.methods.base import BaseWeight, Method, Paper, PeftNames


class Norm(Method):
    """Norm tuning: `y = normalise(x) ⊙ (w₀ + Δw) (+ b₀ + Δb)` at every LayerNorm, RMSNorm or GroupNorm.

    Δw is [features], and Δb too where the norm has a bias; both start at zero and are not decayed. HF PEFT stores w₀
    + Δw. It needs learning rates far above 1e-4. Parameters: the features of each norm, twice with a bias. Paper:
    arXiv 2312.11420.
    """

    name: ClassVar[str] = "norm"
    summary: ClassVar[str] = "gains and shifts of the normalisation layers"
    paper: ClassVar[Paper] = Paper(
        "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", "ICLR 2024", "2312.11420"
    )
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"norm"})
    default_targets: ClassVar[str | tuple[str, ...]] = "all-norm"
    peft: ClassVar[PeftNames | None] = PeftNames(
        "LN_TUNING", tensors={"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"}, fields={}, fixed={}
    )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        spec = ParamSpec(site.shape, decay=False)
        return {"weight": spec, "bias": spec} if site.bias else {"weight": spec}

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        return LinearUpdate(delta=p["weight"], bias_O=p.get("bias"))
