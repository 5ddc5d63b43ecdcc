"""The k-th smallest of more numbers than fit in memory, exactly: bits are settled from the highest down.

In: magnitudes in runs, given as often as asked. Out: the k-th smallest. Memory: a table of 65,536 counts, or at most
`LIMIT` candidates. Refuses to know where the numbers come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 16
"""Bits that one reading settles."""
LIMIT = 2**22
"""Most candidates that are kept and sorted instead."""


class Selection:
    """`k` counts from 1; 0 selects zero. Call `add` for every run and then `settle`, until `value` is there."""

    def __init__(self, k: int) -> None:
        self.value: float | None = None if k else 0.0
        self._left = k
        self._shift = 64
        self._prefix = 0
        self._counts = torch.zeros(2**STEP, dtype=torch.int64)
        self._kept: list[Tensor] | None = None

    def add(self, numbers: Tensor) -> None:
        """One run of float64 numbers of at least zero; their bits, read as integers, are in the same order."""
        if self.value is not None:
            return
        bits = numbers.detach().cpu().double().contiguous().view(torch.int64).reshape(-1)
        if self._shift < 64:
            bits = bits[bits >> self._shift == self._prefix]
        if self._kept is not None:
            self._kept.append(bits)
        else:
            self._counts += torch.bincount(bits >> (self._shift - STEP) & (2**STEP - 1), minlength=2**STEP)

    def settle(self) -> None:
        """After one reading of all numbers: the next bits, or the value."""
        if self.value is not None:
            return
        if self._kept is not None:
            found = torch.cat(self._kept).kthvalue(self._left).values
        else:
            below = self._counts.cumsum(0)
            digit = int(torch.searchsorted(below, self._left))
            self._left -= int(below[digit] - self._counts[digit])
            self._prefix = self._prefix << STEP | digit
            self._shift -= STEP
            if self._shift:
                self._kept = [] if int(self._counts[digit]) <= LIMIT else None
                self._counts.zero_()
                return
            found = torch.tensor(self._prefix)
        self.value, self._kept = float(found.view(torch.float64)), None
