"""Low-rank products of a batch, joined: factors of one segment over one x, and equal segments of several adapters.

In: terms `scale · post ⊙ ((x Aᵀ ⊙ mid) Bᵀ)` for segments of rows and columns of the output. Out: what they add to y,
and their gradients. All A's of a segment are read in one product, and an A that several maps share is read once.
T segments, n rows of each, I in, O out, R ranks. Refuses to know adapters, frozen maps and other parts of an update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.engine.equation import Dropout

KEEP = 8
"""`x Aᵀ` is kept for backward while a factor's share of it is at most the input's width divided by this."""


@dataclass(frozen=True, slots=True)
class Term:
    """Where one pair of factors writes, and which tensors it has, as indices; -1 is absent."""

    columns: slice
    A: int
    B: int
    mid: int
    post: int
    scale: float

    @property
    def plain(self) -> bool:
        """A product of A and B, which adapters of one form can batch."""
        return self.mid < 0 and self.post < 0

    def folded(self, tensors: Sequence[Tensor]) -> Tensor:
        """`scale · post ⊙ B` [O, R], in B's own dtype."""
        B_OR = tensors[self.B] if self.scale == 1.0 else tensors[self.B] * self.scale
        return B_OR if self.post < 0 else B_OR * tensors[self.post][:, None]


Segment = tuple[slice, tuple[Term, ...], Dropout | None]
Add = Callable[[int, Tensor], None]
"""Takes a share of the gradient of the tensor with an index."""


def blocks_of(segments: Sequence[Segment], rows: int, tensors: Sequence[Tensor]) -> list[Block]:
    """The segments' terms in as few products as they allow: all segments at once, or one by one."""
    together: dict[tuple[int, int], list[Term]] = {}
    apart: list[Block] = []
    for span, terms, dropout in segments:
        if terms and dropout is not None:  # a mask belongs to one map
            apart.append(Block(span, [list(terms)], tensors, dropout))
        elif terms:
            together.setdefault((span.start, span.stop), []).extend(terms)
    if _batchable(together, rows):
        return [Block(slice(0, rows), [together[span] for span in sorted(together)], tensors), *apart]
    return [Block(slice(*span), [terms], tensors) for span, terms in together.items()] + apart


def _batchable(together: dict[tuple[int, int], list[Term]], rows: int) -> bool:
    """Whether two or more segments of one height tile all rows, with plain terms at the same columns."""
    spans = sorted(together)
    height = rows // len(spans) if spans else 0
    tiled = spans == [(i * height, (i + 1) * height) for i in range(len(spans))] and height * len(spans) == rows
    forms = {tuple((t.columns.start, t.columns.stop) for t in terms) for terms in together.values()}
    return len(spans) > 1 and tiled and len(forms) == 1 and all(t.plain for ts in together.values() for t in ts)


