"""Blocks of a flat tensor and their largest magnitudes, in the float32 arithmetic that bitsandbytes uses.

In: float32 tensors. Out: codes of a sorted table, one scale a block. The last block may be short. Refuses to know
formats and bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-38
"""Smallest divisor: an all-zero block divides by it, and every code is that of zero."""


def absmax(flat_N: Tensor, block: int) -> Tensor:
    """The largest magnitude of each block, [⌈N / block⌉] float32."""
    return _blocks(flat_N, block).abs().amax(1)


def nearest(flat_N: Tensor, scale_M: Tensor, block: int, bounds: Tensor) -> Tensor:
    """Code of the nearest table value of `w / scale`, [N] uint8; a tie goes to the lower. `bounds` are the midpoints.

    The quotient is a product with the reciprocal, as in bitsandbytes' kernels: a division could round the other way at
    a bound.
    """
    unit = _blocks(flat_N, block) * (1.0 / scale_M.clamp_min(TINY))[:, None]
    codes = torch.bucketize(unit.clamp_(-1, 1).reshape(-1)[: flat_N.numel()], bounds.to(flat_N.device), out_int32=True)
    return codes.to(torch.uint8)


def scaled(values_N: Tensor, scale_M: Tensor, block: int) -> Tensor:
    """`value · scale` of its block, in place where the blocks are whole, [N] float32."""
    count = values_N.numel()
    whole = count - count % block
    values_N[:whole].view(-1, block).mul_(scale_M[: whole // block, None])
    if whole < count:
        values_N[whole:].mul_(scale_M[-1])
    return values_N


def _blocks(flat_N: Tensor, block: int) -> Tensor:
    short = -flat_N.numel() % block
    return (torch.nn.functional.pad(flat_N, (0, short)) if short else flat_N).view(-1, block)
