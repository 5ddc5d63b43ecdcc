"""Linear sites: one base product for the whole batch, and each segment's update beside it.

In: x, the frozen base, and updates per segment. Out: y, with gradients for x and every update tensor.
One autograd node per site that saves only x (and u where an out_scale is trained); low-rank activations and dropout
masks are made again in backward. Refuses to know adapters, methods and modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lorica.core.update import LinearUpdate, LowRank


@dataclass(frozen=True, slots=True)
class Dropout:
    """A mask as a recipe: rows `[offset, offset + n)` of the `total` rows that one adapter has at this site.

    It is drawn anew wherever it is needed, so backward and checkpoints see the same one and none is stored.
    """

    rate: float
    seed: int
    offset: int
    total: int

    def __call__(self, x_NI: Tensor) -> Tensor:
        """x under the mask, scaled by 1/(1 − rate)."""
        rng = torch.Generator(device=x_NI.device).manual_seed(self.seed)
        draw = torch.empty((self.total, *x_NI.shape[1:]), dtype=torch.float32, device=x_NI.device).uniform_(
            generator=rng
        )
        keep = draw[self.offset : self.offset + x_NI.shape[0]] >= self.rate
        return x_NI * keep / (1.0 - self.rate)


@dataclass(frozen=True, slots=True)
class Part:
    """One segment with its update, and its dropout mask while training."""

    start: int
    stop: int
    update: LinearUpdate
    dropout: Dropout | None = None


@dataclass(frozen=True, slots=True)
class Base:
    """The frozen map. `forward(x)` is the module's own forward; `back(dy)` is dy W₀; `bias` is b₀ or None."""

    forward: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    bias: Tensor | None


def adapted_linear(x_NI: Tensor, base: Base, parts: list[Part], compute: torch.dtype | None = None) -> Tensor:
    """`y` of the update equation for a flattened x; positions outside every part are base positions.

    `compute` is the dtype of the adapter's arithmetic; None is x's own (float32 masters are cast to it).
    """
    tensors: list[Tensor] = []
    plans = [_Plan.of(part, tensors) for part in parts]
    result: Tensor = cast(Any, _AdaptedLinear).apply(x_NI, base, plans, compute or x_NI.dtype, *tensors)
    return result


@dataclass(frozen=True, slots=True)
class _Plan:
    """A part with its tensors replaced by indices into the flat argument list of the autograd node."""

    start: int
    stop: int
    factors: tuple[tuple[int, int, int, int, float], ...]
    delta: int
    in_scale: int
    out_scale: int
    bias: int
    dropout: Dropout | None
    keep_bias: bool

    @classmethod
    def of(cls, part: Part, tensors: list[Tensor]) -> _Plan:
        def index(tensor: Tensor | None) -> int:
            if tensor is None:
                return -1
            tensors.append(tensor)
            return len(tensors) - 1

        update = part.update
        factors = tuple(
            (index(f.A_RI), index(f.B_OR), index(f.mid_R), index(f.post_O), f.scale) for f in update.factors
        )
        return cls(
            part.start,
            part.stop,
            factors,
            delta=index(update.delta),
            in_scale=index(update.in_scale_I),
            out_scale=index(update.out_scale_O),
            bias=index(update.bias_O),
            dropout=part.dropout,
            keep_bias=not update.scale_bias,
        )

    def drop(self, x_NI: Tensor) -> Tensor:
        """x under this part's dropout mask, if it has one."""
        return x_NI if self.dropout is None else self.dropout(x_NI)


