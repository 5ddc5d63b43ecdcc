"""DARE: drop entries at random, multiply the rest so that their expectation stays, then sum or TIES.

In: aligned tensors and a generator. Out: one. What is dropped depends on the seed and the site's name alone. Refuses to
know magnitudes: they play no part.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorica.adapters.merging.entrywise import OnEither, Part
from lorica.adapters.merging.tensors import draw_kept, weighted_sum
from lorica.adapters.merging.ties import ties
from lorica.core.site import Site
from lorica.methods.base import Paper


def dropped(tensor: Tensor, density: float, rng: torch.Generator) -> Tensor:
    """Each entry kept with probability `density` and divided by it: expectation T, variance `T² (1 − d) / d`."""
    if density >= 1:
        return tensor
    return tensor * draw_kept(tensor.shape, density, rng).to(tensor) / density


def dare(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    density: float,
    rng: torch.Generator,
    *,
    then: Literal["linear", "ties"] = "linear",
    elect: Literal["total", "frequency"] = "total",
) -> Tensor:
    """`Σ w_n drop(T_n)`, or their disjoint mean under elected signs; the parents draw one after the other."""
    kept = [dropped(tensor, density, rng) for tensor in tensors]
    return weighted_sum(kept, weights) if then == "linear" else ties(kept, weights, 1.0, elect=elect)


def site_rng(seed: int, site: str, label: str) -> torch.Generator:
    """The generator of one tensor of a site."""
    # torch's CPU generator reads the low 32 bits of a seed alone
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{site}/{label}".encode()))


class Dare(OnEither):
    """`Σ w_n m_n ⊙ ΔW_n / d` with `m_n ~ Bernoulli(d)` entry by entry, or TIES of these. arXiv 2311.03099.

    The paper drops p = 1 − d, up to 0.99. In expectation it is `task_arithmetic` (with `then=linear`); one draw adds a
    variance of `ΔW² p / (1 − p)` to each entry. Draws depend on (seed, site, place among the parents).
    """

    name: ClassVar[str] = "dare"
    summary: ClassVar[str] = "drop entries at random and rescale, then sum or TIES"
    paper: ClassVar[Paper | None] = Paper(
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        "ICML 2024",
        "2311.03099",
    )
    density: float = Field(0.2, gt=0, le=1, description="probability of an entry to stay; the paper's p is 1 minus it")
    then: Literal["linear", "ties"] = Field("linear", description="what is done with what stays: `linear` or `ties`")
    elect: Literal["total", "frequency"] = Field("total", description="with `then=ties`, whose sign wins")
    seed: int = Field(0, ge=0, description="of what is dropped")

    @property
    def ordered(self) -> bool:
        return self.density < 1

    def entries(self, part: Part, site: Site, survey: Any) -> Tensor:
        rng = site_rng(self.seed, site.name, part.label)
        return dare(part.tensors, part.weights, self.density, rng, then=self.then, elect=self.elect)
