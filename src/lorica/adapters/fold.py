"""Folding: the weight and bias that a site has once its updates are part of it, in float64.

In: a frozen weight in the base's dtype and linear updates, innermost first. Out: float64 blocks of output rows, so
that a large table is never held in float64 as a whole. Refuses to know modules, adapters and where results go.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from lorica.core.update import LinearUpdate, LowRank

BLOCK = 2**23
"""Most weight elements in float64 at a time (64 MiB)."""


class Placed(Protocol):
    """Anything that is on a device: a tensor, a frozen weight."""

    @property
    def device(self) -> torch.device: ...


def work_device(tensor: Placed) -> torch.device:
    """Where float64 arithmetic on a tensor is done: on its own device, and on the CPU for mps, which has none."""
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device


def doubled(update: LinearUpdate, device: torch.device, *, copy: bool = False) -> LinearUpdate:
    """The update with every tensor in float64 on a device, without gradient; with `copy`, sharing no memory."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device=device, dtype=torch.float64, copy=copy)

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else wide(tensor)

    return replace(
        update,
        factors=tuple(
            LowRank(wide(f.A_RI), wide(f.B_OR), f.scale, cast(f.mid_R), cast(f.post_O)) for f in update.factors
        ),
        delta=cast(update.delta),
        in_scale_I=cast(update.in_scale_I),
        out_scale_O=cast(update.out_scale_O),
        bias_O=cast(update.bias_O),
    )


def rows_of(update: LinearUpdate, rows: slice) -> LinearUpdate:
    """The update of some output rows: every part but A, mid and in_scale is cut along its first axis."""

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows]

    return replace(
        update,
        factors=tuple(replace(f, B_OR=f.B_OR[rows], post_O=cut(f.post_O)) for f in update.factors),
        delta=cut(update.delta),
        out_scale_O=cut(update.out_scale_O),
        bias_O=cut(update.bias_O),
    )


def blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Runs of output rows of a weight, each of at most `BLOCK` elements (or one row)."""
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def fold_weight(weight: Tensor, updates: Sequence[LinearUpdate]) -> Tensor:
    """`W'` of a float64 weight (or of a block of its rows) under a stack, innermost first; norms are [features]."""
    for update in updates:
        weight = update.effective(weight)
    return weight


def fold_bias(bias_O: Tensor | None, updates: Sequence[LinearUpdate]) -> Tensor | None:
    """`b'` under a stack; None where there is neither a bias nor an update of it."""
    for update in updates:
        bias_O = update.effective_bias(bias_O)
    return bias_O


def unfold_weight(weight: Tensor, updates: Sequence[LinearUpdate]) -> Tensor:
    """`W` of a float64 `W'`: the inverse of `fold_weight`. Every scale must be invertible."""
    for update in reversed(updates):
        if update.out_scale_O is not None:
            weight = weight / update.out_scale_O.view(-1, *(1,) * (weight.ndim - 1))
        for factor in update.factors:
            weight = weight - factor.dense()
        if update.in_scale_I is not None:
            wide = weight.ndim > 2
            weight = weight / (update.in_scale_I.view(1, -1, *(1,) * (weight.ndim - 2)) if wide else update.in_scale_I)
        weight = weight if update.delta is None else weight - update.delta
    return weight


def unfold_bias(bias_O: Tensor, updates: Sequence[LinearUpdate]) -> Tensor:
    """`b` of a float64 `b'`: the inverse of `fold_bias` where there was a bias."""
    for update in reversed(updates):
        bias_O = bias_O if update.bias_O is None else bias_O - update.bias_O
        if update.scale_bias and update.out_scale_O is not None:
            bias_O = bias_O / update.out_scale_O
    return bias_O


def invertible(update: LinearUpdate) -> bool:
    """Whether no scale is zero."""
    return all(scale is None or bool(scale.all()) for scale in (update.in_scale_I, update.out_scale_O))


def changes_weight(update: LinearUpdate) -> bool:
    """Whether anything but the bias is touched."""
    return bool(update.factors) or any(
        part is not None for part in (update.delta, update.in_scale_I, update.out_scale_O)
    )
