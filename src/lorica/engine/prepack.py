"""Frozen weights in the order that the CPU's matrix kernels read them, packed once.

In: frozen weights [out, in]. Out: products with them, a second copy in memory, only where that is known to be right.
The kernels are private to torch, so a self-test guards them. Refuses to know sites and adapters.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SHARE = 4
"""Packed copies may take one part in this many of the machine's memory."""


class PackedWeight:
    """One or several weights over the same input, laid one below the other: `y = x [W₁; W₂; …]ᵀ + [b₁; b₂; …]`."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        joint_OI = torch.cat(list(weights)) if len(weights) > 1 else weights[0].contiguous()
        self._packed: Tensor = _ops()._reorder_linear_weight(joint_OI, 1)
        self._bias_O: Tensor | None = None
        if any(bias is not None for bias in biases):
            self._bias_O = torch.cat(
                [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
            )

    def __call__(self, x_NI: Tensor) -> Tensor:
        y_NO: Tensor = _ops()._linear_pointwise(x_NI, self._packed, self._bias_O, "none", [], "")
        return y_NO


def worth_packing(weights: Sequence[Tensor]) -> bool:
    """Whether the weights can be packed here, and a second copy of them is a small part of the machine's memory."""
    first = weights[0]
    if first.device.type != "cpu" or any(w.dtype != first.dtype or w.device != first.device for w in weights):
        return False
    size = sum(w.numel() * w.element_size() for w in weights)
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
            got_NO = PackedWeight([w_OI[:24], w_OI[24:]], [b_O[:24], b_O[24:]])(x_NI)
    except (RuntimeError, AttributeError, NotImplementedError):  # another build of torch
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
