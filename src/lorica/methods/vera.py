"""VeRA: one pair of frozen random projections for all layers, and two trained vectors a layer.

In: the adapted sites (their largest shapes size the projections). Out: factors that all adapters of one key share.
Refuses to know rows and optimisers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, LowRank, ParamSpec
from lorica.methods.base import BaseWeight, Method, Paper, PeftNames
from lorica.methods.lora import uniform


class VeRA(Method):
    """Vector-based random matrix adaptation: `y = x W₀ᵀ + b₀ + b ⊙ (B (d ⊙ (A x)))`.

    A is [r, largest in] and B is [largest out, r], frozen, Kaiming-uniform (gain √2), drawn from one CPU generator
    seeded with `projection_key`, A first: bit for bit what HF PEFT makes. A site uses `A[:, :in]` and `B[:out]`. d is
    [r], b is [out] and starts at zero; neither is decayed. Other targets or another rank give other projections.
    Parameters: r + out a site. Paper: arXiv 2310.11454.
    """

    name: ClassVar[str] = "vera"
    summary: ClassVar[str] = "two trained vectors a layer around shared random projections"
    paper: ClassVar[Paper] = Paper("VeRA: Vector-based Random Matrix Adaptation", "ICLR 2024", "2310.11454")
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert"})
    sites_are_coupled: ClassVar[bool] = True
    peft: ClassVar[PeftNames | None] = PeftNames(
        "VERA",
        tensors={"d": "vera_lambda_d", "b": "vera_lambda_b", "A": "vera_A", "B": "vera_B"},
        fields={
            "r": "rank",
            "projection_prng_key": "projection_key",
            "d_initial": "d_initial",
            "vera_dropout": "dropout",
        },
        fixed={"save_projection": True},
    )

    rank: int = Field(256, ge=1, description="rank r of the shared projections; it costs r parameters a layer")
    projection_key: int = Field(
        0, ge=0, description="seed of the shared projections; adapters of one key share them in memory"
    )
    d_initial: float = Field(0.1, description="initial value of every entry of d")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the low-rank path, in training only")

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {
            "d": ParamSpec((self.rank,), decay=False, group="d"),
            "b": ParamSpec((site.out_features,), decay=False, group="b"),
        }

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        return {"d": torch.full((self.rank,), self.d_initial), "b": torch.zeros(site.out_features)}

    def global_params(self, sites: Sequence[Site]) -> dict[str, ParamSpec]:
        widest, tallest = max(site.in_features for site in sites), max(site.out_features for site in sites)
        return {
            "A": ParamSpec((self.rank, widest), trainable=False),
            "B": ParamSpec((tallest, self.rank), trainable=False),
        }

    def init_global(self, sites: Sequence[Site], rng: torch.Generator) -> dict[str, Tensor]:
        # not from `rng`: adapters of any seed share the projections of one key
        own = torch.Generator().manual_seed(self.projection_key)
        shapes = {name: spec.shape for name, spec in self.global_params(sites).items()}
        return {
            name: uniform(shape, math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1])), own)
            for name, shape in shapes.items()
        }

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        A_RI, B_OR = p["A"][:, : site.in_features], p["B"][: site.out_features]
        return LinearUpdate(factors=(LowRank(A_RI, B_OR, mid_R=p["d"], post_O=p["b"]),), dropout=self.dropout)
