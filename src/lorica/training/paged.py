"""Rows in unified memory, which CUDA pages between the GPU and the host as it needs room.

In: a row on a GPU. Out: zeros of its shape that the driver may move out. bitsandbytes allocates them, as QLoRA's paged
optimisers do; the arithmetic stays torch's own. Refuses to work without CUDA: elsewhere there is nothing to page.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from lorica.core.errors import MissingError

KINDS = {torch.float32: "<f4", torch.float64: "<f8"}


class _Managed:
    """Managed memory as torch takes it over: by the CUDA array interface."""

    def __init__(self, held: Tensor) -> None:
        self.held = held
        self.__cuda_array_interface__ = {
            "shape": tuple(held.shape),
            "typestr": KINDS[held.dtype],
            "data": (held.data_ptr(), False),
            "version": 3,
        }


def check_paged(like: Tensor) -> None:
    """Raises MissingError where rows beside this one cannot be paged."""
    if not like.is_cuda:
        raise MissingError(
            f"`paged` moments are memory that CUDA moves between GPU and host, and the adapter is on {like.device}.",
            hint="Leave `paged` out, or train on a CUDA device.",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingError(
            "`paged` moments need bitsandbytes, which is not installed.", hint="pip install bitsandbytes"
        )


def paged_zeros(like: Tensor) -> Tensor:
    """Zeros of a row's shape and dtype in unified memory, as a tensor on its GPU. Raises MissingError."""
    check_paged(like)
    from bitsandbytes import functional

    make: Any = functional.get_paged
    held = make(*like.shape, dtype=like.dtype, device=like.device)
    return torch.as_tensor(_Managed(held), device=like.device).zero_()
