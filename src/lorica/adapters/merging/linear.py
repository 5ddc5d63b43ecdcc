"""Linear combination of factors: A and B are summed apart, as PEFT's `linear` does.

In: factors of one rank. Out: factors of that rank. Refuses dense changes and factors of different ranks.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lorica.adapters.merging.entrywise import Entrywise, Part
from lorica.adapters.merging.tensors import weighted_sum
from lorica.core.site import Site
from lorica.methods.base import Paper


class Linear(Entrywise):
    """With `a_n = w_n s_n`: `A = Σ sign(a_n)√|a_n| A_n`, `B = Σ √|a_n| B_n`, `ΔW = B A`.

    It holds cross terms `B_m A_n`, so it is not `Σ w_n ΔW_n` (that is `task_arithmetic`): on unrelated factors the two
    have little in common, and parents that were trained from one init of A are nearer. Rank r and size stay those of
    one parent. Raises MergeError for dense changes and for different ranks. arXiv 2306.14870.
    """

    name: ClassVar[str] = "linear"
    summary: ClassVar[str] = "A and B summed apart, of one parent's rank; has cross terms"
    paper: ClassVar[Paper | None] = Paper(
        "Composing Parameter-Efficient Modules with Arithmetic Operations", "NeurIPS 2023", "2306.14870"
    )

    @property
    def on_factors(self) -> bool:
        return True

    def entries(self, part: Part, site: Site, survey: Any) -> Tensor:
        return weighted_sum(part.tensors, part.weights)
