"""Fastfood: a random projection of a few coordinates onto a whole tensor that is never stored as a matrix.

In: a seed in words, sizes, and coordinates θ [d]. Out: `P θ` [D], differentiable in θ, in time O(L log L). The random
parts are a function of (seed, L) alone, drawn on the CPU; recently used ones are kept. Refuses to know methods, sites
and what the tensor is for. Suffix: L, the padded size, a power of two.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KEPT_BYTES = 2**29
"""Most bytes of random parts that are kept between calls; the others are drawn again each time."""
_FIRST = 5
"""Levels of the transform that one product with a dense 32×32 matrix does at once."""


def _butterflies(x_L: Tensor) -> Tensor:
    """The transform of a contiguous vector: the lowest levels as one product, the others by sums and differences."""
    size = x_L.shape[0]
    half = 1
    if size >= 2**_FIRST:
        sylvester = torch.ones(1, 1, dtype=x_L.dtype, device=x_L.device)
        for _ in range(_FIRST):
            sylvester = torch.cat([torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)])
        half = 2**_FIRST
        x_L = (x_L.view(-1, half) @ sylvester).view(-1)
    while half < size:
        pairs = x_L.view(-1, 2, half)
        x_L = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).view(-1)
        half *= 2
    return x_L


class _Hadamard(torch.autograd.Function):
    """H is symmetric: the gradient passes through the same transform, times a constant."""

    @staticmethod
    def forward(ctx: Any, x_L: Tensor, back: float) -> Tensor:
        ctx.back = back
        return _butterflies(x_L.contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        through: Tensor = _Hadamard.apply(grads[0], ctx.back)  # type: ignore[no-untyped-call]
        return (through if ctx.back == 1.0 else ctx.back * through), None


def hadamard(x_L: Tensor, *, back: float = 1.0) -> Tensor:
    """`H x` with the unnormalised Walsh-Hadamard matrix of entries ±1 in natural order: `H H = L · I`.

    x is [L], L a power of two (else ValueError). The gradient is `back · H g`; 1 is the true one.
    """
    size = x_L.shape[-1]
    if x_L.ndim != 1 or size < 1 or size & (size - 1):
        raise ValueError(f"A Walsh-Hadamard transform is of a vector of 2^k values; shape {tuple(x_L.shape)} is none.")
    result: Tensor = _Hadamard.apply(x_L, back)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True, eq=False)
class Fastfood:
    """The random parts of one projection: signs B, a permutation Π (gather) and normal values G, all [L]."""

    signs_L: Tensor
    order_L: Tensor
    normal_L: Tensor

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.signs_L, self.order_L, self.normal_L))

    def divisor(self, size: int) -> float:
        """`√(L Σ G²) · √(D/L)`: columns of P then have norm 1, exactly for D = L and in the mean for fewer rows."""
        return math.sqrt(self._square * size)

    @cached_property
    def _square(self) -> float:
        return float(self.normal_L.double().square().sum())

    def project(self, theta_d: Tensor, size: int, *, scaled_back: bool = False) -> Tensor:
        """`P θ = [H G Π H B pad(θ)]_{1:D} / divisor`, [D], in θ's dtype.

        With `scaled_back` each transform multiplies its gradient by 1/√L, as the published code does: the gradient of
        θ is then 1/L of the true one. The value is the same.
        """
        length = self.normal_L.numel()
        back = length**-0.5 if scaled_back else 1.0
        x_L = F.pad(theta_d, (0, length - theta_d.shape[0])) * self.signs_L
        x_L = hadamard(x_L, back=back).index_select(0, self.order_L) * self.normal_L.to(theta_d.dtype)
        return hadamard(x_L, back=back)[:size] / self.divisor(size)


def padded(size: int, dimension: int) -> int:
    """L: the smallest power of two that holds both the tensor and the coordinates."""
    return 1 << (max(size, dimension) - 1).bit_length()


class _Kept:
    """Random parts by key, the least recently used dropped beyond `KEPT_BYTES`; shared by threads."""

    def __init__(self) -> None:
        self._parts: OrderedDict[tuple[str, int, torch.device], Fastfood] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int, torch.device]) -> Fastfood:
        with self._lock:
            if key in self._parts:
                self._parts.move_to_end(key)
                return self._parts[key]
        drawn = _drawn(*key)
        with self._lock:
            if key not in self._parts and drawn.bytes <= KEPT_BYTES:
                self._parts[key] = drawn
                self._bytes += drawn.bytes
            while self._bytes > KEPT_BYTES:
                self._bytes -= self._parts.popitem(last=False)[1].bytes
        return drawn


_KEPT = _Kept()


def _drawn(seed: str, length: int, device: torch.device) -> Fastfood:
    rng = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    signs_L = torch.randint(0, 2, (length,), generator=rng, dtype=torch.int8).mul_(2).sub_(1)
    order_L = torch.randperm(length, generator=rng, dtype=torch.int32)
    normal_L = torch.randn(length, generator=rng, dtype=torch.float32)
    return Fastfood(signs_L.to(device), order_L.to(device), normal_L.to(device))


def fastfood(seed: str, size: int, dimension: int, device: torch.device) -> Fastfood:
    """The random parts for a tensor of `size` values and `dimension` coordinates. Equal arguments, equal bits."""
    return _KEPT.get((seed, padded(size, dimension), torch.device(device)))
