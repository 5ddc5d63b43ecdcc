"""Intrinsic dimension: the whole model moves in one random subspace of d directions.

In: sites, and one trained vector θ that all of them share. Out: a dense difference to each weight and bias, projected
from θ by Fastfood. Refuses to know rows, optimisers and how d is searched for (`recipes.intrinsic_search`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorica.core.errors import MethodError
from lorica.core.fastfood import fastfood
from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, ParamSpec
from lorica.methods.base import BaseWeight, Method, Paper


class Intrinsic(Method):
    """Training in a random subspace: `W_t = W₀_t + λ_t · P_t θ` for every adapted weight and bias t.

    θ is shared by the whole adapter and starts at zero. P_t, of columns with norm 1, is drawn from `projection_key` and
    the tensor's name, never stored, and applied in O(L log L), L the power of two above the tensor's size (and above
    d). Without `structured` (DID) there is no λ and θ is [d]; with it (SAID) each tensor has a scalar λ_t, [1], that
    starts at 1, and the m of them count: θ is [d − m]. The gradient is the true `Σ λ_t P_tᵀ g_t`; `gradient:
    published` divides the share of each tensor by its L, as the published code does. Parameters: d, whatever is
    adapted. Raises MethodError where d leaves nothing for θ. Paper: arXiv 2012.13255.
    """

    name: ClassVar[str] = "intrinsic"
    summary: ClassVar[str] = "the whole model in one random subspace of a few directions"
    paper: ClassVar[Paper] = Paper(
        "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning", "ACL 2021", "2012.13255"
    )
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert", "embedding", "conv", "norm"})
    sites_are_coupled: ClassVar[bool] = True

    dimension: int = Field(1000, ge=1, description="number d of trained values, of the whole adapter")
    structured: bool = Field(False, description="SAID: one more trained factor for each tensor, counted in d; else DID")
    biases: bool = Field(True, description="also move the biases of sites that have one")
    projection_key: int = Field(0, ge=0, description="seed of the projections; the same key gives the same subspace")
    gradient: Literal["true", "published"] = Field(
        "true", description="the true gradient, or the published code's, which divides each tensor's share by its size"
    )

    def _tensors(self, site: Site) -> dict[str, tuple[int, ...]]:
        """The shapes of what moves at a site."""
        bias = {"bias": (site.out_features,)} if site.bias and self.biases else {}
        return {"weight": site.shape, **bias}

    def params(self, site: Site) -> dict[str, ParamSpec]:
        if not self.structured:
            return {}
        # not decayed: a factor of 0 is no less of an update than one of 1
        return {f"scale_{name}": ParamSpec((1,), decay=False, group="scale") for name in self._tensors(site)}

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.ones(1) for name in self.params(site)}

    def global_params(self, sites: Sequence[Site]) -> dict[str, ParamSpec]:
        factors = sum(len(self.params(site)) for site in sites)
        if self.dimension <= factors:
            raise MethodError(
                f"Dimension {self.dimension} leaves nothing for the subspace: {factors} factors of as many tensors are "
                f"counted in it; at least {factors + 1} is right.",
                hint="Adapt fewer sites, or set `structured: false`, which has no factors.",
            )
        return {"theta": ParamSpec((self.dimension - factors,), group="theta")}

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        moved = {name: self._moved(site, name, shape, p) for name, shape in self._tensors(site).items()}
        return LinearUpdate(delta=moved["weight"], bias_O=moved.get("bias"))

    def _moved(self, site: Site, name: str, shape: tuple[int, ...], p: Mapping[str, Tensor]) -> Tensor:
        """`λ_t · P_t θ` in the tensor's shape."""
        theta_d, size = p["theta"], math.prod(shape)
        parts = fastfood(f"{self.projection_key}/{site.name}/{name}", size, theta_d.shape[0], theta_d.device)
        moved = parts.project(theta_d, size, scaled_back=self.gradient == "published").view(shape)
        return moved * p[f"scale_{name}"] if self.structured else moved
