"""The functions of `passes.c` on tensors: norms, rotations, gates and the factors of few rows, forth and back.

In: tensors on a CPU. Out: what torch's own operations give, up to rounding; many numbers are spread over torch's number
of threads by rows. Refuses to know modules, adapters and autograd.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica.engine.native.kernels import LANES
from lorica.engine.native.spread import spread

SOURCE = Path(__file__).with_name("passes.c")
ROWS = 4
"""Most rows of `linear_forth` and `linear_back`."""
Signed = tuple[Tensor, Tensor]
"""Cosines and sines of each row [N, ..., K] in float32, the sines of the first half negative."""
_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
_FORMS: dict[str, list[Any]] = {
    "norm_forth": [_POINTER] * 4 + [_LONG] * 4 + [_FLOAT, _INT],
    "norm_back": [_POINTER] * 5 + [_LONG] * 4,
    "turn_forth": [_POINTER] * 6 + [_LONG] * 4 + [_FLOAT],
    "turn_back": [_POINTER] * 7 + [_LONG] * 6,
    "gate_forth": [_POINTER] * 3 + [_LONG] * 3,
    "gate_back": [_POINTER] * 5 + [_LONG] * 3,
    "factors_forth": [_POINTER] * 4 + [_LONG] * 5,
    "factors_back": [_POINTER] * 5 + [_LONG] * 5,
    "factors_input": [_POINTER] * 3 + [_LONG] * 4,
    "linear_forth": [_POINTER] * 4 + [_LONG] * 4,
    "linear_back": [_POINTER] * 3 + [_LONG] * 4,
}


class _Term(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("a", "b", "da", "db")),
        *((name, ctypes.c_int64) for name in ("rank", "first", "out")),
        *((name, _FLOAT) for name in ("scale", "unused")),
    ]


@dataclass(slots=True)
class Pair:
    """`scale · B A` at the columns from `first` on: A [R, I] and B [O, R] in contiguous float32."""

    A_RI: Tensor
    B_OR: Tensor
    first: int
    scale: float


class Passes:
    """The functions for a backbone of one dtype."""

    def __init__(self, code: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype, self._code = dtype, code
        for name, form in _FORMS.items():
            function = getattr(code, name)
            function.argtypes, function.restype = form, None

    # -- norms -----------------------------------------------------------------------------------------------------

    def takes(self, x: Tensor, width: int) -> bool:
        """Whether `norm_forth` reads x where it lies: all contiguous, or rows [1, N, H, K] that are apart."""
        if x.dtype != self.dtype or width % LANES or x.shape[-1] != width:
            return False
        apart = x.ndim == 4 and x.shape[0] == 1 and x.stride()[2:] == (width, 1)
        return x.is_contiguous() or apart

    def norm_forth(self, x: Tensor, factor_D: Tensor, eps: float, *, rounded: bool) -> tuple[Tensor, Tensor]:
        """`x / √(mean(x²) + ε) ⊙ factor` over the last axis, and that root's inverse; the normed x is rounded before
        the factor if `rounded`.
        """
        y, root = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.numel() // factor_D.shape[0])
        rows, heads, width, stride = _form(x, factor_D.shape[0])
        size, run = x.element_size(), self._code.norm_forth

        def part(start: int, stop: int) -> None:
            out = y.data_ptr() + start * heads * width * size, root.data_ptr() + start * heads * 4
            own = x.data_ptr() + start * stride * size, factor_D.data_ptr()
            run(*own, *out, stop - start, heads, width, stride, eps, rounded)

        spread(part, rows, x.numel())
        return y, root

    def norm_back(self, dy: Tensor, x: Tensor, factor_D: Tensor, root: Tensor) -> Tensor:
        """dx."""
        dx = torch.empty(x.shape, dtype=x.dtype)
        rows, heads, width, stride = _form(x, factor_D.shape[0])
        size, run = x.element_size(), self._code.norm_back

        def part(start: int, stop: int) -> None:
            at = start * heads * width * size
            given = dy.data_ptr() + at, x.data_ptr() + start * stride * size, factor_D.data_ptr()
            run(*given, root.data_ptr() + start * heads * 4, dx.data_ptr() + at, stop - start, heads, width, stride)

        spread(part, rows, x.numel())
        return dx

    # -- heads -------------------------------------------------------------------------------------------------------

    def turns(self, x_ND: Tensor, dim: int) -> bool:
        """Whether `turn_forth` reads x where it lies: rows that may be apart."""
        return x_ND.dtype == self.dtype and x_ND.stride(1) == 1 and not dim % LANES

    def turn_forth(
        self, x_ND: Tensor, factor_K: Tensor | None, rotations: Signed, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        """The heads [N, H, K] of every row, normed where there is a factor and rotated half against half, and the
        inverse roots of the norms.
        """
        rows, dim = x_ND.shape[0], _dim(rotations, x_ND.shape[0])
        heads, stride, run = x_ND.shape[1] // dim, x_ND.stride(0), self._code.turn_forth
        y_NHK = torch.empty(rows, heads, dim, dtype=self.dtype)
        factor, root = None, None
        if factor_K is not None:
            factor, root = factor_K.data_ptr(), torch.empty(rows * heads)
        size = y_NHK.element_size()

        def part(start: int, stop: int) -> None:
            own = (t.data_ptr() + start * dim * 4 for t in rotations)
            y = y_NHK.data_ptr() + start * heads * dim * size
            roots = None if root is None else root.data_ptr() + start * heads * 4
            run(x_ND.data_ptr() + start * stride * size, factor, *own, y, roots, stop - start, heads, dim, stride, eps)

        spread(part, rows, y_NHK.numel())
        return y_NHK, root

    def turn_back(self, dy_NHK: Tensor, rotations: Signed, norm: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """dx [N, D]; `norm` are x, the factor and the roots, where there is a factor."""
        (rows, heads, dim), run = dy_NHK.shape, self._code.turn_back
        assert _dim(rotations, rows) == dim
        dy_NHK = dy_NHK if dy_NHK.stride(2) == 1 else dy_NHK.contiguous()
        dx_ND = torch.empty(rows, heads * dim, dtype=self.dtype)
        stride, (row, head, _), size = 0 if norm is None else norm[0].stride(0), dy_NHK.stride(), dx_ND.element_size()

        def part(start: int, stop: int) -> None:
            x = factor = root = None
            if norm is not None:
                x, root = norm[0].data_ptr() + start * stride * size, norm[2].data_ptr() + start * heads * 4
                factor = norm[1].data_ptr()
            own = (t.data_ptr() + start * dim * 4 for t in rotations)
            dy, dx = dy_NHK.data_ptr() + start * row * size, dx_ND.data_ptr() + start * heads * dim * size
            run(dy, x, factor, *own, root, dx, stop - start, heads, dim, stride, row, head)

        spread(part, rows, dx_ND.numel())
        return dx_ND

    # -- gates -----------------------------------------------------------------------------------------------------

    def gates(self, gate_NF: Tensor, up_NF: Tensor) -> bool:
        """Whether `gate_forth` reads the two where they lie: rows of one distance."""
        same = gate_NF.shape == up_NF.shape and gate_NF.stride() == up_NF.stride() and gate_NF.ndim == 2
        return (
            same
            and gate_NF.dtype == up_NF.dtype == self.dtype
            and gate_NF.stride(1) == 1
            and not gate_NF.shape[1] % LANES
        )

    def gate_forth(self, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        """`silu(gate) ⊙ up`."""
        y_NF = torch.empty(gate_NF.shape, dtype=self.dtype)
        (rows, width), stride, size = gate_NF.shape, gate_NF.stride(0), y_NF.element_size()

        def part(start: int, stop: int) -> None:
            given = (t.data_ptr() + start * stride * size for t in (gate_NF, up_NF))
            self._code.gate_forth(*given, y_NF.data_ptr() + start * width * size, stop - start, width, stride)

        spread(part, rows, y_NF.numel())
        return y_NF

    def gate_back(self, dy_NF: Tensor, gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, Tensor]:
        """dgate and dup."""
        dgate_NF, dup_NF = torch.empty(dy_NF.shape, dtype=self.dtype), torch.empty(dy_NF.shape, dtype=self.dtype)
        (rows, width), stride, size = gate_NF.shape, gate_NF.stride(0), dy_NF.element_size()

        def part(start: int, stop: int) -> None:
            at = start * width * size
            given = (t.data_ptr() + start * stride * size for t in (gate_NF, up_NF))
            out = (t.data_ptr() + at for t in (dgate_NF, dup_NF))
            self._code.gate_back(dy_NF.data_ptr() + at, *given, *out, stop - start, width, stride)

        spread(part, rows, dy_NF.numel())
        return dgate_NF, dup_NF

    # -- factors of few rows -----------------------------------------------------------------------------------------

    def factors_forth(self, pairs: Sequence[Pair], x_NI: Tensor, y_NO: Tensor) -> Tensor:
        """Add every pair's `scale · x Aᵀ Bᵀ` to y, all in float32. Returns `x Aᵀ` of all side by side."""
        (rows, width), ranks = x_NI.shape, sum(p.A_RI.shape[0] for p in pairs)
        h_NR = torch.empty(rows, ranks)
        tensors = (x_NI, y_NO, h_NR)
        self._code.factors_forth(
            _table(pairs), *(t.data_ptr() for t in tensors), len(pairs), rows, width, y_NO.shape[1], ranks
        )
        return h_NR

    def factors_back(
        self,
        pairs: Sequence[Pair],
        x_NI: Tensor,
        dy_NO: Tensor,
        h_NR: Tensor,
        wanted: Sequence[tuple[bool, bool]],
    ) -> tuple[Tensor, list[tuple[Tensor | None, Tensor | None]]]:
        """The gradient of `x Aᵀ`, and those of each pair's A and B where they are wanted."""
        (rows, ranks), dh_NR = h_NR.shape, torch.empty_like(h_NR)
        grads = [
            (torch.empty_like(p.A_RI) if a else None, torch.empty_like(p.B_OR) if b else None)
            for p, (a, b) in zip(pairs, wanted, strict=True)
        ]
        pointers = (t.data_ptr() for t in (x_NI, dy_NO, h_NR, dh_NR))
        sizes = (len(pairs), rows, pairs[0].A_RI.shape[1], dy_NO.shape[1], ranks)
        self._code.factors_back(_table(pairs, grads), *pointers, *sizes)
        return dh_NR, grads

    def factors_input(self, pairs: Sequence[Pair], dh_NR: Tensor, dx_NI: Tensor) -> None:
        """Add the pairs' share to dx, of this dtype."""
        sizes = (len(pairs), *dx_NI.shape, dh_NR.shape[1])
        self._code.factors_input(_table(pairs), dh_NR.data_ptr(), dx_NI.data_ptr(), *sizes)

    # -- frozen maps of few rows -------------------------------------------------------------------------------------

    def multiplies(self, weights: Sequence[Tensor]) -> bool:
        """Whether `linear_forth` and `linear_back` take weights of these forms."""
        return bool(weights) and all(
            w.dtype == self.dtype and w.is_contiguous() and w.shape[0] % 4 == 0 and w.shape[1] % LANES == 0
            for w in weights
        )

    def linear_forth(self, x_NI: Tensor, weights: Sequence[Tensor], bias_O: Tensor | None) -> Tensor:
        """The products of up to four rows with weights [out, I], side by side, and a bias of all."""
        x_low = x_NI.float().contiguous()
        y_NO = torch.empty(x_NI.shape[0], sum(w.shape[0] for w in weights), dtype=self.dtype)
        at, run = 0, self._code.linear_forth
        for weight in weights:
            bias = None if bias_O is None else bias_O.data_ptr() + at
            out = weight.shape[0]
            run(weight.data_ptr(), bias, x_low.data_ptr(), y_NO.data_ptr() + at, *x_low.shape, out, y_NO.shape[1])
            at += out * y_NO.element_size()
        return y_NO

    def linear_back(self, dy_NO: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """The gradient of their input."""
        dy_NO = dy_NO.contiguous()
        dx_NI = torch.zeros(dy_NO.shape[0], weights[0].shape[1])
        at, run = 0, self._code.linear_back
        for weight in weights:
            out = weight.shape[0]
            run(weight.data_ptr(), dy_NO.data_ptr() + at, dx_NI.data_ptr(), *dx_NI.shape, out, dy_NO.shape[1])
            at += out * dy_NO.element_size()
        return dx_NI.to(self.dtype)


def _table(
    pairs: Sequence[Pair], grads: Sequence[tuple[Tensor | None, Tensor | None]] | None = None
) -> ctypes.Array[_Term]:
    table = (_Term * len(pairs))()
    for i, pair in enumerate(pairs):
        a, b = (None, None) if grads is None else (None if g is None else g.data_ptr() for g in grads[i])
        out, rank = pair.B_OR.shape
        table[i] = _Term(pair.A_RI.data_ptr(), pair.B_OR.data_ptr(), a, b, rank, pair.first, out, pair.scale, 0.0)
    return table


def _dim(rotations: Signed, rows: int) -> int:
    """The numbers of a head."""
    dim = rotations[0].shape[-1]
    for turn in rotations:
        assert turn.numel() == rows * dim
        assert turn.dtype == torch.float32
        assert turn.is_contiguous()
    return dim


def _form(x: Tensor, width: int) -> tuple[int, int, int, int]:
    """Rows, heads of each, width, and numbers from row to row."""
    if x.is_contiguous():
        return x.numel() // width, 1, width, width
    return x.shape[1], x.shape[2], width, x.stride(1)
