"""Task arithmetic: a weighted sum of the changes themselves.

In: changes of any kind. Out: their sum, as factors where all have factors. Refuses to know where they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from lorica.adapters.merging.base import Merging, weighted_bias
from lorica.adapters.merging.change import Change, join
from lorica.core.site import Site
from lorica.methods.base import Paper


def add_changes(changes: Sequence[Change], weights: Sequence[float]) -> Change:
    """`Σ w_n ΔW_n` and `Σ w_n Δb_n`, exact: stacked factors of rank Σr where all have factors, dense elsewhere."""
    bias_O = weighted_bias(changes, weights)
    if all(change.factored for change in changes):
        pairs = [(change.factors(), w * change.scale) for change, w in zip(changes, weights, strict=True)]
        scaled = [Change.of_factors(changes[0].shape, a * A_RI, B_OR) for (A_RI, B_OR), a in pairs]
        return join(scaled).with_bias(bias_O)
    total = weights[0] * changes[0].matrix()
    for change, weight in zip(changes[1:], weights[1:], strict=True):
        total = total + weight * change.matrix()
    return Change.of_dense(changes[0].shape, total, bias_O)


class TaskArithmetic(Merging):
    """`ΔW = λ Σ w_n ΔW_n`, of adapters of any method, rank and sites. Exact; parents that pull an entry in opposite
    directions cancel there. With λ = 1/N it is the mean of the changes. arXiv 2212.04089.
    """

    name: ClassVar[str] = "task_arithmetic"
    summary: ClassVar[str] = "weighted sum of the changes ΔW"
    paper: ClassVar[Paper | None] = Paper("Editing Models with Task Arithmetic", "ICLR 2023", "2212.04089")

    scale: float = Field(1.0, description="λ, on the sum; 0.3 to 0.4 is usual for several tasks")

    def merge(self, site: Site, changes: Sequence[Change], weights: Sequence[float], survey: Any = None) -> Change:
        return add_changes(changes, [self.scale * weight for weight in weights])
