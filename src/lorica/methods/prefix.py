"""Prefix tuning: trained keys and values that every query also sees, at every attention site.

In: attention sites. Out: a prefix for each. Refuses to know rows, caches and optimisers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lorica.core.site import Site, SiteKind
from lorica.core.update import ParamSpec, PrefixKV
from lorica.methods.base import BaseWeight, Method, Paper, PeftNames
from lorica.methods.lora import uniform


class Prefix(Method):
    """Prefix tuning: `softmax(q [K_P; K_x]ᵀ / √d) [V_P; V_x]` with trained K_P and V_P, [P, kv heads, head dim] a site.

    Prefix keys are not rotated, and the text's positions start at P. With `projection`, the table is computed while
    training as `tanh(e W₁ᵀ + b₁) W₂ᵀ + b₂` from an embedding e [P, width] and W₁ [hidden, width] that all sites
    share, and a W₂ [2 · kv heads · head dim, hidden] of each site; exported is the computed table. Nothing is
    decayed. Not the identity at step 0, not even with zeros, and cannot be merged. Parameters deployed: 2 · P · kv
    heads · head dim a site. Paper: arXiv 2101.00190.
    """

    name: ClassVar[str] = "prefix"
    summary: ClassVar[str] = "trained keys and values before the first token, at every attention"
    paper: ClassVar[Paper] = Paper(
        "Prefix-Tuning: Optimizing Continuous Prompts for Generation", "ACL 2021", "2101.00190"
    )
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"attention"})
    default_targets: ClassVar[str | tuple[str, ...]] = "all-attention"
    identity_at_init: ClassVar[str] = "none"
    sites_are_coupled: ClassVar[bool] = True
    peft: ClassVar[PeftNames | None] = PeftNames(
        "PREFIX_TUNING",
        tensors={"prefix": "prompt_embeddings"},
        fields={"num_virtual_tokens": "tokens"},
        fixed={"prefix_projection": False, "num_transformer_submodules": 1},
    )

    tokens: int = Field(10, ge=1, description="number P of virtual tokens")
    projection: bool = Field(
        False, description="train through a two-layer MLP instead of the table itself; steadier, larger while training"
    )
    hidden: int = Field(512, ge=1, description="width of the MLP's hidden layer, with `projection`")
    init_std: float = Field(
        0.1, gt=0, description="standard deviation of the table's initial values, without `projection`"
    )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        rows = 2 * site.shape[0] * site.shape[1]
        if not self.projection:
            return {"prefix": ParamSpec((self.tokens, rows), decay=False)}
        return {"W2": ParamSpec((rows, self.hidden), decay=False), "b2": ParamSpec((rows,), decay=False)}

    def global_params(self, sites: Sequence[Site]) -> dict[str, ParamSpec]:
        if not self.projection:
            return {}
        width = max(site.query_heads * site.shape[1] for site in sites)
        shapes = {"embedding": (self.tokens, width), "W1": (self.hidden, width), "b1": (self.hidden,)}
        return {name: ParamSpec(shape, decay=False) for name, shape in shapes.items()}

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        if not self.projection:
            shape = self.params(site)["prefix"].shape
            return {"prefix": torch.empty(shape).normal_(std=self.init_std, generator=rng)}
        return {name: uniform(spec.shape, self.hidden**-0.5, rng) for name, spec in self.params(site).items()}

    def init_global(self, sites: Sequence[Site], rng: torch.Generator) -> dict[str, Tensor]:
        if not self.projection:
            return {}
        shapes = {name: spec.shape for name, spec in self.global_params(sites).items()}
        bound = shapes["W1"][1] ** -0.5
        embedding = torch.empty(shapes["embedding"]).normal_(generator=rng)
        return {
            "embedding": embedding,
            "W1": uniform(shapes["W1"], bound, rng),
            "b1": uniform(shapes["b1"], bound, rng),
        }

    def table(self, p: Mapping[str, Tensor]) -> Tensor:
        """One site's prefix, [P, 2 · kv heads · head dim]: keys of all heads first, then values."""
        if not self.projection:
            return p["prefix"]
        return torch.tanh(p["embedding"] @ p["W1"].T + p["b1"]) @ p["W2"].T + p["b2"]

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> PrefixKV:
        key_PHK, value_PHK = self.table(p).view(-1, 2, *site.shape).unbind(1)
        return PrefixKV(key_PHK, value_PHK)
