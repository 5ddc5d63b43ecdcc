"""LoRA-Soups (CAT): the factors of several adapters side by side, frozen, and a trained weight of each at every site.

In: a site. Out: one pair of concatenated factors with the weights between them. Refuses to know where the factors come
from (`adapters.soups` puts those of parents there) and how it is exported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from lorica.core.errors import ConfigError
from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, LowRank, ParamSpec
from lorica.methods.base import BaseWeight, Method, Paper
from lorica.methods.lora import uniform


class LoRASoups(Method):
    """Learnable concatenation: `y = x W₀ᵀ + b₀ + Σ_n ω_n x A_nᵀ B_nᵀ`, `ω = mix`, or `ω = softmax(mix)`.

    A is [Σr, in] and B is [out, Σr], frozen, those of n adapters with their scales in B; mix is [n] at each site,
    trained and not decayed. It starts equal for all, so ω is 1/n, plus `N(0, spread²)`. A new adapter without parents
    has random factors (Kaiming-uniform), so step 0 is not the base; `lorica.adapters.soups.soup_of` makes one of
    parents, and a parent of rank 0 at a site changes nothing there. Parameters: n a site. Raises ConfigError for ranks
    below zero or none at all. Paper: arXiv 2410.13025.
    """

    name: ClassVar[str] = "lora_soups"
    summary: ClassVar[str] = "frozen factors of several adapters, each with a trained weight at every site"
    paper: ClassVar[Paper] = Paper(
        "LoRA Soups: Merging LoRAs for Practical Skill Composition Tasks", "COLING 2025", "2410.13025"
    )
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert", "embedding", "conv"})
    identity_at_init: ClassVar[str] = "none"

    ranks: tuple[int, ...] = Field((4, 4), description="rank of each adapter's factors; 0 where it does not act")
    weighting: Literal["free", "softmax"] = Field(
        "free", description="any numbers (the paper's text), or positive ones that sum to one at a site (its code)"
    )
    spread: float = Field(
        0.0, ge=0, description="standard deviation of what is added to the initial `mix`; the authors' code has 1"
    )

    @field_validator("ranks")
    @classmethod
    def _some(cls, ranks: tuple[int, ...]) -> tuple[int, ...]:
        if min(ranks, default=-1) < 0 or not sum(ranks):
            raise ConfigError(
                f"LoRASoups.ranks is {list(ranks)}; a rank for each adapter is right, none below 0 and one above."
            )
        return ranks

    def params(self, site: Site) -> dict[str, ParamSpec]:
        total = sum(self.ranks)
        return {
            "A": ParamSpec((total, *site.shape[1:]), trainable=False),
            "B": ParamSpec((site.shape[0], total), trainable=False),
            "mix": ParamSpec((len(self.ranks),), decay=False, group="mix"),
        }

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        specs = self.params(site)
        fan_in = 1 if site.kind == "embedding" else math.prod(site.shape[1:])
        return {
            "A": uniform(specs["A"].shape, fan_in**-0.5, rng),
            "B": uniform(specs["B"].shape, specs["B"].shape[1] ** -0.5, rng),
            "mix": self.start(rng),
        }

    def start(self, rng: torch.Generator) -> Tensor:
        """The initial `mix` [n]: every adapter weighs 1/n, but for the spread."""
        count = len(self.ranks)
        even_N = torch.zeros(count) if self.weighting == "softmax" else torch.full((count,), 1 / count)
        return even_N + self.spread * torch.randn(count, generator=rng) if self.spread else even_N

    def weights(self, mix_N: Tensor) -> Tensor:
        """ω [n] of a site."""
        return mix_N.softmax(0) if self.weighting == "softmax" else mix_N

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        omega_N = self.weights(p["mix"])
        ranks = torch.tensor(self.ranks, device=omega_N.device)
        mid_R = omega_N.repeat_interleave(ranks, output_size=sum(self.ranks))
        return LinearUpdate(factors=(LowRank(p["A"], p["B"], mid_R=mid_R),))
