"""Linear sites of few rows under one stack of low-rank updates: a base product, and one kernel call forth and two back.

In: x, frozen maps of one input, the work at each. Out: what `linear.adapted_linear` gives, up to rounding; of so few
rows that node is slower than its arithmetic. Refuses to know adapters, methods, modules and other updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorica.engine.executor import Work
from lorica.engine.linear import Base
from lorica.engine.native.kernels import LANES
from lorica.engine.native.nodes import NativeGate
from lorica.engine.native.passes import Pair, Passes


def pairs_of(work: Sequence[Sequence[Work]], sizes: Sequence[int], rows: int) -> list[Pair] | None:
    """The factors of all maps, whose outputs have these sizes; None unless one segment of `rows` rows has low-rank
    updates alone, in the form that the kernels read.
    """
    pairs: list[Pair] = []
    first = 0
    for own, size in zip(work, sizes, strict=True):
        if len(own) > 1 or (own and (own[0].start, own[0].stop) != (0, rows)):
            return None
        for level in range(len(own[0].updates)) if own else ():
            update = own[0].linear(level)
            if not update.low_rank_only or update.bias_O is not None or own[0].dropouts[level] is not None:
                return None
            for factor in update.factors:
                if factor.mid_R is not None or factor.post_O is not None:
                    return None
                pairs.append(Pair(factor.A_RI, factor.B_OR, first, factor.scale))
        first += size
    fit = all(f.dtype == torch.float32 and f.is_contiguous() for pair in pairs for f in (pair.A_RI, pair.B_OR))
    return pairs if pairs and fit and all(pair.A_RI.shape[1] % LANES == 0 for pair in pairs) else None


def few_rows(
    x: Sequence[Tensor], base: Base, pairs: Sequence[Pair], passes: Passes, gate: NativeGate | None = None
) -> Tensor:
    """The outputs of all maps side by side, with every pair's product; the arithmetic of factors is in float32. With
    `gate`, the maps read what it makes of the two tensors x, which are saved in its place.
    """
    factors = [f for pair in pairs for f in (pair.A_RI, pair.B_OR)]
    result: Tensor = cast(Any, _FewRows).apply(base, pairs, passes, gate, len(x), *x, *factors)
    return result


class _FewRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: Base,
        pairs: Sequence[Pair],
        passes: Passes,
        gate: NativeGate | None,
        count: int,
        *given: Tensor,
    ) -> Tensor:
        x_NI = (given[0] if gate is None else gate.forth(*given[:count])).contiguous()
        y_NO = base.forward(x_NI)
        y_low = y_NO.float()  # itself where it is float32
        h_NR = passes.factors_forth(pairs, x_NI.float(), y_low)
        ctx.save_for_backward(h_NR, *given)
        ctx.base, ctx.passes, ctx.gate, ctx.count = base, passes, gate, count
        ctx.forms = [(pair.first, pair.scale) for pair in pairs]
        return y_low.to(y_NO.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        h_NR, *given = ctx.saved_tensors
        sources, factors = given[: ctx.count], given[ctx.count :]
        pairs = [Pair(factors[2 * i], factors[2 * i + 1], *form) for i, form in enumerate(ctx.forms)]
        needs = ctx.needs_input_grad[5:]
        wanted = [(needs[i], needs[i + 1]) for i in range(ctx.count, len(given), 2)]
        x_NI = sources[0] if ctx.gate is None else ctx.gate.forth(*sources)
        dy_NO = grads[0].contiguous()
        dh_NR, found = ctx.passes.factors_back(pairs, x_NI.float().contiguous(), dy_NO.float(), h_NR, wanted)
        dsources: tuple[Tensor | None, ...] = (None,) * ctx.count
        if any(needs[: ctx.count]):
            dx_NI = ctx.base.back(dy_NO)
            ctx.passes.factors_input(pairs, dh_NR, dx_NI)
            dsources = (dx_NI,) if ctx.gate is None else ctx.gate.back(dx_NI, *sources)
        return (*(None,) * 5, *dsources, *(grad for own in found for grad in own))
