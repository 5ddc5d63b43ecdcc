"""LoraHub's composition: one weight for each parent, on A and on B alike.

In: factors of one rank. Out: factors of that rank. Refuses dense changes and factors of different ranks, and to know
how weights are found (`recipes.compose`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lorica.adapters.merging.base import Merging
from lorica.adapters.merging.change import Change
from lorica.adapters.merging.soup import composed
from lorica.core.site import Site
from lorica.methods.base import Paper


class LoraHub(Merging):
    """`ΔW = s (Σ w_n B_n)(Σ w_n A_n)`: a soup whose weights are meant to be searched (`lorica compose`).

    It is quadratic in w and has cross terms `w_n w_m B_n A_m`, so it is not `Σ w_n ΔW_n` (that is `task_arithmetic`);
    −w gives the model of w, and of one parent alone weight w gives `w² ΔW`. Rank and size stay those of one parent.
    Raises MergeError for dense changes and for different ranks. arXiv 2307.13269.
    """

    name: ClassVar[str] = "lorahub"
    summary: ClassVar[str] = "sum of A and of B with the same weights, which `lorica compose` searches"
    paper: ClassVar[Paper | None] = Paper(
        "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition", "COLM 2024", "2307.13269"
    )

    def merge(self, site: Site, changes: Sequence[Change], weights: Sequence[float], survey: Any = None) -> Change:
        return composed(self, site, changes, weights)
