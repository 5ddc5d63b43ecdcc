"""Concatenation: the factors of all parents side by side.

In: factors of any ranks. Out: factors of the sum of the ranks. Refuses dense changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lorica.adapters.merging.base import Merging, need_factors
from lorica.adapters.merging.change import Change
from lorica.adapters.merging.task_arithmetic import add_changes
from lorica.core.site import Site


class Cat(Merging):
    """`A = [a_1 A_1; …; a_N A_N]`, `B = [B_1, …, B_N]` with `a_n = w_n s_n`: exactly `Σ a_n B_n A_n`, of rank Σr.

    What task arithmetic gives for factors, and as PEFT names it. Raises MergeError for dense changes.
    """

    name: ClassVar[str] = "cat"
    summary: ClassVar[str] = "factors side by side: the exact weighted sum, of the ranks' sum"

    def merge(self, site: Site, changes: Sequence[Change], weights: Sequence[float], survey: Any = None) -> Change:
        if len(site.shape) > 1:
            need_factors(self, site, changes)
        return add_changes(changes, weights)
