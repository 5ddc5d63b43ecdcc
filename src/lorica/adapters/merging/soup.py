"""Model soup: a weighted mean of A and of B.

In: factors of one rank. Out: factors of that rank. Refuses dense changes and factors of different ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from lorica.adapters.merging.base import Merging, need_factors, weighted_bias
from lorica.adapters.merging.change import Change
from lorica.adapters.merging.tensors import weighted_sum
from lorica.core.site import Site
from lorica.methods.base import Paper


def composed(rule: Merging, site: Site, changes: Sequence[Change], weights: Sequence[float]) -> Change:
    """`ΔW = (Σ w_n √s_n B_n)(Σ w_n √s_n A_n)`, of parents of one rank: quadratic in w, with cross terms.

    Where all scales are equal it is `s (Σ w_n B_n)(Σ w_n A_n)`, and s stays outside: one parent of weight 1 beside
    others of weight 0 is that parent, bit for bit. Norms and biases are `Σ w_n T_n`. Raises MergeError for dense
    changes and for different ranks.
    """
    bias_O = weighted_bias(changes, weights)
    if len(site.shape) == 1:
        dense = weighted_sum([change.matrix() for change in changes], weights)
        return Change.of_dense(site.shape, dense, bias_O)
    if not need_factors(rule, site, changes, equal=True):
        return Change.nothing(site.shape, changes[0].device).with_bias(bias_O)
    acting = [n for n, change in enumerate(changes) if change.rank]
    scales, own = {changes[n].scale for n in acting}, [weights[n] for n in acting]
    same = len(scales) == 1
    pairs = [changes[n].factors() if same else changes[n].balanced() for n in acting]
    A_RI, B_OR = weighted_sum([A for A, _ in pairs], own), weighted_sum([B for _, B in pairs], own)
    return Change.of_factors(site.shape, A_RI, B_OR, scales.pop() if same else 1.0, bias_O)


class Soup(Merging):
    """`ΔW = (Σ w_n √s_n B_n)(Σ w_n √s_n A_n)`; without weights each is 1/N, the plain mean of all tensors.

    Unlike `linear`, a weight counts twice in each parent's own term and its sign falls out of it, so −w gives the model
    of w. Raises MergeError for dense changes and for different ranks. arXiv 2203.05482.
    """

    name: ClassVar[str] = "soup"
    summary: ClassVar[str] = "mean of A and of B, of one parent's rank; has cross terms"
    paper: ClassVar[Paper | None] = Paper(
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference "
        "time",
        "ICML 2022",
        "2203.05482",
    )
    default_weight: ClassVar[Literal["one", "mean"]] = "mean"

    def merge(self, site: Site, changes: Sequence[Change], weights: Sequence[float], survey: Any = None) -> Change:
        return composed(self, site, changes, weights)
