"""How a weight is stored in a few bits: the formats, each with its exact float32 arithmetic.

    quantize(W, "nf4", block=64, double=True)  →  Packed  →  .dense(torch.bfloat16)

In: a weight [O, I] (any shape; it is read row by row). Out: packed tensors by name, and the weight that they stand for.
A format is a value: pure functions of tensors, with no state. Refuses to know modules, sites and devices.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.core.errors import FormatError

Parts = Mapping[str, Tensor]


class Format(ABC):
    """One way to store a weight. `parts` are named as in checkpoints; `codes` is always among them."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What settings call it."""

    @abstractmethod
    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a finite weight, on its device."""

    @abstractmethod
    def unpack(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the parts stand for: float32 arithmetic, rounded once to `dtype`."""

    @abstractmethod
    def sizes(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every part of a weight of this shape."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of all parts: the memory formula."""
        return sum(math.prod(size) * dtype.itemsize for size, dtype in self.sizes(shape).values())


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A stored weight: its format, the shape that it stands for, and its tensors by name."""

    format: Format
    shape: tuple[int, ...]
    parts: dict[str, Tensor]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that it stands for, a new tensor."""
        return self.format.unpack(self.parts, self.shape, dtype)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.parts.values())


def finite32(weight: Tensor) -> Tensor:
    """The weight in float32. Raises FormatError when it holds NaN or infinity, which no code stands for."""
    wide = weight.detach().float()
    if not torch.isfinite(wide).all():
        raise FormatError("A weight holds NaN or infinity (or values beyond float32), so it cannot be quantised.")
    return wide