class Block:
    """Rows of T equal segments; `terms[t]` are those of segment t, as many and at the same columns in each.

    T is one unless all terms are plain; segments of different rank are filled up with zeros. `x Aᵀ` of all terms is one
    tensor [T, n, ΣR], in which term i has the span `spans[i]`.
    """

    def __init__(
        self, rows: slice, terms: list[list[Term]], tensors: Sequence[Tensor], dropout: Dropout | None = None
    ) -> None:
        self.rows, self.terms, self.dropout = rows, terms, dropout
        self.count = len(terms)
        # in a single segment, terms that share an A share its place
        places = [t.A if self.count == 1 else i for i, t in enumerate(terms[0])]
        ranks = [max(tensors[own[i].A].shape[0] for own in terms) for i in range(len(places))]
        found: dict[int, slice] = {}
        self.width = 0
        for place, rank in zip(places, ranks, strict=True):
            if place not in found:
                found[place] = slice(self.width, self.width + rank)
                self.width += rank
        self.spans = [found[place] for place in places]
        self.keeps = all(rank * KEEP <= tensors[t.A].shape[1] for rank, t in zip(ranks, terms[0], strict=True))

    def add(self, x_NI: Tensor, y_NO: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Add the terms to y in place. Returns `x Aᵀ`."""
        h_TnR = _products(self._read(x_NI), self._stacked_a(tensors, x_NI.dtype).mT)
        for i, term in enumerate(self.terms[0]):
            m_TnR = self._middle(i, h_TnR, tensors)
            y_TnO, B_TRO = self._split(y_NO[self.rows, term.columns]), self._stacked_b(i, tensors, x_NI.dtype).mT
            if self.count == 1:
                y_TnO[0].addmm_(m_TnR[0], B_TRO[0])
            else:
                y_TnO.baddbmm_(m_TnR, B_TRO)
        return h_TnR

    def back(
        self,
        x_NI: Tensor,
        dy_NO: Tensor,
        tensors: Sequence[Tensor],
        h_TnR: Tensor | None,
        needs: Callable[[int], bool],
        add: Add,
    ) -> Tensor:
        """Hand the gradients of all factors to `add`. Returns dA's other half: `dh` [T, n, ΣR], for `into_x`."""
        x_TnI = self._read(x_NI)
        h_TnR = _products(x_TnI, self._stacked_a(tensors, x_NI.dtype).mT) if h_TnR is None else h_TnR
        dh_TnR = torch.zeros_like(h_TnR)
        for i, term in enumerate(self.terms[0]):
            dy_TnO = self._split(dy_NO[self.rows, term.columns])
            dm_TnR = _products(dy_TnO, self._stacked_b(i, tensors, x_NI.dtype))
            if any(needs(own[i].B) or needs(own[i].post) for own in self.terms):
                # the narrow side is transposed: kernels would copy the other
                G_TOR = _products(self._middle(i, h_TnR, tensors).mT, dy_TnO).mT
                self._b_grads(i, G_TOR, tensors, needs, add)
            if needs(term.mid):
                add(term.mid, (dm_TnR[0] * h_TnR[0, :, self.spans[i]]).sum(0))
            dh_TnR[..., self.spans[i]] += dm_TnR if term.mid < 0 else dm_TnR * tensors[term.mid].to(dm_TnR.dtype)
        owners = [owner for owner in self._owners(tensors) if needs(owner[1])]
        if owners:
            dA_TRI = _products(dh_TnR.mT, x_TnI)
            for t, k, span in owners:
                add(k, dA_TRI[t, span])
        return dh_TnR

    def into_x(self, dh_TnR: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The terms' share of dx [T·n, I]."""
        dx_NI = _products(dh_TnR, self._stacked_a(tensors, dh_TnR.dtype)).flatten(0, 1)
        return dx_NI if self.dropout is None else self.dropout(dx_NI)

    # -- parts -----------------------------------------------------------------------------------------------------

    def _b_grads(
        self, i: int, G_TOR: Tensor, tensors: Sequence[Tensor], needs: Callable[[int], bool], add: Add
    ) -> None:
        """With `G = dyᵀ (x Aᵀ ⊙ mid)`: dB = scale · post ⊙ G, and dpost = scale · Σ_r B ⊙ G."""
        for t, terms in enumerate(self.terms):
            term = terms[i]
            B_OR = tensors[term.B]
            G_OR = G_TOR[t, :, : B_OR.shape[1]].to(B_OR.dtype) * term.scale
            if needs(term.B):
                add(term.B, G_OR if term.post < 0 else G_OR * tensors[term.post][:, None])
            if needs(term.post):
                add(term.post, (G_OR * B_OR).sum(1))

    def _read(self, x_NI: Tensor) -> Tensor:
        x_nI = x_NI[self.rows]
        return self._split(x_nI if self.dropout is None else self.dropout(x_nI))

    def _split(self, rows: Tensor) -> Tensor:
        """[T·n, ·] as a view [T, n, ·]."""
        return rows.view(self.count, -1, rows.shape[1])

    def _middle(self, i: int, h_TnR: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        h, mid = h_TnR[..., self.spans[i]], self.terms[0][i].mid
        return h if mid < 0 else h * tensors[mid].to(h.dtype)

    def _owners(self, tensors: Sequence[Tensor]) -> list[tuple[int, int, slice]]:
        """Segment, tensor and place of every A, each once."""
        found = {}
        for t, terms in enumerate(self.terms):
            for term, span in zip(terms, self.spans, strict=True):
                found[t, span.start] = (t, term.A, slice(span.start, span.start + tensors[term.A].shape[0]))
        return list(found.values())

    def _stacked_a(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """All A's, one below the other, [T, ΣR, I]."""
        owners = self._owners(tensors)
        if self.count == 1:
            parts = [tensors[k].to(dtype) for _, k, _ in owners]
            return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]
        width = tensors[self.terms[0][0].A].shape[1]
        A_TRI = torch.zeros(self.count, self.width, width, dtype=dtype, device=tensors[0].device)
        for t, k, span in owners:
            A_TRI[t, span] = tensors[k]
        return A_TRI

    def _stacked_b(self, i: int, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """`scale · post ⊙ B` of term i, [T, O, R], rounded once."""
        folded = [terms[i].folded(tensors) for terms in self.terms]
        if self.count == 1:
            return folded[0].to(dtype)[None]
        rank = self.spans[i].stop - self.spans[i].start
        B_TOR = torch.zeros(self.count, folded[0].shape[0], rank, dtype=dtype, device=tensors[0].device)
        for t, B_OR in enumerate(folded):
            B_TOR[t, :, : B_OR.shape[1]] = B_OR
        return B_TOR


def _products(left_Tij: Tensor, right_Tjk: Tensor) -> Tensor:
    """Batched products; of one segment a plain one, whose kernels are the faster."""
    return (left_Tij[0] @ right_Tjk[0])[None] if left_Tij.shape[0] == 1 else torch.bmm(left_Tij, right_Tjk)
