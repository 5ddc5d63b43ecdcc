"""Frozen maps of one input, side by side, with weights in the order that the CPU's matrix kernels read them.

In: frozen weights [out, in] and biases. Out: products in both directions. Weights are laid out in a copy for each, made
on first use and only where that is known to be right: the kernels are private to torch, so a self-test guards them. A
quantised weight is there in full for the time of one product. Refuses to know sites and adapters.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.engine.native.passes import ROWS, Passes
from lorica.engine.native.walk import Walks

LEAST = 4
"""Fewer rows are filled up to so many: these kernels read a weight up to a third slower for one row or two."""
SHARE = 4
"""Packed copies may take one part in this many of the machine's memory."""


class Stored(Protocol):
    """A weight [out, in] that is made whenever it is wanted."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def matrix(self) -> Tensor:
        """The weight in full."""


class PackedWeight:
    """A weight [out, in] and a bias: `y = x Wᵀ + b`."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        # without a hint of a batch size: in float32 the order for one row is up to twice as slow, for one row too
        self._packed: Tensor = _ops()._reorder_linear_weight(weight_OI.contiguous())
        self._bias_O = bias_O

    def __call__(self, x_NI: Tensor) -> Tensor:
        missing = LEAST - x_NI.shape[0]
        x = x_NI if missing <= 0 else torch.constant_pad_nd(x_NI, (0, 0, 0, missing))
        y_NO: Tensor = _ops()._linear_pointwise(x, self._packed, self._bias_O, "none", [], "")
        return y_NO if missing <= 0 else y_NO[: x_NI.shape[0]]


class FrozenMaps:
    """`forward(x)` is `[W₁x + b₁, W₂x + b₂, …]`, `back(dy)` is `Σ dy_k W_k`.

    Attributes: `sizes` are the outputs of each map; `bias_O` is theirs side by side, or None; `packs` says whether the
    products lay the weights out for the CPU's kernels; `few` are kernels for up to four rows, where there are some.
    """

    def __init__(self, weights: Sequence[Tensor | Stored], biases: Sequence[Tensor | None] = (None,)) -> None:
        self._weights = list(weights)
        self.sizes = tuple(w.shape[0] for w in weights)
        self.bias_O: Tensor | None = None
        if any(b is not None for b in biases):
            zeros = [torch.zeros(w.shape[0], dtype=w.dtype, device=w.device) for w in weights]
            self.bias_O = torch.cat([z if b is None else b for z, b in zip(zeros, biases, strict=True)])
        self._biases = biases
        self.packs = False
        self.few: Passes | None = None
        self._forward: PackedWeight | None = None
        self._back: PackedWeight | None = None
        self._panels: Tensor | None = None

    @property
    def dense(self) -> list[Tensor]:
        """The weights that are there in full all the time."""
        return [w for w in self._weights if isinstance(w, Tensor)]

    @property
    def bytes(self) -> int:
        """Of the weights in full."""
        return sum(math.prod(w.shape) * w.dtype.itemsize for w in self._weights)

    def panels(self, walks: Walks) -> Tensor | None:
        """The weights as `walk.Adapted` reads them, where the processor's cache holds them all; None elsewhere."""
        if self.few is not None and self._panels is None:
            self._panels = walks.panels(self.dense)
        return self._panels

    def forward(self, x_NI: Tensor) -> Tensor:
        """The outputs of all maps side by side [N, ΣO]."""
        if self.few is not None and x_NI.shape[0] <= ROWS:
            return self.few.linear_forth(x_NI, self.dense, self.bias_O)
        if self.packs:
            if self._forward is None:
                self._forward = PackedWeight(torch.cat(self.dense), self.bias_O)
            return self._forward(x_NI)
        ys = [F.linear(x_NI, _full(w), b) for w, b in zip(self._weights, self._biases, strict=True)]
        return ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)

    def back(self, dy_NO: Tensor) -> Tensor:
        """The gradient of the input [N, I], from that of all outputs side by side."""
        if self.few is not None and dy_NO.shape[0] <= ROWS:
            return self.few.linear_back(dy_NO, self.dense)
        if self.packs:
            if self._back is None:
                self._back = PackedWeight(torch.cat(self.dense).T, None)
            return self._back(dy_NO)
        parts = dy_NO.split(self.sizes, dim=1)
        dx_NI: Tensor = parts[0] @ _full(self._weights[0])
        for dy, weight in zip(parts[1:], self._weights[1:], strict=True):
            dx_NI.addmm_(dy, _full(weight))
        return dx_NI


def _full(weight: Tensor | Stored) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.matrix()


def worth_packing(weights: Sequence[Tensor], *, copies: int = 1) -> bool:
    """Whether the weights can be packed here, and `copies` of them are a small part of the machine's memory."""
    first = weights[0]
    if first.device.type != "cpu" or any(w.dtype != first.dtype or w.device != first.device for w in weights):
        return False
    size = copies * sum(w.numel() * w.element_size() for w in weights)
    return can_pack(first.dtype) and size * SHARE <= _memory()


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether torch's packed kernels exist on this machine and agree with the plain product in this dtype."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    rng = torch.Generator().manual_seed(0)
    x_NI, w_OI, b_O = (torch.randn(shape, generator=rng).to(dtype) for shape in ((3, 48), (40, 48), (40,)))
    try:
        with torch.no_grad():
            got_NO = PackedWeight(w_OI, b_O)(x_NI)
    except (RuntimeError, AttributeError):  # another build of torch
        return False
    wanted_NO = F.linear(x_NI.double(), w_OI.double(), b_O.double())
    return bool((got_NO - wanted_NO).abs().max() <= 0.01 * wanted_NO.abs().max())


def _ops() -> Any:
    return torch.ops.mkldnn


def _memory() -> int:
    """Bytes of memory of this machine; 0 where that cannot be asked."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
