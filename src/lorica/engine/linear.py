"""Linear sites: one base product for the whole batch and all maps of one input, and each segment's update beside it.

In: x (or what x is made of), frozen maps, updates per segment and map. Out: the maps' outputs side by side, with
gradients for x and every update tensor. One autograd node, which saves x (if an update's gradient reads it), r values a
token of each low-rank update, and u where an out_scale is trained, or the post of a large rank; dropout masks, and an x
that was made here, are made again in backward.
Refuses to know adapters, methods and modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorica.core.update import LinearUpdate
from lorica.engine.blocks import Block, Low, Term, columns_of, rows_of
from lorica.engine.equation import Dropout
from lorica.engine.products import Product, blocks_of

FEW = 32
"""Up to so many rows, the adapter's arithmetic beside a half-precision base is float32 on a CPU, whose small products
are several times as fast so.
"""


@dataclass(frozen=True, slots=True)
class Part:
    """One segment with its update at one map, and its dropout mask while training."""

    start: int
    stop: int
    update: LinearUpdate
    dropout: Dropout | None = None
    map: int = 0


@dataclass(frozen=True, slots=True)
class Base:
    """Frozen maps of one input. `forward(x)` gives their outputs side by side; `back(dy)` is dy W₀ of all together.

    `bias` is b₀ side by side, or None; `sizes` are the outputs of each map, empty for a single one.
    """

    forward: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    bias: Tensor | None
    sizes: tuple[int, ...] = ()

    def columns(self, index: int) -> slice:
        """Where a map's outputs are."""
        if not self.sizes:
            return slice(None)
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])


Make = Callable[..., Tensor]
"""x as a cheap function of what is saved in its place, differentiable in plain autograd: `silu(gate) ⊙ up`."""


def adapted_linear(
    x_NI: Tensor | Sequence[Tensor],
    base: Base,
    parts: Sequence[Part],
    compute: torch.dtype | None = None,
    make: Make | None = None,
) -> Tensor:
    """`y` of the update equation for a flattened x; positions outside every part are base positions.

    `compute` is the dtype of the adapter's arithmetic; None is x's own (float32 masters are cast to it), or float32
    where that is faster or x is float16, whose range `x Aᵀ` may leave. With `make`, x is `make(*x_NI)`. An input scale
    is for bases of a single map.
    """
    sources = [x_NI] if isinstance(x_NI, Tensor) else list(x_NI)
    tensors = _Tensors()
    plans = [_plan(part, base, tensors) for part in parts]
    node = cast(Any, _AdaptedLinear)
    dtype = compute or _arithmetic(sources[0])
    result: Tensor = node.apply(base, plans, dtype, make, len(sources), *sources, *tensors.held)
    return result


def _arithmetic(x_NI: Tensor) -> torch.dtype:
    few = x_NI.dtype == torch.bfloat16 and x_NI.shape[0] <= FEW and x_NI.device.type == "cpu"
    return torch.float32 if few or x_NI.dtype == torch.float16 else x_NI.dtype


