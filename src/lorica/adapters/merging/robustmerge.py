"""RobustMerge: prune each parent's factors, let weakened rank directions grow again, and normalise across parents.

In: factors of one rank. Out: factors of that rank. A and B of a site come together, so no order of keys matters.
Refuses dense changes and weights of parents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lorica.adapters.merging.base import Merging, need_factors, weighted_bias
from lorica.adapters.merging.change import Change
from lorica.adapters.merging.tensors import keep_from, threshold_for, weighted_sum, whole
from lorica.core.site import Site
from lorica.methods.base import Paper


def coefficients(A_RI: Tensor, pruned_RI: Tensor, percentile: float = 0.8) -> Tensor:
    """`c_j = max(s_j, s_(⌊percentile · r⌋))` with `s_j = ‖A_j‖₁ / ‖Â_j‖₁`, s in ascending order, counted from 0.

    Everything below that place is raised to it. A row that pruning took whole has no finite s: it takes the largest of
    the others, and 1 where there are none.
    """
    s_R = A_RI.abs().sum(1) / pruned_RI.abs().sum(1)
    finite_R = s_R[torch.isfinite(s_R)]
    s_R = torch.where(torch.isfinite(s_R), s_R, finite_R.max() if finite_R.numel() else torch.ones_like(s_R[0]))
    place = min(whole(percentile, s_R.numel()), s_R.numel() - 1)
    return s_R.clamp(min=s_R.sort().values[place])


def robustmerge(
    pairs: Sequence[tuple[Tensor, Tensor]], keep: float = 0.2, percentile: float = 0.8, scale: float = 2.0
) -> tuple[Tensor, Tensor]:
    """`A = λ Σ Â_t` and `B[:, j] = λ Σ c_tj B̂_t[:, j] / Σ c_tj` of factors (A_t, B_t) of one rank.

    Each tensor keeps its entries from the `⌊(1 − keep) n⌋`-th smallest magnitude on.
    """
    A_kept = [keep_from(A_RI, threshold_for(A_RI, keep)) for A_RI, _ in pairs]
    B_kept = [keep_from(B_OR, threshold_for(B_OR, keep)) for _, B_OR in pairs]
    c_TR = torch.stack([coefficients(A, kept, percentile) for (A, _), kept in zip(pairs, A_kept, strict=True)])
    A_RI = weighted_sum(A_kept, [scale] * len(pairs))
    B_OR = torch.stack([scale * c_R * B for c_R, B in zip(c_TR, B_kept, strict=True)]).sum(0) / c_TR.sum(0)
    return A_RI, B_OR


class RobustMerge(Merging):
    """`ΔW = B A` with `A = λ Σ Â_t`, `B_j = λ Σ c_tj B̂_tj / Σ c_tj`; hats are pruned factors. arXiv 2502.17159.

    c_tj is how much row j of A_t lost, and never below the `percentile` of its parent. The result has cross terms, and
    of a single parent it is λ² times the pruned product. Scales s_t go into both factors by their roots, so equal ones
    stay in front. Biases are averaged, norms too. A parent that does not act at a site is left out there. Parents have
    no weights. Raises MergeError for dense changes and different ranks.
    """

    name: ClassVar[str] = "robustmerge"
    summary: ClassVar[str] = "prune factors, rescale weakened directions, normalise across parents"
    paper: ClassVar[Paper | None] = Paper(
        "RobustMerge: Parameter-Efficient Model Merging for MLLMs with Direction Robustness",
        "NeurIPS 2025",
        "2502.17159",
    )
    weighted: ClassVar[bool] = False

    keep: float = Field(0.2, gt=0, le=1, description="share of each factor's entries that stays (the mask ratio)")
    percentile: float = Field(
        0.8, ge=0, le=1, description="place in the ascending coefficients of a parent below which they are raised"
    )
    scale: float = Field(2.0, description="λ, on A and on B")

    def merge(self, site: Site, changes: Sequence[Change], weights: Sequence[float], survey: Any = None) -> Change:
        shares = [1 / len(changes)] * len(changes)
        bias_O = weighted_bias(changes, shares)
        if len(site.shape) == 1:
            return Change.of_dense(site.shape, weighted_sum([c.matrix() for c in changes], shares), bias_O)
        if not need_factors(self, site, changes, equal=True):
            return Change.nothing(site.shape, changes[0].device).with_bias(bias_O)
        pairs = [change.balanced() for change in changes if change.rank]
        return Change.of_factors(site.shape, *robustmerge(pairs, self.keep, self.percentile, self.scale), bias_O=bias_O)
