"""The update equation of linear sites in plain autograd: the reference, and the upper levels of stacked adapters.

In: x, a lower map's output and bias, an update. Out: y, differentiable by torch alone. Slower than `engine.linear`,
which must equal it. Refuses to know segments, adapters and modules.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.core.update import LinearUpdate, LowRank


@dataclass(frozen=True, slots=True)
class Mask:
    """The mask of one row: positions `[first, stop)` of the `length` that are drawn from a generator of this seed."""

    seed: int
    length: int
    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class Dropout:
    """A mask as a recipe, row by row: a row's own does not depend on which rows share the batch.

    It is drawn anew wherever it is needed, so backward and checkpoints see the same one and none is stored.
    """

    rate: float
    rows: tuple[Mask, ...]

    def __call__(self, x_NI: Tensor) -> Tensor:
        """x under the mask, scaled by 1/(1 − rate)."""
        rng = torch.Generator(device=x_NI.device)
        draws = []
        for row in self.rows:
            drawn = torch.empty((row.length, *x_NI.shape[1:]), dtype=torch.float32, device=x_NI.device)
            draws.append(drawn.uniform_(generator=rng.manual_seed(row.seed))[row.first : row.stop])
        return x_NI * (torch.cat(draws) >= self.rate) / (1.0 - self.rate)

    def cut(self, start: int, stop: int) -> Dropout:
        """The same mask on positions `[start, stop)` alone."""
        rows, at = [], 0
        for row in self.rows:
            size = row.stop - row.first
            first, last = max(start, at) - at, min(stop, at + size) - at
            if first < last:
                rows.append(Mask(row.seed, row.length, row.first + first, row.first + last))
            at += size
        return Dropout(self.rate, tuple(rows))


def on_top(
    x_NI: Tensor, y_NO: Tensor, bias_O: Tensor | None, update: LinearUpdate, dropout: Dropout | None = None
) -> Tensor:
    """A further update over an already adapted output (stacked adapters).

    `y_NO` is the lower map's output for `x_NI ⊙ in_scale`, `bias_O` the lower map's bias.
    """
    if update.delta is not None:
        x_in = x_NI if update.in_scale_I is None else x_NI * update.in_scale_I.to(x_NI.dtype)
        y_NO = y_NO + x_in @ update.delta.T.to(x_NI.dtype)
    x_low = x_NI if dropout is None else dropout(x_NI)
    for factor in update.factors:
        plain: LowRank = factor.folded()
        y_NO = y_NO + (x_low @ plain.A_RI.T.to(x_NI.dtype)) @ plain.B_OR.T.to(x_NI.dtype)
    if update.out_scale_O is not None:
        f_O = update.out_scale_O.to(x_NI.dtype)
        y_NO = f_O * y_NO if bias_O is None or update.scale_bias else f_O * y_NO + (1 - f_O) * bias_O
    return y_NO if update.bias_O is None else y_NO + update.bias_O.to(x_NI.dtype)


def reference_linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, update: LinearUpdate) -> Tensor:
    """The update equation, without dropout: what every faster path must equal."""
    x_in = x_NI if update.in_scale_I is None else x_NI * update.in_scale_I
    y_NO = x_in @ weight_OI.T
    return on_top(x_NI, y_NO if bias_O is None else y_NO + bias_O, bias_O, update)
