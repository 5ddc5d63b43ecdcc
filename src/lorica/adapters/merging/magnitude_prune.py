"""Magnitude pruning: small entries of each parent go, and the rest is summed.

In: aligned tensors. Out: one. Refuses to know signs and other parents' entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from lorica.adapters.merging.entrywise import OnEither, Part
from lorica.adapters.merging.tensors import keep_largest, weighted_sum
from lorica.core.site import Site
from lorica.methods.base import Paper


def magnitude_prune(tensors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """`Σ w_n top(T_n)`, where top keeps the `⌊density · n⌋` entries of largest magnitude, without rescaling."""
    return weighted_sum([keep_largest(tensor, density) for tensor in tensors], weights)


class MagnitudePrune(OnEither):
    """`Σ w_n top(ΔW_n)`: of each tensor the `density` share of largest magnitude stays. arXiv 1506.02626.

    On factors A and B are pruned apart, as PEFT's `magnitude_prune`; on weights ΔW is, as its `magnitude_prune_svd`
    does before it cuts to a rank.
    """

    name: ClassVar[str] = "magnitude_prune"
    summary: ClassVar[str] = "largest entries of each parent, summed"
    paper: ClassVar[Paper | None] = Paper(
        "Learning both Weights and Connections for Efficient Neural Networks", "NeurIPS 2015", "1506.02626"
    )

    density: float = Field(0.2, gt=0, le=1, description="share of a tensor's entries that stays")

    def entries(self, part: Part, site: Site, survey: Any) -> Tensor:
        return magnitude_prune(part.tensors, part.weights, self.density)
