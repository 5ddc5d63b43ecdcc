"""Which low-rank products of a batch are computed together, and which are multiplied out first.

In: terms of segments. Out: blocks. Neighbours of one height and nearly one rank are one batched product, so that a
tenant of rank 4096 does not fill up the others with zeros; factors of so high a rank that `r(O + I) > O·I` become one
matrix [O, I] for a micro-batch that has rows enough to pay for it. Refuses to know adapters and other parts of updates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorica.engine.blocks import Add, Block, Low, Needs, Term, columns_of, rows_of
from lorica.engine.equation import Dropout

LEAST = 16
"""Ranks up to this cost about the same, and share a product."""

Segment = tuple[slice, tuple[Term, ...], Dropout | None]


def blocks_of(segments: Sequence[Segment], tensors: Sequence[Tensor]) -> list[Block | Product]:
    """The segments' terms in as few products as they allow."""
    together: dict[tuple[int, int], list[Term]] = {}
    found: list[Block | Product] = []
    for span, terms, dropout in segments:
        if not terms:
            continue
        big = [t for t in terms if _pays(t, span.stop - span.start, tensors)]
        found += [Product(span, term, dropout) for term in big]
        rest = [t for t in terms if t not in big] if big else list(terms)
        if rest and dropout is not None:  # a mask belongs to one map
            found.append(Block(span, [rest], tensors, dropout))
        elif rest:
            together.setdefault((span.start, span.stop), []).extend(rest)
    if len(together) == 1:
        (((start, stop), terms_),) = together.items()
        return [Block(slice(start, stop), [terms_], tensors), *found]
    for run in _runs(together, tensors):
        found.append(Block(slice(run[0][0], run[-1][1]), [together[span] for span in run], tensors))
    return found


def _pays(term: Term, rows: int, tensors: Sequence[Tensor]) -> bool:
    """Whether a term costs less when it is multiplied out. The factors are read three times (y, dx and the gradients),
    each r(O + I) a row; a matrix as often at O·I a row, and it takes four products of r·O·I to make it, to make it
    again in backward, and to bring its gradient back to A and B.
    """
    A_RI, B_OR = tensors[term.A], tensors[term.B]
    (rank, width), out = A_RI.shape, B_OR.shape[0]
    spared = rank * (out + width) - out * width
    return spared > 0 and 3 * rows * spared > 4 * rank * out * width


def _runs(together: dict[tuple[int, int], list[Term]], tensors: Sequence[Tensor]) -> list[list[tuple[int, int]]]:
    """Spans in runs of neighbours that one batched product holds."""
    runs: list[list[tuple[int, int]]] = []
    last: tuple[object, ...] | None = None
    for span in sorted(together):
        terms = together[span]
        form: tuple[object, ...] | None = None
        if all(t.plain for t in terms):
            columns = [(t.columns.start, t.columns.stop, _bucket(tensors[t.A].shape[0])) for t in terms]
            form = (span[1] - span[0], *columns)
        if form is not None and form == last and runs[-1][-1][1] == span[0]:
            runs[-1].append(span)
        else:
            runs.append([span])
        last = form
    return runs


def _bucket(rank: int) -> int:
    """Ranks of one bucket differ at most by a factor of two."""
    return max(LEAST, 1 << (rank - 1).bit_length())


class Product:
    """One term of one segment as a matrix `D = scale · diag(post) B diag(mid) A` [O, I]; see `Block`."""

    def __init__(self, rows: slice, term: Term, dropout: Dropout | None) -> None:
        self.rows, self.term, self.dropout = rows, term, dropout

    def reads_x(self, needs: Needs) -> bool:
        """Whether backward reads x: for any gradient of the term."""
        return any(needs(k) for k in (self.term.A, self.term.B, self.term.mid, self.term.post))

    def reads_low(self, needs: Needs) -> bool:
        """There is no `x Aᵀ`."""
        return False

    def narrow(self, beside: int) -> bool:
        """There is no `x Aᵀ` to keep."""
        return False

    def add(self, x_NI: Tensor, y_NO: Tensor, tensors: Sequence[Tensor], needs: Needs) -> Low:
        """Add `x Dᵀ` to y in place."""
        x_nI = rows_of(x_NI, self.rows)
        x_nI = x_nI if self.dropout is None else self.dropout(x_nI)
        self._own(y_NO).addmm_(x_nI, self._matrix(tensors, x_NI.dtype).mT)
        return Low()

    def back(
        self, x_NI: Tensor | None, dy_NO: Tensor, tensors: Sequence[Tensor], low: Low, needs: Needs, add: Add
    ) -> Tensor:
        """Hand the gradients of the factors to `add`. Returns dy's part, for `into_x`."""
        dy_nO, term = self._own(dy_NO), self.term
        if not self.reads_x(needs):
            return dy_nO
        assert x_NI is not None
        x_nI = rows_of(x_NI, self.rows)
        dD_OI = dy_nO.mT @ (x_nI if self.dropout is None else self.dropout(x_nI))
        if needs(term.A) or needs(term.mid):
            # K = scale · Bᵀ diag(post) dD: dA = mid ⊙ K, and dmid = Σ_i A ⊙ K
            K_RI = (term.left(tensors, dD_OI.dtype) * term.scale).mT @ dD_OI
            if needs(term.A):
                mid = None if term.mid < 0 else tensors[term.mid].to(K_RI.dtype)[:, None]
                add(term.A, K_RI if mid is None else K_RI * mid)
            if needs(term.mid):
                add(term.mid, (K_RI * tensors[term.A].to(K_RI.dtype)).sum(1))
        if needs(term.B) or needs(term.post):
            term.left_grads(dD_OI @ self._right(tensors, dD_OI.dtype).mT, tensors, needs, add)
        return dy_nO

    def into_x(self, dy_nO: Tensor, tensors: Sequence[Tensor], dx_NI: Tensor) -> None:
        """Add the term's share to dx in place."""
        share_nI = dy_nO @ self._matrix(tensors, dy_nO.dtype)
        rows_of(dx_NI, self.rows).add_(share_nI if self.dropout is None else self.dropout(share_nI))

    def _own(self, all_NO: Tensor) -> Tensor:
        return columns_of(rows_of(all_NO, self.rows), self.term.columns)

    def _right(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """`scale · mid ⊙ A` [R, I]."""
        A_RI, mid = tensors[self.term.A], self.term.mid
        return (A_RI * self.term.scale if mid < 0 else A_RI * (tensors[mid] * self.term.scale)[:, None]).to(dtype)

    def _matrix(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return self.term.left(tensors, dtype) @ self._right(tensors, dtype)