class _AdaptedLinear(torch.autograd.Function):
    """See the module header; the maths is `core.update`'s equation and its transpose."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, base: Base, plans: list[_Plan], compute: torch.dtype, *tensors: Tensor
    ) -> Tensor:
        cast = [t.to(compute) for t in tensors]
        scaled = [p for p in plans if p.in_scale >= 0]
        x_in = x_NI.clone() if scaled else x_NI
        for plan in scaled:
            x_in[plan.start : plan.stop] *= cast[plan.in_scale].to(x_NI.dtype)
        y_NO = base.forward(x_in)
        saved: list[Tensor] = []
        if not _joint(plans, x_in, y_NO, cast, compute):
            for plan in plans:
                rows = slice(plan.start, plan.stop)
                u_NO = _forward_part(plan, x_NI[rows], x_in[rows], y_NO[rows], cast, base, compute)
                saved += [] if u_NO is None else [u_NO]
        ctx.save_for_backward(x_NI, *tensors, *saved)
        ctx.base, ctx.plans, ctx.compute, ctx.count = base, plans, compute, len(tensors)
        return y_NO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, *rest = ctx.saved_tensors
        tensors, saved = rest[: ctx.count], list(rest[ctx.count :])
        cast = [t.to(ctx.compute) for t in tensors]
        dy_NO = grads[0].contiguous()
        back = _Backward(ctx, x_NI, cast, dy_NO)
        for plan in ctx.plans:
            back.part(plan, saved.pop(0) if plan.out_scale >= 0 else None)
        dx_NI = back.input()
        dtensors = [None if g is None else g.to(t.dtype) for g, t in zip(back.grads, tensors, strict=True)]
        return (dx_NI, None, None, None, *dtensors)


def _joint(plans: list[_Plan], x_NI: Tensor, y_NO: Tensor, cast: list[Tensor], compute: torch.dtype) -> bool:
    """Equal plain low-rank segments as two batched products, added in place. Returns whether that was possible."""
    if not _stackable(plans, x_NI, cast, compute):
        return False
    count = len(plans)
    A_TRI = torch.stack([cast[p.factors[0][0]] for p in plans])
    B_TOR = torch.stack([cast[p.factors[0][1]] * p.factors[0][4] for p in plans])
    h_TnR = torch.bmm(x_NI.view(count, -1, x_NI.shape[1]), A_TRI.transpose(1, 2))
    y_NO.view(count, -1, y_NO.shape[1]).baddbmm_(h_TnR, B_TOR.transpose(1, 2))
    return True


def _stackable(plans: list[_Plan], x_NI: Tensor, cast: list[Tensor], compute: torch.dtype) -> bool:
    if len(plans) < 2 or compute != x_NI.dtype:
        return False
    length, rank = plans[0].stop - plans[0].start, cast[plans[0].factors[0][0]].shape[0] if plans[0].factors else 0
    tiled = all(p.start == i * length and p.stop == (i + 1) * length for i, p in enumerate(plans))
    return (
        tiled
        and plans[-1].stop == x_NI.shape[0]
        and all(_plain(p) and cast[p.factors[0][0]].shape[0] == rank for p in plans)
    )


def _plain(plan: _Plan) -> bool:
    """One pair of factors and nothing else."""
    return (
        len(plan.factors) == 1
        and max(plan.delta, plan.in_scale, plan.out_scale, plan.bias, plan.factors[0][2], plan.factors[0][3]) < 0
        and plan.dropout is None
    )


def _forward_part(
    plan: _Plan, x_NI: Tensor, x_in: Tensor, y_NO: Tensor, t: list[Tensor], base: Base, compute: torch.dtype
) -> Tensor | None:
    """Turn a segment's base output into the adapted one, in place. Returns `u = W₀x + …` before out_scale, if any."""
    low = y_NO.to(compute)  # y itself, to be written in place, where the dtypes agree
    x_drop = plan.drop(x_NI.to(compute)) if plan.factors else x_NI
    for a, b, mid, post, scale in plan.factors:
        h_NR = x_drop @ t[a].T
        if mid >= 0:
            h_NR = h_NR * t[mid]
        if post < 0:
            low.addmm_(h_NR, t[b].T, alpha=scale)
        else:
            low.addcmul_(h_NR @ t[b].T, t[post], value=scale)
    if plan.delta >= 0:
        low.addmm_(x_in.to(compute), t[plan.delta].T)
    u_NO: Tensor | None = None
    if plan.out_scale >= 0:
        f_O = t[plan.out_scale]
        if base.bias is None or not plan.keep_bias:
            u_NO = low.clone() if low is y_NO else low
            low = f_O * low
        else:
            # b₀ is inside y and must stay unscaled; at f = 1 this is y itself, bit for bit
            b_O = base.bias.to(compute)
            u_NO, low = low - b_O, f_O * low + (1 - f_O) * b_O
    if plan.bias >= 0:
        low = low + t[plan.bias]
    if low is not y_NO:
        y_NO.copy_(low)
    return u_NO


