"""A method that uses every part of an update at once, so that the contract covers their combinations.

It stands for any method that is yet to come; it is no part of the registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, LowRank, ParamSpec
from lorica.methods.base import BaseWeight, Method, Paper


class Everything(Method):
    """`y = u ⊙ ((x ⊙ v)(W₀ + D)ᵀ + x Aᵀ Bᵀ) + b₀ + c`."""

    name: ClassVar[str] = "everything"
    summary: ClassVar[str] = "every part of an update"
    paper: ClassVar[Paper] = Paper("One-for-All: Generalized LoRA", "2023", "2306.07967")
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert", "conv"})

    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the low-rank path")

    def params(self, site: Site) -> dict[str, ParamSpec]:
        specs = {
            "u": ParamSpec((site.out_features,), decay=False, group="scales"),
            "v": ParamSpec((site.in_features,), decay=False, group="scales"),
            "D": ParamSpec(site.shape),
            "A": ParamSpec((2, *site.shape[1:])),
            "B": ParamSpec((site.out_features, 2)),
        }
        return {**specs, "c": ParamSpec((site.out_features,), decay=False)} if site.bias else specs

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        values = {name: torch.zeros(spec.shape) for name, spec in self.params(site).items()}
        values["A"].normal_(std=0.1, generator=rng)
        return {**values, "u": values["u"] + 1, "v": values["v"] + 1}

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        return LinearUpdate((LowRank(p["A"], p["B"]),), p["D"], p["v"], p["u"], p.get("c"), self.dropout)
