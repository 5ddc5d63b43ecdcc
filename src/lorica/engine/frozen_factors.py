"""Factors in the dtype of a pass: those that adapters share are cast, and laid out for the CPU's kernels, once.

In: a factor or a view of one, and what meets it. Out: its cast, or the product. Any other factor is cast where it is
read, for it may be another in the next pass. Refuses to know adapters, terms and gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorica.core.shared import shared_of
from lorica.engine.prepack import PackedWeight, can_pack
from lorica.engine.replay import held


def in_dtype(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor in a dtype, not to be written to."""
    shared = None if factor.dtype == dtype else shared_of(factor)
    if shared is None:
        return factor.to(dtype)
    whole = shared.tensor
    kept = held(shared.made(dtype, lambda: whole.to(dtype)))
    return kept.as_strided(factor.shape, factor.stride(), factor.storage_offset())


def product(x_NI: Tensor, factor_OI: Tensor) -> Tensor:
    """`x Fᵀ` in x's dtype. A shared factor that has to be cast is cast into the order that the CPU's kernels read."""
    dtype = x_NI.dtype
    shared = None if factor_OI.dtype == dtype or not _packs(factor_OI, dtype) else shared_of(factor_OI)
    if shared is None:
        return x_NI @ in_dtype(factor_OI, dtype).mT
    key = dtype, factor_OI.shape, factor_OI.stride(), factor_OI.storage_offset()
    return held(shared.made(key, lambda: PackedWeight(factor_OI.to(dtype), None)))(x_NI)


def _packs(factor: Tensor, dtype: torch.dtype) -> bool:
    return factor.device.type == "cpu" and can_pack(dtype)