class _Backward:
    """Gradients of one node, accumulated part by part."""

    def __init__(self, ctx: Any, x_NI: Tensor, cast: list[Tensor], dy_NO: Tensor) -> None:
        self.base, self.compute, self.t = ctx.base, ctx.compute, cast
        self.x_NI, self.dy_NO = x_NI, dy_NO
        self.needs_x = ctx.needs_input_grad[0]
        self.needs = ctx.needs_input_grad[4:]
        self.grads: list[Tensor | None] = [None] * len(cast)
        scales = any(p.out_scale >= 0 for p in ctx.plans)
        self.dz_NO = dy_NO.clone() if scales else dy_NO
        self.plans = ctx.plans
        self.dense: list[tuple[_Plan, Tensor]] = []
        self.low: list[tuple[_Plan, Tensor]] = []

    def _add(self, index: int, make: Callable[[], Tensor]) -> None:
        if index >= 0 and self.needs[index]:
            value = make()
            have = self.grads[index]
            self.grads[index] = value if have is None else have + value

    def part(self, plan: _Plan, u_NO: Tensor | None) -> None:
        rows, t = slice(plan.start, plan.stop), self.t
        dy = self.dy_NO[rows].to(self.compute)
        self._add(plan.bias, lambda: dy.sum(0))
        if plan.out_scale >= 0:
            assert u_NO is not None
            saved = u_NO
            self._add(plan.out_scale, lambda: (dy * saved).sum(0))
            dy = dy * t[plan.out_scale]
            self.dz_NO[rows] = dy.to(self.dz_NO.dtype)
        x_NI = self.x_NI[rows].to(self.compute)
        if plan.delta >= 0:
            x_in = x_NI if plan.in_scale < 0 else x_NI * t[plan.in_scale]
            self._add(plan.delta, lambda: dy.T @ x_in)
            self.dense.append((plan, dy @ t[plan.delta]))
        x_drop = plan.drop(x_NI) if plan.factors else x_NI
        for factor in plan.factors:
            self._factor(plan, factor, x_drop, dy)

    def _factor(self, plan: _Plan, factor: tuple[int, int, int, int, float], x_NI: Tensor, dy: Tensor) -> None:
        a, b, mid, post, scale = factor
        t = self.t
        dp = dy * scale if post < 0 else dy * (t[post] * scale)
        dm_NR = dp @ t[b]
        wants_h = any(i >= 0 and self.needs[i] for i in (b, mid, post))
        h_NR = x_NI @ t[a].T if wants_h else None
        if h_NR is not None:
            m_NR = h_NR if mid < 0 else h_NR * t[mid]
            self._add(b, lambda: dp.T @ m_NR)
            self._add(post, lambda: scale * (dy * (m_NR @ t[b].T)).sum(0))
            self._add(mid, lambda: (dm_NR * h_NR).sum(0))
        dh_NR = dm_NR if mid < 0 else dm_NR * t[mid]
        self._add(a, lambda: dh_NR.T @ x_NI)
        if self.needs_x:
            self.low.append((plan, plan.drop(dh_NR @ t[a])))

    def input(self) -> Tensor | None:
        """dx: one joint base product, then each segment's dense share, input scale and low-rank share."""
        scaled = [p for p in self.plans if p.in_scale >= 0]
        if not self.needs_x and not any(self.needs[p.in_scale] for p in scaled):
            return None
        dx_NI = self.base.back(self.dz_NO)
        for plan, dx in self.dense:  # the base product is ours alone, so it takes the sums in place
            dx_NI[plan.start : plan.stop] += dx
        for plan in scaled:
            rows = slice(plan.start, plan.stop)
            dx = dx_NI[rows].to(self.compute)
            x_NI = self.x_NI[rows].to(self.compute)
            self._add(plan.in_scale, lambda dx=dx, x_NI=x_NI: (dx * x_NI).sum(0))  # type: ignore[misc]
            dx_NI[rows] = (dx * self.t[plan.in_scale]).to(dx_NI.dtype)
        for plan, dx in self.low:
            dx_NI[plan.start : plan.stop] += dx
        return dx_NI if self.needs_x else None


def on_top(
    x_NI: Tensor, y_NO: Tensor, bias_O: Tensor | None, update: LinearUpdate, dropout: Dropout | None = None
) -> Tensor:
    """A further update over an already adapted output, in plain autograd (stacked adapters).

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
    """The update equation in plain autograd, without dropout: what every faster path must equal."""
    x_in = x_NI if update.in_scale_I is None else x_NI * update.in_scale_I
    y_NO = x_in @ weight_OI.T
    return on_top(x_NI, y_NO if bias_O is None else y_NO + bias_O, bias_O, update)
