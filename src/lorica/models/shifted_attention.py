"""Shifted sparse attention: which tokens of a sequence see each other while an adapter is trained.

In: a group size or a share of the sequence, and lengths. Out: lengths of the segments that one half of the heads and
the other attend in, and their cost. Positions count within a sequence, so neither padding nor neighbours move a border.
Refuses to know tensors and kernels; imports no torch, so that the API process can read the setting.
"""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Literal, Self

from pydantic import Field, model_validator

from lorica.core.config import Config
from lorica.core.errors import ConfigError

SHARE = Fraction(1, 4)
"""A group is this share of its sequence where the setting says nothing; it is the paper's."""
SMALLEST = 2
"""Tokens of the smallest group: a group of one sees itself alone, and has no half to be shifted by."""


class Shifted(Config):
    """S² attention of LongLoRA (arXiv 2309.12307), in its causal form: a query at p sees a key at q where

        q ≤ p  and  s(p) = s(q),   s(p) = ⌊p / G⌋ in the first half of the heads, ⌊(p + G/2) / G⌋ in the second.

    Positions count from the first token of each sequence, virtual tokens of a soft prompt included; what a prefix
    puts before the keys is seen by every group. It acts in training passes only: evaluation and sampling are dense.
    G is `group`, or the share `ratio` of each sequence, rounded up; without either, a quarter. Raises ConfigError where
    both are given.
    """

    kind: Literal["shifted"] = Field("shifted", description="the only kind there is beside dense attention")
    group: int | None = Field(None, ge=SMALLEST, description="tokens G of a group, the same for every sequence")
    ratio: float | None = Field(None, gt=0, le=1, description="G as a share of each sequence; 0.25 without `group`")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.group is not None and self.ratio is not None:
            raise ConfigError(
                f"Shifted attention has group {self.group} and ratio {self.ratio}: one of them decides G, so give one."
            )
        return self

    def group_of(self, length: int) -> int:
        """G for a sequence of `length` tokens."""
        if self.group is not None:
            return self.group
        share = SHARE if self.ratio is None else Fraction(self.ratio).limit_denominator(10**6)
        return max(SMALLEST, -(-length * share.numerator // share.denominator))

    def segments(self, length: int, *, shifted: bool) -> list[int]:
        """Lengths of the segments of one sequence, for the unshifted or the shifted heads; their sum is `length`."""
        group = self.group_of(length)
        first = group - group // 2 if shifted else group  # ⌊(p + G/2) / G⌋ is 1 from p = ⌈G/2⌉ on
        edges = [0, *range(first, length, group), length]
        return [stop - start for start, stop in itertools.pairwise(edges)]

    def pairs(self, length: int) -> tuple[int, int]:
        """(query, key) pairs that an unshifted and a shifted head compute; a dense one computes `S (S + 1) / 2`."""
        plain, moved = (self.segments(length, shifted=shifted) for shifted in (False, True))
        return _pairs(plain), _pairs(moved)


def _pairs(segments: list[int]) -> int:
    return sum(size * (size + 1) // 2 for size in segments)
