"""BitFit: only bias terms are trained.

In: a site that has a bias. Out: the difference to it. Refuses to know rows and optimisers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from lorica.core.errors import MethodError
from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, ParamSpec
from lorica.methods.base import BaseWeight, Method, Paper


class Bias(Method):
    """Bias-term fine-tuning: `y = x W₀ᵀ + b₀ + Δb`.

    Δb is [out], starts at zero and is not decayed. Raises MethodError at a site without a bias: models such as Llama
    have none, GPT-2, BERT and ViT have one in nearly every layer. Parameters: out a site. Paper: arXiv 2106.10199.
    """

    name: ClassVar[str] = "bias"
    summary: ClassVar[str] = "bias terms only"
    paper: ClassVar[Paper] = Paper(
        "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
        "ACL 2022",
        "2106.10199",
    )
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv", "norm"})
    default_targets: ClassVar[str | tuple[str, ...]] = "all-bias"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        if not site.bias:
            raise MethodError(
                f"Site {site.name!r} has no bias to train; the target 'all-bias' selects the sites that have one.",
                hint="On a model without biases, norm tuning (`norm`) is the nearest method.",
            )
        return {"bias": ParamSpec((site.out_features,), decay=False)}

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        return LinearUpdate(bias_O=p["bias"])
