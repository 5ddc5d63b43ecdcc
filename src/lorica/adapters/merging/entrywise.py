"""What rules share that act entry by entry: on ΔW, or on A and B apart, and on biases and norms as they are.

In: the changes of one site. Out: aligned tensors of all parents, and from merged ones the change. Where a parent does
not act at a site, its tensors are zero. Refuses to know what a rule does with the entries.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorica.adapters.merging.base import Merging, need_factors
from lorica.adapters.merging.change import Change
from lorica.core.site import Site


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One tensor of a site, of every parent: `label` is `weight`, `A`, `B` or `bias`. Weights are for these entries."""

    label: str
    tensors: tuple[Tensor, ...]
    weights: tuple[float, ...]


class Entrywise(Merging):
    """Base of rules that merge aligned tensors entry by entry: `on_factors` says which ones.

    On weights, the tensors are `ΔW_n` with weight w_n. On factors, they are A_n and B_n without the scale s_n: with
    `a_n = w_n s_n`, A has the weight `sign(a_n)√|a_n|` and B `√|a_n|`, as in PEFT, and ranks must be equal. Norms are
    vectors and always merged as such.
    """

    @property
    @abstractmethod
    def on_factors(self) -> bool:
        """Whether A and B are merged, and not ΔW."""

    @abstractmethod
    def entries(self, part: Part, site: Site, survey: Any) -> Tensor:
        """The merged tensor of one part."""

    def factor_of(self) -> float:
        """What the merged change is multiplied by."""
        return 1.0

    def merge(self, site: Site, changes: Sequence[Change], weights: Sequence[float], survey: Any = None) -> Change:
        scale = self.factor_of()
        found = {part.label: self.entries(part, site, survey) for part in self.parts(site, changes, weights)}
        bias_O = scale * found["bias"] if "bias" in found else None
        if "A" in found:
            return Change.of_factors(site.shape, found["A"], found["B"], scale, bias_O)
        if "weight" in found:
            return Change.of_dense(site.shape, scale * found["weight"], bias_O)
        return Change.nothing(site.shape, changes[0].device).with_bias(bias_O)

    def parts(self, site: Site, changes: Sequence[Change], weights: Sequence[float]) -> list[Part]:
        """The tensors of a site that the rule merges. Raises MergeError on factors of other ranks, or none."""
        found = []
        if any(change.rank for change in changes):
            by_factors = self.on_factors and len(site.shape) > 1
            found += self._factors(site, changes, weights) if by_factors else [_weights(changes, weights)]
        if any(change.bias_O is not None for change in changes):
            like = next(change.bias_O for change in changes if change.bias_O is not None)
            biases = (torch.zeros_like(like) if c.bias_O is None else c.bias_O for c in changes)
            found.append(Part("bias", tuple(biases), tuple(weights)))
        return found

    def _factors(self, site: Site, changes: Sequence[Change], weights: Sequence[float]) -> list[Part]:
        rank = need_factors(self, site, changes, equal=True)
        pairs = [_padded(change, rank) for change in changes]
        both = [w * change.scale for w, change in zip(weights, changes, strict=True)]
        roots = tuple(math.sqrt(abs(a)) for a in both)
        signed = tuple(math.copysign(root, a) for root, a in zip(roots, both, strict=True))
        return [Part("A", tuple(A for A, _ in pairs), signed), Part("B", tuple(B for _, B in pairs), roots)]


class OnEither(Entrywise):
    """Base of those that act on weights or on factors, as the user says."""

    on: Literal["weights", "factors"] = Field(
        "weights", description="what is merged: `weights` (each ΔW) or `factors` (A and B apart, as PEFT)"
    )

    @property
    def on_factors(self) -> bool:
        return self.on == "factors"


def _weights(changes: Sequence[Change], weights: Sequence[float]) -> Part:
    return Part("weight", tuple(change.matrix() for change in changes), tuple(weights))


def _padded(change: Change, rank: int) -> tuple[Tensor, Tensor]:
    """Its factors; zeros of the rank where there is no change."""
    A_RI, B_OR = change.factors()
    if change.rank:
        return A_RI, B_OR
    return A_RI.new_zeros(rank, A_RI.shape[1]), B_OR.new_zeros(B_OR.shape[0], rank)
