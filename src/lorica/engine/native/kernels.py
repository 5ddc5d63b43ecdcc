"""The functions of `decode.c` on tensors: what surrounds the matrix products of a step of single-token rows.

In: contiguous tensors on a CPU without gradients. Out: what torch's own operations give, up to rounding; many numbers
are spread over torch's number of threads by rows. Refuses to know modules, adapters and caches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorica.engine.native.spread import spread

SOURCE = Path(__file__).with_name("decode.c")
MACROS = {torch.float32: (), torch.bfloat16: ("HALF",)}
LANES = 16
"""Widths are multiples of this."""
BLOCK = 256
"""Logits whose mass is summed up together."""
BUNCH = 4
"""Rows that read the same factors together."""
NO_ENTRY = 0, 0, 0
_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_FORMS: dict[str, list[Any]] = {
    "norm": [_POINTER] * 5 + [_LONG] * 2 + [_FLOAT],
    "gate": [_POINTER] * 2 + [_LONG] * 2,
    "turn": [_POINTER] * 6 + [_LONG] * 5 + [_FLOAT],
    "attend": [_POINTER] * 9 + [_LONG] * 8 + [_FLOAT],
    "low_rank": [_POINTER] * 6 + [_LONG] * 3,
    "transpose": [_POINTER] * 2 + [_LONG] * 2 + [_FLOAT],
    "draw": [_POINTER] * 6 + [_LONG] * 2,
}


class Kernels:
    """The functions for a backbone of one dtype."""

    def __init__(self, code: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        for name, form in _FORMS.items():
            function = getattr(code, name)
            function.argtypes, function.restype = form, None
        self._norm, self._gate, self._turn, self._attend = code.norm, code.gate, code.turn, code.attend
        self._low_rank, self._transpose, self._draw = code.low_rank, code.transpose, code.draw

    def norm(self, x: Tensor, factor_D: Tensor, eps: float) -> Tensor:
        """`factor ⊙ x / √(mean(x²) + ε)` over the last axis; `factor` is float32."""
        y, width = torch.empty_like(x), factor_D.shape[0]
        rows = x.numel() // width
        self._norm(x.data_ptr(), None, factor_D.data_ptr(), None, y.data_ptr(), rows, width, eps)
        return y

    def sum_norm(self, x: Tensor, branch: Tensor, factor_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`x + branch`, and its norm."""
        both, y, width = torch.empty_like(x), torch.empty_like(x), factor_D.shape[0]
        pointers = (t.data_ptr() for t in (x, branch, factor_D, both, y))
        self._norm(*pointers, x.numel() // width, width, eps)
        return both, y

    def gate(self, x_RF: Tensor) -> Tensor:
        """`silu(a) ⊙ b` of a and b side by side."""
        assert x_RF.dtype == self.dtype
        assert x_RF.is_contiguous()
        rows, width = x_RF.shape[0], x_RF.shape[1] // 2
        y_RF = x_RF.new_empty(rows, width)
        self._gate(x_RF.data_ptr(), y_RF.data_ptr(), rows, width)
        return y_RF

    def turn(
        self,
        x_RD: Tensor,
        factor_SK: Tensor | None,
        cos_RK: Tensor,
        sin_RK: Tensor,
        heads: tuple[int, int, int],
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """The queries [R, H, K] and keys [R, G, K] that each row begins with, normed where there is a factor and
        rotated half against half, in float32. `heads` are H, G and K; cosines and sines are float32, the sines of the
        first half negative.
        """
        assert x_RD.dtype == self.dtype
        assert x_RD.is_contiguous()
        (rows, stride), (queries, groups, dim) = x_RD.shape, heads
        for turn in (cos_RK, sin_RK):
            assert turn.numel() == rows * dim
            assert turn.is_contiguous()
        q_RHK, k_RGK = torch.empty(rows, queries, dim), torch.empty(rows, groups, dim)
        factor = None if factor_SK is None else factor_SK.data_ptr()
        pointers = (t.data_ptr() for t in (cos_RK, sin_RK, q_RHK, k_RGK))
        self._turn(x_RD.data_ptr(), factor, *pointers, rows, queries, groups, dim, stride, eps)
        return q_RHK, k_RGK

    def attend(
        self,
        q_RHK: Tensor,
        k_RGK: Tensor,
        v_RGK: Tensor,
        kept: tuple[Tensor, Tensor],
        seen: tuple[Tensor, Tensor],
        slot: int,
        window: int,
        scale: float,
    ) -> Tensor:
        """Attention of one query a row over its kept keys, [R, H, K] in this dtype; the newest key and value are
        written at `slot`. Queries and keys are float32, as all that is kept, [R · G, capacity, K]; values have this
        dtype, and each row's are contiguous. `seen` are the first slot of each row, and the slot up to which a window
        hides nothing; a window of 0 is none.
        """
        assert v_RGK.dtype == self.dtype
        assert v_RGK.stride()[1:] == (q_RHK.shape[2], 1)
        assert q_RHK.is_contiguous()
        assert k_RGK.is_contiguous()
        (rows, heads, dim), groups = q_RHK.shape, k_RGK.shape[1]
        capacity, y_RHK = kept[0].shape[1], torch.empty(rows, heads, dim, dtype=self.dtype)
        sizes = (heads, groups, dim, v_RGK.stride(0), capacity, slot, window)

        def part(start: int, stop: int) -> None:
            span, scratch_HS = slice(start, stop), torch.empty(heads // groups, capacity)
            own = (part_BSK[start * groups :] for part_BSK in kept)
            tensors = (q_RHK[span], k_RGK[span], v_RGK[span], *own, y_RHK[span], scratch_HS, *(t[span] for t in seen))
            self._attend(*(t.data_ptr() for t in tensors), stop - start, *sizes, scale)

        spread(part, rows, 2 * rows * groups * slot * dim)
        return y_RHK

    def transposed(self, B_OR: Tensor, scale: float) -> Tensor | None:
        """`scale · Bᵀ` [R, O], as `LowRank` reads it; None for a B that is not contiguous float32."""
        out, rank = B_OR.shape
        if B_OR.dtype != torch.float32 or not B_OR.is_contiguous() or out % LANES:
            return None
        y_RO = torch.empty(rank, out, dtype=self.dtype)
        self._transpose(B_OR.data_ptr(), y_RO.data_ptr(), rank, out, scale)
        return y_RO

    def draw(self, logits_RV: Tensor, heats: Sequence[float], uniform: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The next token of each row, and its log-probability without heat (temperature): the likeliest token at heat
        0, else by inverse transform of a uniform number.
        """
        rows, vocabulary = logits_RV.shape
        token_R, logprob_R = torch.empty(rows, dtype=torch.long), torch.empty(rows)
        heat_R, uniform_R = torch.tensor(heats), torch.tensor(uniform)

        def part(start: int, stop: int) -> None:
            own = (t[start:stop] for t in (logits_RV, heat_R, uniform_R, token_R, logprob_R))
            mass = torch.empty(-(-vocabulary // BLOCK), dtype=torch.double)
            self._draw(*(t.data_ptr() for t in own), mass.data_ptr(), stop - start, vocabulary)

        spread(part, rows, rows * vocabulary)
        return token_R, logprob_R


@dataclass(frozen=True, slots=True, eq=False)
class RowFactors:
    """A [R, I] and B [R, O], as `LowRank` reads them."""

    A_RI: Tensor
    B_RO: Tensor
    entry: tuple[int, int, int] = field(init=False)
    numbers: int = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        assert self.A_RI.is_contiguous()
        assert self.B_RO.is_contiguous()
        assert self.A_RI.dtype == self.B_RO.dtype
        entry = self.A_RI.data_ptr(), self.B_RO.data_ptr(), self.A_RI.shape[0]
        object.__setattr__(self, "entry", entry)
        object.__setattr__(self, "numbers", self.A_RI.numel() + self.B_RO.numel())
        object.__setattr__(self, "dtype", self.A_RI.dtype)


class RowMaps:
    """What one row has at maps of one input: None at a map that it leaves as it is.

    Attributes: `entries` [maps, 3] are addresses and ranks, `numbers` how many numbers they stand for, `rank` the
    largest.
    """

    def __init__(self, factors: Sequence[RowFactors | None]) -> None:
        known = [own for own in factors if own is not None]
        self.held = factors  # the entries are addresses alone
        self.entries = np.array([NO_ENTRY if own is None else own.entry for own in factors], np.int64)
        self.numbers = sum(own.numbers for own in known)
        self.rank = max((own.entry[2] for own in known), default=0)
        self.inputs = known[0].A_RI.shape[1] if known else 0
        self.dtypes = {own.dtype for own in known}


class LowRank:
    """`y_n += x_n Aᵀ B` of rows with factors of their own at maps of one input, whose outputs are side by side.

    Args:
        rows: what each row has.
        sizes: the outputs of each map.
        counts: neighbours that have what one of `rows` has; by default one each.
    """

    def __init__(
        self, kernels: Kernels, rows: Sequence[RowMaps], sizes: Sequence[int], counts: Sequence[int] | None = None
    ) -> None:
        self._held = rows  # the table below holds addresses alone
        assert all(row.dtypes <= {kernels.dtype} for row in rows)
        self._ranks, self._inputs = max(row.rank for row in rows), max(row.inputs for row in rows)
        table = np.concatenate([row.entries for row in rows]).reshape(len(rows), -1, 3)
        self._table = torch.from_numpy(table if counts is None else table.repeat(counts, 0))
        self._sizes, self._outputs = torch.tensor(sizes), sum(sizes)
        self.numbers = sum(n * row.numbers for row, n in zip(rows, counts or [1] * len(rows), strict=True))
        self._run, self._dtype = kernels._low_rank, kernels.dtype

    @property
    def table(self) -> tuple[int, int, int, int]:
        """The addresses of the rows' factors and of the maps' sizes, the number of maps, and the largest rank."""
        return self._table.data_ptr(), self._sizes.data_ptr(), self._sizes.shape[0], self._ranks

    def add(self, x_NI: Tensor, y_NO: Tensor) -> None:
        """Add to y in place."""
        assert x_NI.dtype == y_NO.dtype == self._dtype
        assert x_NI.is_contiguous()
        assert y_NO.is_contiguous()

        def part(start: int, stop: int) -> None:
            own = (t[start:stop] for t in (self._table, x_NI, y_NO))
            hidden, wide = torch.empty(BUNCH * self._ranks), torch.empty(BUNCH * (self._inputs + self._outputs))
            pointers = [t.data_ptr() for t in (*own, hidden, wide, self._sizes)]
            self._run(*pointers, stop - start, self._inputs, self._sizes.shape[0])

        spread(part, x_NI.shape[0], self.numbers)
