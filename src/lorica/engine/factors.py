"""The updates of a fixed batch of single-token rows at maps of one input, gathered into a few stacked tensors.

In: the rows' stacks of adapters and the sites of the maps. Out: what to do to the input and to the outputs, batched
over rows. Rows of one stack are neighbours. What the form below cannot hold is named, and goes the general way.
Refuses to know modules, frozen weights and steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.core.update import LinearUpdate
from lorica.core.update import LowRank as Factors
from lorica.engine.native.kernels import LANES, Kernels, LowRank, RowFactors, RowMaps

FEW = 4
"""Up to so many distinct stacks, all maps of a group are one product (fewer calls, hardly more bytes), and factors of a
half-precision base are float32 on a CPU, whose products of so few numbers are faster so.
"""


@dataclass(frozen=True, slots=True)
class Folded:
    """`y = out_scale ⊙ ((x ⊙ in_scale) W₀ᵀ + b₀ + x Aᵀ Bᵀ) + shift` of one stack at one site; scales are folded into
    B. `pair` are the factors as kernels read them.
    """

    A_RI: Tensor | None
    B_OR: Tensor | None
    in_scale_I: Tensor | None
    out_scale_O: Tensor | None
    shift_O: Tensor | None
    pair: RowFactors | None = None

    @property
    def bare(self) -> bool:
        """Whether there are factors at most."""
        return self.in_scale_I is None and self.out_scale_O is None and self.shift_O is None


NOTHING = Folded(None, None, None, None, None)
"""What a stack does at a site that none of its adapters adapts."""


def fold(
    updates: Sequence[LinearUpdate], bias_O: Tensor | None, dtype: torch.dtype, kernels: Kernels | None = None
) -> Folded | None:
    """The updates of a stack, innermost first, as one; None where they are not of that form."""
    if any(u.delta is not None for u in updates) or (len(updates) > 1 and not all(u.low_rank_only for u in updates)):
        return None
    biases = [u.bias_O for u in updates if u.bias_O is not None]
    shift_O = torch.stack(biases).sum(0) if biases else None
    first = updates[0]
    if first.out_scale_O is not None and bias_O is not None and not first.scale_bias:
        own_O = (1 - first.out_scale_O) * bias_O.to(first.out_scale_O.dtype)
        shift_O = own_O if shift_O is None else shift_O + own_O

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    A_RI, B_OR = _low_rank([factor for update in updates for factor in update.factors], dtype, kernels)
    return Folded(
        A_RI,
        B_OR,
        cast(first.in_scale_I),
        cast(first.out_scale_O),
        cast(shift_O),
        None if kernels is None or A_RI is None or B_OR is None else _pair(A_RI, B_OR.mT),
    )


def _low_rank(
    factors: Sequence[Factors], dtype: torch.dtype, kernels: Kernels | None
) -> tuple[Tensor | None, Tensor | None]:
    """A of all factors and B, with all scales in it; B is in memory rank by rank. They are copies."""
    if not factors:
        return None, None
    first = factors[0]
    if len(factors) == 1 and kernels is not None and first.mid_R is None and first.post_O is None:
        B_RO = kernels.transposed(first.B_OR, first.scale)
        if B_RO is not None:
            # a transposed A would keep its strides in a copy, and the kernels know none
            return first.A_RI.to(dtype, copy=True, memory_format=torch.contiguous_format), B_RO.mT
    plain = [factor.folded() for factor in factors]
    B_RO = torch.cat([f.B_OR.mT for f in plain]).to(dtype)
    return torch.cat([f.A_RI for f in plain]).to(dtype), B_RO.mT


def _pair(A_RI: Tensor, B_RO: Tensor) -> RowFactors | None:
    """Factors for kernels; None for widths that they do not take."""
    return None if A_RI.shape[1] % LANES or B_RO.shape[1] % LANES else RowFactors(A_RI, B_RO)


class _LowRank:
    """Stacked factors: A [T, ΣR, I] over all maps, and blocks of B [T, O, R], each with its ranks and its outputs.

    A step reads every factor once, so what counts is how fast a kernel reads what no cache holds: with B as the methods
    have it, and a float32 A as the first factor of a product with one column, up to twice as fast as the other ways.
    Where few stacks are present one block holds all maps, zero off its diagonal. `runs` are the rows `[start, stop)` of
    each stack; where they are not of one height, rows are gathered and scattered.
    """

    def __init__(self, maps: Sequence[Sequence[Folded]], sizes: Sequence[int], runs: Sequence[tuple[int, int]]) -> None:
        ranks = [max(0 if f.A_RI is None else f.A_RI.shape[0] for f in column) for column in maps]
        example = next(f.A_RI for column in maps for f in column if f.A_RI is not None)
        joint = len(runs) <= FEW and sum(r > 0 for r in ranks) > 1
        self.A_TRI = example.new_zeros(len(runs), sum(ranks), example.shape[1])
        whole_TOR = example.new_zeros(len(runs), sum(sizes), sum(ranks)) if joint else None
        self.blocks: list[tuple[slice, slice, Tensor]] = []
        rank, out = 0, 0
        for column, r, size in zip(maps, ranks, sizes, strict=True):
            own, outs = slice(rank, rank + r), slice(out, out + size)
            if r:
                _fill(self.A_TRI[:, own], [f.A_RI for f in column])
                B_TOR = example.new_zeros(len(runs), size, r) if whole_TOR is None else whole_TOR[:, outs, own]
                _fill(B_TOR, [f.B_OR for f in column])
                self.blocks.append((own, outs, B_TOR))
            rank, out = rank + r, out + size
        if whole_TOR is not None:
            self.blocks = [(slice(0, rank), slice(0, out), whole_TOR)]
        self.height = max(stop - start for start, stop in runs)
        self.covers = runs[-1][1] if runs[0][0] == 0 and all(b - a == self.height for a, b in runs) else -1
        if any(left[1] != right[0] for left, right in itertools.pairwise(runs)):
            self.covers = -1
        start_T1, stop_T1 = torch.tensor(runs, device=self.A_TRI.device)[:, :, None].unbind(1)
        index_Tn = start_T1 + torch.arange(self.height, device=self.A_TRI.device)[None]
        self.valid_n = (index_Tn < stop_T1).flatten().nonzero()[:, 0]
        self.index_Tn = torch.where(index_Tn < stop_T1, index_Tn, start_T1)
        self.place_n = self.index_Tn.flatten()[self.valid_n]
        self.single: tuple[Tensor, Tensor, slice | None] | None = None
        if len(runs) == 1 and len(self.blocks) == 1:  # two plain products, which are called faster
            _, outs, B_TOR = self.blocks[0]
            self.single = self.A_TRI[0].mT, B_TOR[0].mT, None if outs == slice(0, sum(sizes)) else outs

    def add(self, x_NI: Tensor, y_NO: Tensor) -> None:
        """Add `x Aᵀ Bᵀ` to y in place."""
        x_low, plain = x_NI.to(self.A_TRI.dtype), self.covers == x_NI.shape[0]
        if plain and self.single is not None:
            A_IR, B_RO, outs = self.single
            _add_product(y_NO if outs is None else y_NO[:, outs], torch.mm(x_low, A_IR), B_RO)
            return
        x_TnI = x_low.view(-1, self.height, x_low.shape[1]) if plain else x_low[self.index_Tn]
        first = self.height == 1 and x_low.dtype == torch.float32
        h_TnR = torch.bmm(self.A_TRI, x_TnI.mT).mT if first else torch.bmm(x_TnI, self.A_TRI.mT)
        for ranks, outs, B_TOR in self.blocks:
            h = h_TnR if len(self.blocks) == 1 else h_TnR[..., ranks]
            if plain:
                _add_product(y_NO[:, outs].view(-1, self.height, B_TOR.shape[1]), h, B_TOR.mT)
                continue
            low_nO = torch.bmm(h, B_TOR.mT).flatten(0, 1)[self.valid_n]
            y_NO[:, outs].index_add_(0, self.place_n, low_nO.to(y_NO.dtype))


def _add_product(y: Tensor, h: Tensor, B: Tensor) -> None:
    """Add a product, or a batch of products, to y in place."""
    if y.dtype != B.dtype or not y.is_contiguous():  # into a part of y a batched product would go row by row
        y.add_(torch.matmul(h, B))
    elif y.ndim == 2:
        y.addmm_(h, B)
    else:
        y.baddbmm_(h, B)


@dataclass(slots=True, eq=False)
class GroupFactors:
    """The updates of one group of maps, laid side by side, for N rows, I in, O out of all maps together."""

    low: _LowRank | LowRank | None
    in_scale_NI: Tensor | None = None
    out_scale_NO: Tensor | None = None
    shift_NO: Tensor | None = None

    @property
    def only_low(self) -> LowRank | None:
        """The rows' factors, where these are all that the updates are and the kernels read them."""
        vectors = (self.in_scale_NI, self.out_scale_NO, self.shift_NO)
        return self.low if isinstance(self.low, LowRank) and all(v is None for v in vectors) else None

    def scaled(self, x_NI: Tensor) -> Tensor:
        """What the frozen maps read."""
        return x_NI if self.in_scale_NI is None else (x_NI * self.in_scale_NI).to(x_NI.dtype)

    def add(self, x_NI: Tensor, y_NO: Tensor) -> Tensor:
        """The frozen maps' outputs, side by side, with every row's update; `y_NO` may be overwritten."""
        if self.low is not None:
            self.low.add(x_NI, y_NO)
        if self.out_scale_NO is None and self.shift_NO is None:
            return y_NO
        out_NO = y_NO if self.out_scale_NO is None else y_NO * self.out_scale_NO
        return (out_NO if self.shift_NO is None else out_NO + self.shift_NO).to(y_NO.dtype)


