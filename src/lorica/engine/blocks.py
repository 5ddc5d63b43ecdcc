"""Low-rank products of a batch, joined: factors of one segment over one x, and equal segments of several adapters.

In: terms `scale · post ⊙ ((x Aᵀ ⊙ mid) Bᵀ)` for segments of rows and columns of the output. Out: what they add to y,
and their gradients. All A's of a segment are read in one product, and an A that several maps share is read once.
T segments, n rows of each, I in, O out, R ranks; of a single segment, T is left out. Refuses to know adapters, frozen
maps, other parts of an update, and which segments are joined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.engine.equation import Dropout
from lorica.engine.frozen_factors import in_dtype, product
from lorica.engine.replay import held

KEEP = 8
"""Where x is saved anyway, `x Aᵀ` is kept beside it while a factor's share is at most this part of what is saved."""
WIDE = 4
"""On a CPU, a rank from this part of its map's smaller side on takes so much time that what spares a product is kept.
On a GPU, whose products are cheap beside its memory traffic, it is not.
"""

Needs = Callable[[int], bool]
"""Whether there is a tensor of this index, and its gradient is wanted."""
Add = Callable[[int, Tensor], None]
"""Takes a share of the gradient of the tensor with an index."""


@dataclass(slots=True)
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

    def left(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """`post ⊙ B` [O, R]."""
        B_OR = tensors[self.B]
        return (B_OR if self.post < 0 else B_OR * tensors[self.post][:, None]).to(dtype)

    def left_grads(self, G_OR: Tensor, tensors: Sequence[Tensor], needs: Needs, add: Add) -> None:
        """With G the gradient of `post ⊙ B`: dB = post ⊙ G, and dpost = Σ_r B ⊙ G."""
        if needs(self.B):
            add(self.B, G_OR if self.post < 0 else G_OR * tensors[self.post].to(G_OR.dtype)[:, None])
        if needs(self.post):
            add(self.post, (G_OR * tensors[self.B].to(G_OR.dtype)).sum(1))


@dataclass(slots=True)
class Low:
    """What a block's products made on their way to y, as far as it is there: `x Aᵀ` [T, n, ΣR], and of each term that
    stands apart `u = scale · (x Aᵀ ⊙ mid) Bᵀ` [n, O].
    """

    h: Tensor | None = None
    us: Sequence[Tensor] = ()


class Block:
    """Rows of T equal segments; `terms[t]` are those of segment t, as many and at the same columns in each.

    T is one unless all terms are plain; segments of different rank are filled up with zeros. `x Aᵀ` of all terms is one
    tensor [T, n, ΣR], in which term i has the span `spans[i]`, first rank and number of ranks.
    """

    def __init__(
        self, rows: slice, terms: list[list[Term]], tensors: Sequence[Tensor], dropout: Dropout | None = None
    ) -> None:
        self.rows, self.terms, self.dropout = rows, terms, dropout
        self.count = len(terms)
        # in a single segment, terms that share an A share its place
        places = [t.A if self.count == 1 else i for i, t in enumerate(terms[0])]
        ranks = [max([tensors[own[i].A].shape[0] for own in terms]) for i in range(len(places))]
        found: dict[int, tuple[int, int]] = {}
        self.width = 0
        for place, rank in zip(places, ranks, strict=True):
            if place not in found:
                found[place] = (self.width, rank)
                self.width += rank
        self.spans = [found[place] for place in places]
        self.ranks = ranks if len(found) == len(places) else None  # where no two share a place
        self.largest = max(ranks)
        self.wide = [t.post >= 0 and _is_wide(tensors[t.A], tensors[t.B]) for t in terms[0]]
        scales = {term.scale for own in terms for term in own}
        self.scale = scales.pop() if len(scales) == 1 and all(t.mid < 0 for t in terms[0]) else None

    # -- what backward reads ---------------------------------------------------------------------------------------

    def reads_x(self, needs: Needs) -> bool:
        """Whether backward cannot do without x, if it has `x Aᵀ`."""
        return any(needs(term.A) for own in self.terms for term in own)

    def reads_low(self, needs: Needs) -> bool:
        """Whether backward reads `x Aᵀ`."""
        return any(needs(t.mid) for t in self.terms[0]) or any(self._crosses(i, needs) for i in range(len(self.spans)))

    def narrow(self, beside: int) -> bool:
        """Whether `x Aᵀ` is small beside so many numbers a token."""
        return self.largest * KEEP <= beside

    def _apart(self, i: int, needs: Needs) -> bool:
        """Whether post is multiplied into `u = m Bᵀ`, not into B: u [n, O] is kept, and gives post's gradient without
        the product `dyᵀ m` [O, R], which only B's own gradient would need.
        """
        return self.wide[i] and not needs(self.terms[0][i].B)

    def _crosses(self, i: int, needs: Needs) -> bool:
        """Whether backward forms `dyᵀ m`, from which the gradients of B and post come."""
        return any(needs(own[i].B) or (needs(own[i].post) and not self.wide[i]) for own in self.terms)

    # -- the products ----------------------------------------------------------------------------------------------

    def add(self, x_NI: Tensor, y_NO: Tensor, tensors: Sequence[Tensor], needs: Needs) -> Low:
        """Add the terms to y in place. Returns what this made, for `back`."""
        h_TnR = self._low(self._read(x_NI), tensors)
        y, us = self._own(y_NO), []
        for i, m_TnR in enumerate(self._middles(h_TnR, tensors)):
            term = self.terms[0][i]
            y_TnO = columns_of(y, term.columns)
            if self._apart(i, needs):
                u_nO = product(m_TnR, tensors[term.B])
                y_TnO.addcmul_(u_nO, tensors[term.post].to(x_NI.dtype))
                us += [u_nO] if needs(term.post) else []
            elif self.count == 1:
                y_TnO.addmm_(m_TnR, self._stacked_b(i, tensors, x_NI.dtype).mT)
            else:
                y_TnO.baddbmm_(m_TnR, self._stacked_b(i, tensors, x_NI.dtype).mT)
        return Low(h_TnR, us)

    def back(
        self,
        x_NI: Tensor | None,
        dy_NO: Tensor,
        tensors: Sequence[Tensor],
        low: Low,
        needs: Needs,
        add: Add,
    ) -> Tensor:
        """Hand the gradients of all factors to `add`. Returns dA's other half: `dh` [T, n, ΣR], for `into_x`. x and
        `x Aᵀ` may be absent where nothing reads them.
        """
        x_TnI, h_TnR, us = None if x_NI is None else self._read(x_NI), low.h, iter(low.us)
        if h_TnR is None and self.reads_low(needs):
            assert x_TnI is not None
            h_TnR = self._low(x_TnI, tensors)
        dy = self._own(dy_NO)
        crossed = [i for i in range(len(self.spans)) if self._crosses(i, needs)]
        middles = self._middles(h_TnR, tensors) if crossed and h_TnR is not None else []
        parts: dict[int, Tensor] = {}
        for i, term in enumerate(self.terms[0]):
            dy_TnO = columns_of(dy, term.columns)
            if i in crossed:
                self._b_grads(i, self._cross(i, dy_TnO, middles[i]), tensors, needs, add)
            elif needs(term.post):
                add(term.post, (dy_TnO * next(us)).sum(0))
            dm_TnR = self._through_b(i, dy_TnO, tensors, needs)
            if needs(term.mid):
                assert h_TnR is not None
                dmid_R = (dm_TnR * self._span(h_TnR, i)).sum(0)
                add(term.mid, dmid_R if term.scale == 1.0 else dmid_R.mul_(term.scale))
            if self.scale is None:
                dm_TnR = self._gained(i, dm_TnR, tensors)
            first = self.spans[i][0]
            parts[first] = dm_TnR if first not in parts else parts[first].add_(dm_TnR)
        dh_TnR = next(iter(parts.values())) if len(parts) == 1 else torch.cat(list(parts.values()), -1)
        if self.scale not in (None, 1.0):
            dh_TnR.mul_(self.scale)
        self._a_grads(dh_TnR, x_TnI, tensors, needs, add)
        return dh_TnR

    def into_x(self, dh_TnR: Tensor, tensors: Sequence[Tensor], dx_NI: Tensor) -> None:
        """Add the terms' share to dx in place."""
        A_TRI, own = self._stacked_a(tensors, dh_TnR.dtype), rows_of(dx_NI, self.rows)
        if self.count == 1 and self.dropout is None and dx_NI.dtype == dh_TnR.dtype:
            own.addmm_(dh_TnR, A_TRI)
            return
        share_NI = (dh_TnR @ A_TRI).view(own.shape)
        own.add_(share_NI if self.dropout is None else self.dropout(share_NI))

    # -- parts -----------------------------------------------------------------------------------------------------

    def _a_grads(self, dh_TnR: Tensor, x_TnI: Tensor | None, tensors: Sequence[Tensor], needs: Needs, add: Add) -> None:
        owners = [(t, k, first) for t, k, first in self._owners() if needs(k)]
        if not owners:
            return
        assert x_TnI is not None
        dA_TRI = dh_TnR.mT @ x_TnI
        for t, k, first in owners:
            dA_RI = dA_TRI if self.count == 1 else dA_TRI[t]
            add(k, _narrow(dA_RI, 0, first, tensors[k].shape[0]))

    def _cross(self, i: int, dy_TnO: Tensor, m_TnR: Tensor) -> Tensor:
        """`dyᵀ m` [T, O, R], with `m = scale · (x Aᵀ ⊙ mid)`."""
        if self.terms[0][i].post >= 0:  # it meets B number by number, so it lies in memory as B does
            return dy_TnO.mT @ m_TnR
        G_TOR = (m_TnR.mT @ dy_TnO).mT  # the narrow side is transposed: kernels would copy the other
        # each segment's part is added up by itself, many small times, which is slow across memory
        return G_TOR if self.count == 1 else G_TOR.contiguous()

    def _through_b(self, i: int, dy_TnO: Tensor, tensors: Sequence[Tensor], needs: Needs) -> Tensor:
        """`dy (post ⊙ B)`; post goes to the smaller of the two."""
        term = self.terms[0][i]
        B_OR = tensors[term.B]
        if self._apart(i, needs) and dy_TnO.shape[0] <= B_OR.shape[1]:
            return product(dy_TnO * tensors[term.post].to(dy_TnO.dtype), B_OR.mT)
        return dy_TnO @ self._stacked_b(i, tensors, dy_TnO.dtype)

    def _b_grads(self, i: int, G_TOR: Tensor, tensors: Sequence[Tensor], needs: Needs, add: Add) -> None:
        """Of `G = dyᵀ m`, ranks that were filled up included."""
        for t, terms in enumerate(self.terms):
            G_OR = _narrow(G_TOR if self.count == 1 else G_TOR[t], 1, 0, tensors[terms[i].B].shape[1])
            terms[i].left_grads(G_OR, tensors, needs, add)

    def _own(self, all_: Tensor) -> Tensor:
        """The block's rows, [T, n, ·]."""
        own = rows_of(all_, self.rows)
        return own if self.count == 1 else own.view(self.count, -1, own.shape[1])

    def _read(self, x_NI: Tensor) -> Tensor:
        if self.dropout is None:
            return self._own(x_NI)
        return self.dropout(rows_of(x_NI, self.rows))  # of a single segment

    def _low(self, x_TnI: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """`x Aᵀ`."""
        owners = self._owners()
        if len(owners) == 1:
            return product(x_TnI, tensors[owners[0][1]])
        return x_TnI @ self._stacked_a(tensors, x_TnI.dtype).mT

    def _span(self, low_TnR: Tensor, i: int) -> Tensor:
        return _narrow(low_TnR, -1, *self.spans[i])

    def _middles(self, h_TnR: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        """`scale · (x Aᵀ ⊙ mid)` of each term."""
        if self.scale is not None:
            m_TnR = h_TnR if self.scale == 1.0 else h_TnR * self.scale
            if self.ranks is None:
                return [self._span(m_TnR, i) for i in range(len(self.spans))]
            return [m_TnR] if len(self.ranks) == 1 else list(m_TnR.split(self.ranks, -1))
        return [self._gained(i, self._span(h_TnR, i), tensors) for i in range(len(self.spans))]

    def _gained(self, i: int, low_TnR: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """`scale · mid ⊙`, by which `x Aᵀ` goes forth and its gradient comes back."""
        term = self.terms[0][i]
        if term.mid >= 0:
            mid_R = tensors[term.mid] if term.scale == 1.0 else tensors[term.mid] * term.scale
            return low_TnR * mid_R.to(low_TnR.dtype)
        scales = [own[i].scale for own in self.terms]
        if len(set(scales)) == 1:
            return low_TnR if scales[0] == 1.0 else low_TnR * scales[0]
        return low_TnR * held(_column(tuple(scales), low_TnR.dtype, low_TnR.device))

    def _owners(self) -> list[tuple[int, int, int]]:
        """Segment, tensor and first rank of every A, each once, in the order in which they are stacked."""
        found = {}
        for t, terms in enumerate(self.terms):
            for term, (first, _) in zip(terms, self.spans, strict=True):
                found[t, first] = (t, term.A, first)
        return list(found.values())

    def _stacked_a(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """All A's, one below the other, [T, ΣR, I], missing ranks zero."""
        ranks = dict(self.spans)
        parts = []
        for _, k, first in self._owners():
            A_RI = tensors[k]
            missing = ranks[first] - A_RI.shape[0]
            parts.append(F.pad(A_RI, (0, 0, 0, missing)) if missing else A_RI)
        if len(parts) == 1:
            return in_dtype(parts[0], dtype)
        A_RI = torch.cat(parts).to(dtype)
        return A_RI if self.count == 1 else A_RI.view(self.count, self.width, -1)

    def _stacked_b(self, i: int, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """`post ⊙ B` of term i, [T, O, R], missing ranks zero, rounded once."""
        if self.count == 1:
            return self.terms[0][i].left(tensors, dtype)
        rank = self.spans[i][1]
        parts = [tensors[terms[i].B] for terms in self.terms]
        return torch.stack([B if B.shape[1] == rank else F.pad(B, (0, rank - B.shape[1])) for B in parts]).to(dtype)


@functools.lru_cache(maxsize=64)
def _column(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[T, 1, 1]."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


def _is_wide(A_RI: Tensor, B_OR: Tensor) -> bool:
    return A_RI.device.type == "cpu" and A_RI.shape[0] * WIDE >= min(A_RI.shape[1], B_OR.shape[0])


def _narrow(x: Tensor, axis: int, start: int, length: int) -> Tensor:
    """A part of one axis; x itself where that is all of it, which costs nothing."""
    return x if length == x.shape[axis] else x.narrow(axis, start, length)


def rows_of(x: Tensor, rows: slice) -> Tensor:
    """Rows of the first axis."""
    return _narrow(x, 0, rows.start, rows.stop - rows.start)


def columns_of(x: Tensor, columns: slice) -> Tensor:
    """Columns of the last axis; `slice(None)` is all of them."""
    return x if columns.start is None else x.narrow(-1, columns.start, columns.stop - columns.start)