class _Tensors:
    """Update tensors, each once: views that several maps have of one frozen factor count as one."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []
        self._known: dict[tuple[Any, ...], int] = {}

    def index(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        key: tuple[Any, ...] = (id(tensor),)
        if not tensor.requires_grad:
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._known:
            self._known[key] = len(self.held)
            self.held.append(tensor)
        return self._known[key]


@dataclass(slots=True)
class _Plan:
    """A part with its tensors replaced by indices into the argument list of the autograd node; -1 is absent."""

    rows: slice
    columns: slice
    terms: tuple[Term, ...]
    delta: int
    in_scale: int
    out_scale: int
    bias: int
    dropout: Dropout | None
    keep_bias: bool

    def of(self, y_NO: Tensor) -> Tensor:
        """Its rows and columns."""
        return columns_of(rows_of(y_NO, self.rows), self.columns)


def _plan(part: Part, base: Base, tensors: _Tensors) -> _Plan:
    update, columns, index = part.update, base.columns(part.map), tensors.index
    terms = [
        Term(columns, index(f.A_RI), index(f.B_OR), index(f.mid_R), index(f.post_O), f.scale) for f in update.factors
    ]
    return _Plan(
        slice(part.start, part.stop),
        columns,
        tuple(terms),
        delta=index(update.delta),
        in_scale=index(update.in_scale_I),
        out_scale=index(update.out_scale_O),
        bias=index(update.bias_O),
        dropout=part.dropout,
        keep_bias=not update.scale_bias,
    )


class _AdaptedLinear(torch.autograd.Function):
    """See the module header; the maths is `core.update`'s equation and its transpose."""

    @staticmethod
    def forward(
        ctx: Any, base: Base, plans: list[_Plan], compute: torch.dtype, make: Make | None, count: int, *given: Tensor
    ) -> Tensor:
        sources, tensors = given[:count], given[count:]
        x_NI = sources[0] if make is None else make(*sources)
        scaled = [p for p in plans if p.in_scale >= 0]
        x_in = x_NI.clone() if scaled else x_NI
        for plan in scaled:
            rows_of(x_in, plan.rows).mul_(tensors[plan.in_scale].to(x_NI.dtype))
        y_NO = base.forward(x_in)
        low_NO = y_NO.to(compute)  # y itself, written in place, where the dtypes agree
        needs = _needs(ctx.needs_input_grad[5 + count :])
        with _as_it_is(x_NI):
            blocks = blocks_of([(p.rows, p.terms, p.dropout) for p in plans], tensors)
            x_low = x_NI.to(compute) if blocks else x_NI
            lows = [block.add(x_low, low_NO, tensors, needs) for block in blocks]
            kept = [_rest(plan, x_in, low_NO, tensors, base, needs) for plan in plans]
        made = make is not None and any(ctx.needs_input_grad[5 : 5 + count])
        wanted, keeps = _saving(blocks, plans, needs, [s.shape[1] for s in sources], made=made)
        saved = sources if wanted else ()
        flat = [t for low, keep in zip(lows, keeps, strict=True) for t in (low.h if keep else None, *low.us)]
        ctx.save_for_backward(*saved, *tensors, *kept, *flat)
        ctx.base, ctx.plans, ctx.blocks, ctx.make = base, plans, blocks, make if wanted else None
        ctx.dtypes, ctx.counts = (x_NI.dtype, compute), (len(saved), len(tensors), [len(low.us) for low in lows])
        return low_NO.to(y_NO.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        count, number, apart = ctx.counts
        saved = ctx.saved_tensors  # asked for once, as checkpointing wants it
        sources, tensors, rest = saved[:count], saved[count : count + number], iter(saved[count + number :])
        kept = [next(rest) for _ in ctx.plans]
        lows = [Low(next(rest), list(islice(rest, size))) for size in apart]
        made, leaves = _made_again(ctx.make, sources)
        head = len(ctx.needs_input_grad) - number
        x_NI = (sources[0] if sources else None) if made is None else made.detach()
        back = _Backward(ctx, x_NI, tensors, grads[0].contiguous(), ctx.needs_input_grad[head:])
        with _as_it_is(grads[0]):
            dx_NI = back.run(kept, lows, wants_x=any(ctx.needs_input_grad[5:head]))
        dtensors = [
            g if g is None or g.dtype == t.dtype else g.to(t.dtype) for g, t in zip(back.grads, tensors, strict=True)
        ]
        dsources: tuple[Tensor | None, ...] = (dx_NI,)
        if dx_NI is None:
            dsources = (None,) * (head - 5)
        elif made is not None:
            dsources = torch.autograd.grad(made, leaves, dx_NI)
        return (*(None,) * 5, *dsources, *dtensors)


def _as_it_is(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, autocast changes no dtype: the node has chosen them."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _needs(flags: Sequence[bool]) -> Callable[[int], bool]:
    """Whether there is a tensor of an index (-1 is absent), and its gradient is wanted."""
    return lambda index: index >= 0 and flags[index]


def _saving(
    blocks: Sequence[Block | Product],
    plans: Sequence[_Plan],
    needs: Callable[[int], bool],
    widths: Sequence[int],
    *,
    made: bool,
) -> tuple[bool, list[bool]]:
    """Whether x is saved, as sources of these widths, and for each block whether its `x Aᵀ` is: where it is much
    smaller than what is saved anyway, or takes the place of something larger.
    """
    low = [block.reads_low(needs) for block in blocks]
    wanted = made or any(block.reads_x(needs) for block in blocks)
    wanted = wanted or any(needs(plan.delta) or needs(plan.in_scale) for plan in plans)
    total = sum([block.width for block, reads in zip(blocks, low, strict=True) if isinstance(block, Block) and reads])
    beside = sum(widths)
    wanted = wanted or total > beside
    return wanted, [reads and (not wanted or block.narrow(beside)) for block, reads in zip(blocks, low, strict=True)]


def _made_again(make: Make | None, sources: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    """x and the leaves that it is made of, in a graph of their own."""
    if make is None:
        return None, []
    with torch.enable_grad():
        leaves = [s.detach().requires_grad_(True) for s in sources]
        return make(*leaves), leaves


def _rest(
    plan: _Plan, x_in: Tensor, low_NO: Tensor, tensors: Sequence[Tensor], base: Base, needs: Callable[[int], bool]
) -> Tensor | None:
    """Everything of a part but its factors, in place. Returns `u` before out_scale, where that is trained."""
    if plan.delta < 0 and plan.out_scale < 0 and plan.bias < 0:
        return None
    y_NO = plan.of(low_NO)
    if plan.delta >= 0:
        y_NO.addmm_(rows_of(x_in, plan.rows).to(y_NO.dtype), tensors[plan.delta].to(y_NO.dtype).T)
    u_NO: Tensor | None = None
    if plan.out_scale >= 0:
        f_O = tensors[plan.out_scale].to(y_NO.dtype)
        own = base.bias is not None and plan.keep_bias
        # b₀ is inside y and must stay unscaled; at f = 1 this is y itself, bit for bit
        b_O = base.bias[plan.columns].to(y_NO.dtype) if own and base.bias is not None else None
        if needs(plan.out_scale):
            u_NO = y_NO.clone() if b_O is None else y_NO - b_O
        y_NO.mul_(f_O)
        if b_O is not None:
            y_NO.add_((1 - f_O) * b_O)
    if plan.bias >= 0:
        y_NO.add_(tensors[plan.bias].to(y_NO.dtype))
    return u_NO


class _Backward:
    """Gradients of one node, accumulated part by part."""

    def __init__(
        self, ctx: Any, x_NI: Tensor | None, tensors: Sequence[Tensor], dy_NO: Tensor, flags: Sequence[bool]
    ) -> None:
        self.base, self.plans = cast(Base, ctx.base), cast("list[_Plan]", ctx.plans)
        self.blocks = cast("list[Block | Product]", ctx.blocks)
        self.dtype, self.compute = ctx.dtypes
        self.tensors = tensors
        self.needs = _needs(flags)
        self.x_NI, self.dy_NO = x_NI, dy_NO
        self.grads: list[Tensor | None] = [None] * len(tensors)

    def add(self, index: int, value: Tensor) -> None:
        """A share of a tensor's gradient."""
        have = self.grads[index]
        self.grads[index] = value if have is None else have + value

    def run(self, kept: Sequence[Tensor | None], lows: Sequence[Low], *, wants_x: bool) -> Tensor | None:
        """dx, where it is wanted. `kept` is u of each part, None where it was not kept, and `lows` is what was kept of
        each block.
        """
        dz_NO = self.dy_NO.to(self.compute)
        turned = any(p.out_scale >= 0 for p in self.plans)
        if turned and dz_NO is self.dy_NO:
            dz_NO = dz_NO.clone()
        for plan, u_NO in zip(self.plans, kept, strict=True):
            self._rest(plan, u_NO, dz_NO)
        dlows: list[Tensor] = []
        x_low = None if self.x_NI is None or not self.blocks else self.x_NI.to(self.compute)
        for block, low in zip(self.blocks, lows, strict=True):
            dlows.append(block.back(x_low, dz_NO, self.tensors, low, self.needs, self.add))
        scaled = [p for p in self.plans if p.in_scale >= 0]
        if not wants_x and not any(self.needs(p.in_scale) for p in scaled):
            return None
        dx_NI = self._base_input(dz_NO, dz_NO.to(self.dtype) if turned else self.dy_NO.to(self.dtype), scaled)
        if not wants_x:
            return None
        for block, dh_TnR in zip(self.blocks, dlows, strict=True):
            block.into_x(dh_TnR, self.tensors, dx_NI)
        return dx_NI

    def _rest(self, plan: _Plan, u_NO: Tensor | None, dz_NO: Tensor) -> None:
        """Gradients of bias, out_scale and delta; the part's columns of dz become those before out_scale."""
        if plan.delta < 0 and plan.out_scale < 0 and plan.bias < 0:
            return
        dz = plan.of(dz_NO)
        if self.needs(plan.bias):
            self.add(plan.bias, dz.sum(0))
        if plan.out_scale >= 0:
            if u_NO is not None:
                self.add(plan.out_scale, (dz * u_NO).sum(0))
            dz.mul_(self.tensors[plan.out_scale].to(dz.dtype))
        if self.needs(plan.delta):
            assert self.x_NI is not None
            x_in = rows_of(self.x_NI, plan.rows).to(dz.dtype)
            x_in = x_in if plan.in_scale < 0 else x_in * self.tensors[plan.in_scale].to(dz.dtype)
            self.add(plan.delta, dz.T @ x_in)

    def _base_input(self, dz_NO: Tensor, low_NO: Tensor, scaled: Sequence[_Plan]) -> Tensor:
        """dx through the frozen maps and dense differences, behind the input scales. `low_NO` is dz in x's dtype."""
        dx_NI = self.base.back(low_NO)
        for plan in self.plans:  # the base product is ours alone, so it takes the sums in place
            if plan.delta >= 0:
                delta_OI = self.tensors[plan.delta].to(dz_NO.dtype)
                rows_of(dx_NI, plan.rows).add_(plan.of(dz_NO) @ delta_OI)
        for plan in scaled:
            own = rows_of(dx_NI, plan.rows)
            dx = own.to(self.compute)
            if self.needs(plan.in_scale):
                assert self.x_NI is not None
                self.add(plan.in_scale, (dx * rows_of(self.x_NI, plan.rows).to(self.compute)).sum(0))
            own.copy_(dx * self.tensors[plan.in_scale].to(dx.dtype))
        return dx_NI
