"""How an update acts at each kind of site that holds a weight: linear, expert, embedding, convolution, norm.

In: a module, its site, the executor. Out: callables that stand in for the module's forward on that one instance.
Where no adapter acts, the module's own forward runs and its output is returned untouched, bit for bit.
Refuses to know methods and files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lorica.core.errors import MethodError
from lorica.core.site import Site
from lorica.core.update import LinearUpdate
from lorica.engine.executor import Executor, Work
from lorica.engine.linear import Base, Part, adapted_linear, on_top


class SiteForward:
    """Stands in for `module.forward`. `inner` is what was there before; `plain` asks for the class's own forward."""

    def __init__(self, executor: Executor, module: nn.Module, site: Site) -> None:
        self.executor = executor
        self.module = module
        self.site = site
        self.previous: Callable[..., Any] | None = module.__dict__.get("forward")
        self.plain = False

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that this object stands before."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def install(self) -> None:
        self.module.__dict__["forward"] = self

    def remove(self) -> None:
        if self.previous is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.previous

    def bias(self) -> Tensor | None:
        return self.executor.backbone.bias(self.site.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError  # every kind below gives its own


def _amp(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on: the base product would be cast, and the update must match it."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def stacked_linear(x_NI: Tensor, base: Base, work: list[Work], compute: torch.dtype | None) -> Tensor:
    """Innermost updates in one node with the base product; further updates of stacked rows on top, segment by segment."""
    tall = [item for item in work if len(item.updates) > 1]
    x_low = x_NI
    for item in tall:
        # in_scales of the upper updates act on x before the lower map sees it
        for level in range(len(item.updates) - 1, 0, -1):
            scale_I = item.linear(level).in_scale_I
            if scale_I is not None:
                mask = torch.ones_like(x_low)
                mask[item.start : item.stop] = scale_I.to(x_low.dtype)
                x_low = x_low * mask
    parts = [Part(item.start, item.stop, item.linear(0), item.dropouts[0]) for item in work]
    y_NO = adapted_linear(x_low, base, parts, compute)
    if not tall:
        return y_NO
    pieces, done = [], 0
    for item in tall:
        pieces += [
            y_NO[done : item.start],
            _upper(x_NI[item.start : item.stop], y_NO[item.start : item.stop], base, item),
        ]
        done = item.stop
    return torch.cat([*pieces, y_NO[done:]])


def _upper(x_NI: Tensor, y_NO: Tensor, base: Base, item: Work) -> Tensor:
    """Levels 1 and up of one segment."""
    inputs, levels = [x_NI], range(len(item.updates) - 1, 0, -1)
    for level in levels:
        scale_I = item.linear(level).in_scale_I
        inputs.append(inputs[-1] if scale_I is None else inputs[-1] * scale_I.to(x_NI.dtype))
    bias_O = item.linear(0).effective_bias(base.bias)
    for level in reversed(levels):
        update = item.linear(level)
        x_seen = inputs[len(item.updates) - 1 - level]
        y_NO = on_top(x_seen, y_NO, None if bias_O is None else bias_O.to(y_NO.dtype), update, item.dropouts[level])
        bias_O = update.effective_bias(bias_O)
    return y_NO


class LinearForward(SiteForward):
    """`nn.Linear` and Conv1D."""

    def __call__(self, x: Tensor) -> Tensor:
        x = _amp(x)
        leading = x.numel() // x.shape[-1]
        work = self.executor.work(self.site, leading)
        if not work:
            return cast(Tensor, self.inner(x))
        y_NO = stacked_linear(x.reshape(leading, -1), self.base(), work, self.executor.compute)
        return y_NO.view(*x.shape[:-1], -1)

    def base(self) -> Base:
        weight_OI = self.executor.backbone.weight(self.site.name).matrix()
        return Base(self.inner, lambda dy_NO: dy_NO @ weight_OI.to(dy_NO.dtype), self.bias())


class EmbeddingForward(SiteForward):
    """`nn.Embedding`, as a linear map of one-hot tokens, times the module's own output scale."""

    def __call__(self, ids: Tensor) -> Tensor:
        out = cast(Tensor, self.inner(ids))
        work = self.executor.work(self.site, ids.numel())
        if not work:
            return out
        y_ND, flat_N = out.reshape(ids.numel(), -1), ids.reshape(-1)
        pieces, done = [], 0
        for item in work:
            y = y_ND[item.start : item.stop]
            for level in range(len(item.updates)):
                y = self._apply(flat_N[item.start : item.stop], y, item.linear(level))
            pieces += [y_ND[done : item.start], y]
            done = item.stop
        return torch.cat([*pieces, y_ND[done:]]).view(out.shape)

    def _apply(self, ids_N: Tensor, y_ND: Tensor, update: LinearUpdate) -> Tensor:
        pad = cast(nn.Embedding, self.module).padding_idx
        extra: Tensor | None = None
        scale_N1 = None if update.in_scale_I is None else update.in_scale_I[ids_N, None].to(y_ND.dtype)
        if update.delta is not None:
            extra = F.embedding(ids_N, update.delta.T, padding_idx=pad)
            extra = extra if scale_N1 is None else extra * scale_N1
        for factor in update.factors:
            plain = factor.folded()
            low = F.embedding(ids_N, plain.A_RI.T, padding_idx=pad) @ plain.B_OR.T
            extra = low if extra is None else extra + low
        y = y_ND if scale_N1 is None else y_ND * scale_N1
        y = y if extra is None else y + (extra * self.site.scale).to(y.dtype)
        y = y if update.out_scale_O is None else y * update.out_scale_O.to(y.dtype)
        return y if update.bias_O is None else y + (update.bias_O * self.site.scale).to(y.dtype)


class NormForward(SiteForward):
    """LayerNorm, RMSNorm and the like: the module itself, run with the adapted weight and bias."""

    def __call__(self, x: Tensor) -> Tensor:
        if self.plain:
            return cast(Tensor, type(self.module).forward(self.module, x))
        width = self.site.shape[0]
        leading = x.numel() // width if x.shape[-1] == width else x.shape[0]
        work = self.executor.work(self.site, leading)
        if not work:
            return cast(Tensor, self.inner(x))
        rows = x.reshape(leading, *([width] if x.shape[-1] == width else x.shape[1:]))
        pieces, done = [], 0
        for item in work:
            pieces += [self._run(rows[done : item.start], None)] if done < item.start else []
            pieces.append(self._run(rows[item.start : item.stop], item))
            done = item.stop
        pieces += [self._run(rows[done:], None)] if done < leading else []
        return torch.cat(pieces).view(x.shape)

    def _run(self, x: Tensor, item: Work | None) -> Tensor:
        if item is None:
            return cast(Tensor, self.inner(x))
        weight = self.executor.backbone.weight(self.site.name).matrix()
        bias = self.bias()
        for level in range(len(item.updates)):
            update = item.linear(level)
            weight, bias = update.effective(weight), update.effective_bias(bias)
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        dtype = torch.promote_types(x.dtype, weight.dtype)
        self.plain = True
        try:
            return cast(Tensor, functional_call(self.module, tensors, (x.to(dtype),))).to(x.dtype)
        finally:
            self.plain = False


class ConvForward(SiteForward):
    """`nn.Conv1d/2d/3d`: A is a convolution with the base's own geometry, B a 1×1 convolution."""

    def __call__(self, x: Tensor) -> Tensor:
        work = self.executor.work_for_rows(self.site, x.shape[0])
        if not work:
            return cast(Tensor, self.inner(x))
        y = cast(Tensor, self.inner(x))
        pieces, done = [], 0
        for item in work:
            part, bias = y[item.start : item.stop], self.bias()
            for level in range(len(item.updates)):
                part = self._apply(x[item.start : item.stop], part, bias, item, level)
                bias = item.linear(level).effective_bias(bias)
            pieces += [y[done : item.start], part]
            done = item.stop
        return torch.cat([*pieces, y[done:]])

    def _apply(self, x: Tensor, y: Tensor, bias: Tensor | None, item: Work, level: int) -> Tensor:
        update, dropout = item.linear(level), item.dropouts[level]
        wide = (-1, *(1,) * (y.ndim - 2))
        x_in = x
        if update.in_scale_I is not None:
            if level:
                raise MethodError(f"An input scale cannot be stacked on convolution {self.site.name!r}.")
            x_in = x * update.in_scale_I.to(x.dtype).view(wide)
            y = cast(Tensor, self.inner(x_in))
        if update.delta is not None:
            y = y + self._conv(x_in, update.delta.to(x.dtype))
        x_low = x if dropout is None else dropout(x)
        for factor in update.factors:
            plain = factor.folded()
            y = y + self._low_rank(x_low, plain.A_RI.to(x.dtype), plain.B_OR.to(x.dtype))
        if update.out_scale_O is not None:
            f = update.out_scale_O.to(x.dtype).view(wide)
            y = f * y if bias is None or update.scale_bias else f * y + (1 - f) * bias.to(x.dtype).view(wide)
        return y if update.bias_O is None else y + update.bias_O.to(x.dtype).view(wide)

    def _low_rank(self, x: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
        """Every group sees the same A on its own channels, and its own rows of B."""
        groups = cast(Any, self.module).groups
        h = self._conv(x, A_RI.repeat(groups, *(1,) * (A_RI.ndim - 1)))
        h_BGRS = h.reshape(h.shape[0], groups, A_RI.shape[0], -1)
        out = torch.einsum("bgrs,gor->bgos", h_BGRS, B_OR.view(groups, -1, B_OR.shape[1]))
        return out.reshape(h.shape[0], -1, *h.shape[2:])

    def _conv(self, x: Tensor, weight: Tensor) -> Tensor:
        # the module's own geometry: stride, padding, dilation, groups and padding mode
        return cast(Tensor, cast(Any, self.module)._conv_forward(x, weight, None))
