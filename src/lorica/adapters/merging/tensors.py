"""Arithmetic that several rules share: how many entries a share is, trimming by magnitude, weighted sums.

In: tensors of one shape. Out: a tensor of that shape. Refuses to know sites, adapters and rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def whole(share: float, count: int) -> int:
    """`⌊share · count⌋`, where a product that is whole but for floating-point rounding counts as whole."""
    exact = share * count
    near = round(exact)
    return near if abs(exact - near) <= 1e-12 * max(1.0, exact) else math.floor(exact)


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """The tensor with all but its `⌊density · n⌋` entries of largest magnitude at zero; exactly so many stay."""
    if density >= 1:
        return tensor
    flat = tensor.reshape(-1)
    at = torch.topk(flat.abs(), whole(density, flat.numel()), sorted=False).indices
    return torch.zeros_like(flat).scatter(0, at, flat[at]).view(tensor.shape)


def threshold_for(tensor: Tensor, density: float) -> float:
    """The k-th smallest magnitude, counted from 1, with `k = ⌊(1 − density) n⌋`; 0 for k = 0."""
    k = whole(1 - density, tensor.numel())
    return float(tensor.reshape(-1).abs().kthvalue(k).values) if k else 0.0


def keep_from(tensor: Tensor, threshold: float) -> Tensor:
    """The tensor with the entries of magnitude below the threshold at zero."""
    return tensor * (tensor.abs() >= threshold)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`Σ w_n T_n`."""
    found = weights[0] * tensors[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        found = found + weight * tensor
    return found


def draw_kept(shape: Sequence[int], density: float, rng: torch.Generator) -> Tensor:
    """Ones with probability `density`, zeros elsewhere, float64 on the CPU."""
    return torch.bernoulli(torch.full(tuple(shape), density, dtype=torch.float64), generator=rng)
