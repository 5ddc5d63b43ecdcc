"""Linear sites: one base product for the whole batch and all maps of one input, and each segment's update beside it.

In: x (or what x is made of), frozen maps, updates per segment and map. Out: the maps' outputs side by side, with
gradients for x and every update tensor. One autograd node, which saves x, r values a token of each low-rank update,
and u where an out_scale is trained; dropout masks, and an x that was made here, are made again in backward.
Refuses to know adapters, methods and modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorica.core.update import LinearUpdate
from lorica.engine.blocks import Block, Term, blocks_of
from lorica.engine.equation import Dropout


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

    `compute` is the dtype of the adapter's arithmetic; None is x's own (float32 masters are cast to it). With `make`,
    x is `make(*x_NI)`. An input scale is for bases of a single map.
    """
    sources = [x_NI] if isinstance(x_NI, Tensor) else list(x_NI)
    tensors = _Tensors()
    plans = [_plan(part, base, tensors) for part in parts]
    node = cast(Any, _AdaptedLinear)
    result: Tensor = node.apply(base, plans, compute or sources[0].dtype, make, len(sources), *sources, *tensors.held)
    return result


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


@dataclass(frozen=True, slots=True)
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


def _plan(part: Part, base: Base, tensors: _Tensors) -> _Plan:
    update, columns = part.update, base.columns(part.map)
    return _Plan(
        slice(part.start, part.stop),
        columns,
        tuple(
            Term(
                columns,
                tensors.index(f.A_RI),
                tensors.index(f.B_OR),
                tensors.index(f.mid_R),
                tensors.index(f.post_O),
                f.scale,
            )
            for f in update.factors
        ),
        delta=tensors.index(update.delta),
        in_scale=tensors.index(update.in_scale_I),
        out_scale=tensors.index(update.out_scale_O),
        bias=tensors.index(update.bias_O),
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
            x_in[plan.rows] *= tensors[plan.in_scale].to(x_NI.dtype)
        y_NO = base.forward(x_in)
        low_NO = y_NO.to(compute)  # y itself, written in place, where the dtypes agree
        x_low = x_NI.to(compute) if plans else x_NI
        with _as_it_is(x_NI):
            blocks = blocks_of([(p.rows, p.terms, p.dropout) for p in plans], x_NI.shape[0], tensors)
            hidden = [block.add(x_low, low_NO, tensors) for block in blocks]
            kept = [h if block.keeps else None for block, h in zip(blocks, hidden, strict=True)]
            kept += [_rest(plan, x_in, low_NO, tensors, base) for plan in plans]
        # without an update nothing of x is needed, but for the gradient of what it is made of
        saved = sources if plans or make is not None else ()
        ctx.save_for_backward(*saved, *tensors, *kept)
        ctx.base, ctx.plans, ctx.blocks, ctx.make = base, plans, blocks, make
        ctx.dtypes, ctx.counts = (x_NI.dtype, compute), (len(saved), len(tensors))
        return low_NO.to(y_NO.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        count, number = ctx.counts
        saved = ctx.saved_tensors  # asked for once, as checkpointing wants it
        sources, tensors = saved[:count], saved[count : count + number]
        made, leaves = _made_again(ctx.make, sources)
        head = len(ctx.needs_input_grad) - number
        x_NI = (sources[0] if sources else None) if made is None else made.detach()
        back = _Backward(ctx, x_NI, tensors, grads[0].contiguous(), ctx.needs_input_grad[head:])
        with _as_it_is(grads[0]):
            dx_NI = back.run(saved[count + number :], wants_x=any(ctx.needs_input_grad[5:head]))
        dtensors = [None if g is None else g.to(t.dtype) for g, t in zip(back.grads, tensors, strict=True)]
        dsources: tuple[Tensor | None, ...] = (dx_NI,)
        if dx_NI is None:
            dsources = (None,) * (head - 5)
        elif made is not None:
            dsources = torch.autograd.grad(made, leaves, dx_NI)
        return (*(None,) * 5, *dsources, *dtensors)


def _as_it_is(x: Tensor) -> torch.autocast:
    """Inside, autocast changes no dtype: the node has chosen them."""
    return torch.autocast(x.device.type, enabled=False)


def _made_again(make: Make | None, sources: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    """x and the leaves that it is made of, in a graph of their own."""
    if make is None:
        return None, []
    with torch.enable_grad():
        leaves = [s.detach().requires_grad_(True) for s in sources]
        return make(*leaves), leaves


def _rest(plan: _Plan, x_in: Tensor, low_NO: Tensor, tensors: Sequence[Tensor], base: Base) -> Tensor | None:
    """Everything of a part but its factors, in place. Returns `u` before out_scale, if there is one."""
    y_NO = low_NO[plan.rows, plan.columns]
    if plan.delta >= 0:
        y_NO.addmm_(x_in[plan.rows].to(y_NO.dtype), tensors[plan.delta].to(y_NO.dtype).T)
    u_NO: Tensor | None = None
    if plan.out_scale >= 0:
        f_O = tensors[plan.out_scale].to(y_NO.dtype)
        if base.bias is None or not plan.keep_bias:
            u_NO = y_NO.clone()
            y_NO.mul_(f_O)
        else:
            # b₀ is inside y and must stay unscaled; at f = 1 this is y itself, bit for bit
            b_O = base.bias[plan.columns].to(y_NO.dtype)
            u_NO = y_NO - b_O
            y_NO.mul_(f_O).add_((1 - f_O) * b_O)
    if plan.bias >= 0:
        y_NO.add_(tensors[plan.bias].to(y_NO.dtype))
    return u_NO


class _Backward:
    """Gradients of one node, accumulated part by part."""

    def __init__(
        self, ctx: Any, x_NI: Tensor | None, tensors: Sequence[Tensor], dy_NO: Tensor, needs: Sequence[bool]
    ) -> None:
        self.base, self.plans = cast(Base, ctx.base), cast("list[_Plan]", ctx.plans)
        self.blocks = cast("list[Block]", ctx.blocks)
        self.dtype, self.compute = ctx.dtypes
        self.tensors = tensors
        self._needs = needs
        self.x_NI, self.dy_NO = x_NI, dy_NO
        self.grads: list[Tensor | None] = [None] * len(tensors)

    def needs(self, index: int) -> bool:
        """Whether there is such a tensor, and its gradient is wanted."""
        return index >= 0 and self._needs[index]

    def add(self, index: int, value: Tensor) -> None:
        """A share of a tensor's gradient."""
        have = self.grads[index]
        self.grads[index] = value if have is None else have + value

    def run(self, kept: Sequence[Tensor | None], *, wants_x: bool) -> Tensor | None:
        """dx, where it is wanted. `kept` is `x Aᵀ` of each block, then u of each part; None where it was not kept."""
        dz_NO = self.dy_NO.to(self.compute)
        if any(p.out_scale >= 0 for p in self.plans) and dz_NO is self.dy_NO:
            dz_NO = dz_NO.clone()
        for plan, u_NO in zip(self.plans, kept[len(self.blocks) :], strict=True):
            self._rest(plan, u_NO, dz_NO)
        low: list[Tensor] = []
        for block, h_TnR in zip(self.blocks, kept, strict=False):
            assert self.x_NI is not None
            low.append(block.back(self.x_NI.to(self.compute), dz_NO, self.tensors, h_TnR, self.needs, self.add))
        scaled = [p for p in self.plans if p.in_scale >= 0]
        if not wants_x and not any(self.needs(p.in_scale) for p in scaled):
            return None
        dx_NI = self._base_input(dz_NO, scaled)
        if not wants_x:
            return None
        for block, dh_TnR in zip(self.blocks, low, strict=True):
            dx_NI[block.rows] += block.into_x(dh_TnR, self.tensors).to(dx_NI.dtype)
        return dx_NI

    def _rest(self, plan: _Plan, u_NO: Tensor | None, dz_NO: Tensor) -> None:
        """Gradients of bias, out_scale and delta; the part's columns of dz become those before out_scale."""
        dz = dz_NO[plan.rows, plan.columns]
        if self.needs(plan.bias):
            self.add(plan.bias, dz.sum(0))
        if plan.out_scale >= 0:
            assert u_NO is not None
            if self.needs(plan.out_scale):
                self.add(plan.out_scale, (dz * u_NO).sum(0))
            dz.mul_(self.tensors[plan.out_scale].to(dz.dtype))
        if self.needs(plan.delta):
            assert self.x_NI is not None
            x_in = self.x_NI[plan.rows].to(dz.dtype)
            x_in = x_in if plan.in_scale < 0 else x_in * self.tensors[plan.in_scale].to(dz.dtype)
            self.add(plan.delta, dz.T @ x_in)

    def _base_input(self, dz_NO: Tensor, scaled: Sequence[_Plan]) -> Tensor:
        """dx through the frozen maps and dense differences, behind the input scales."""
        dx_NI = self.base.back(dz_NO.to(self.dtype))
        for plan in self.plans:  # the base product is ours alone, so it takes the sums in place
            if plan.delta >= 0:
                delta_OI = self.tensors[plan.delta].to(dz_NO.dtype)
                dx_NI[plan.rows] += (dz_NO[plan.rows, plan.columns] @ delta_OI).to(dx_NI.dtype)
        for plan in scaled:
            assert self.x_NI is not None
            dx = dx_NI[plan.rows].to(self.compute)
            if self.needs(plan.in_scale):
                self.add(plan.in_scale, (dx * self.x_NI[plan.rows].to(self.compute)).sum(0))
            dx_NI[plan.rows] = (dx * self.tensors[plan.in_scale].to(dx.dtype)).to(dx_NI.dtype)
        return dx_NI