def gather(
    maps: Sequence[Sequence[Folded]],
    sizes: Sequence[int],
    runs: Sequence[tuple[int, int]],
    kernels: Kernels | None = None,
) -> GroupFactors:
    """The updates of one group of maps, of T distinct stacks.

    Args:
        maps: for each map, the folded update of each distinct stack.
        sizes: outputs of each map.
        runs: for each distinct stack, its rows `[start, stop)`; they follow each other, and are all rows of the batch.
    """
    rows = runs[-1][1]
    present = [t for t in range(len(runs)) if any(column[t].A_RI is not None for column in maps)]
    whole = all(f.A_RI is None or f.pair is not None for column in maps for f in column)
    low: _LowRank | LowRank | None = None
    if present and kernels is not None and whole:
        own = [RowMaps([f.pair for f in own]) for own in zip(*maps, strict=True)]
        low = LowRank(kernels, own, sizes, [stop - start for start, stop in runs])
    elif present:
        low = _LowRank([[column[t] for t in present] for column in maps], sizes, [runs[t] for t in present])
    return GroupFactors(
        low,
        _rowwise([[f.in_scale_I for f in maps[0]]], [0], runs, rows, 1.0),
        _rowwise([[f.out_scale_O for f in column] for column in maps], sizes, runs, rows, 1.0),
        _rowwise([[f.shift_O for f in column] for column in maps], sizes, runs, rows, 0.0),
    )


def _fill(stacked: Tensor, parts: Sequence[Tensor | None]) -> None:
    """Put the factor of each stack [·, ·] into its place [T, ·, ·], whose missing ranks stay zero."""
    for own, part in zip(stacked, parts, strict=True):
        if part is not None:
            own[: part.shape[0], : part.shape[1]] = part


def _rowwise(
    maps: Sequence[Sequence[Tensor | None]],
    sizes: Sequence[int],
    runs: Sequence[tuple[int, int]],
    rows: int,
    neutral: float,
) -> Tensor | None:
    """The vectors of each row at all maps side by side, [N, Σ sizes]; None where no stack has one."""
    example = next((part for column in maps for part in column if part is not None), None)
    if example is None:
        return None
    sizes = sizes if sizes[0] else [example.shape[0]]
    out = example.new_full((rows, sum(sizes)), neutral)
    first = 0
    for column, size in zip(maps, sizes, strict=True):
        for part, (start, stop) in zip(column, runs, strict=True):
            if part is not None:
                out[start:stop, first : first + size] = part
        first += size
    return out
