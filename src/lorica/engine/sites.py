"""What stands in for a module's forward, and how an update acts at embeddings, convolutions and norms.

In: a module, its site, the executor. Out: callables that stand in for the module's forward on that one instance.
Where no adapter acts, the module's own forward runs and its output is returned untouched, bit for bit.
Refuses to know methods and files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lorica.adapters.adapter import Adapter
from lorica.core.site import Site
from lorica.core.update import LinearUpdate
from lorica.engine.equation import Dropout
from lorica.engine.executor import Executor, Work


class SiteForward(ABC):
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

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward with the updates of the present route."""


def is_bare(module: nn.Module, adapters: Iterable[Adapter]) -> bool:
    """Whether a module has the forward of its class beside these adapters: neither they nor anybody else changes it."""
    before = module.__dict__.get("forward")
    if not isinstance(before, SiteForward):
        return before is None
    return before.previous is None and not any(before.executor.acts(own, before.site.name) for own in adapters)


def amp(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on: the base product would be cast, and the update must match it."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


class EmbeddingForward(SiteForward):
    """`nn.Embedding`, as a linear map of one-hot tokens, times the module's own output scale."""

    def __call__(self, input: Tensor) -> Tensor:
        ids = input
        rows = self.executor.rows()
        if rows is not None and ids.ndim > 1 and ids.shape[0] == 1:
            ids = ids.expand(rows, *ids.shape[1:])  # positions that all rows share, looked up by each row's own adapter
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

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())  # norms call their one argument by many names
        if self.plain:
            return cast(Tensor, type(self.module).forward(self.module, x))
        width = self.site.shape[0]
        by_channel = isinstance(self.module, nn.GroupNorm)  # its weight is over axis 1, and a row is one norm
        leading = x.shape[0] if by_channel else x.numel() // width
        work = self.executor.work(self.site, leading)
        if not work:
            return cast(Tensor, self.inner(x))
        self.executor.check_rows(x.shape)
        rows = x.reshape(leading, *(x.shape[1:] if by_channel else [width]))
        pieces, done = [], 0
        for item in work:
            pieces += [self._run(rows[done : item.start], None)] if done < item.start else []
            pieces.append(self._run(rows[item.start : item.stop], item))
            done = item.stop
        pieces += [self._run(rows[done:], None)] if done < leading else []
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(x.shape)

    def _run(self, x: Tensor, item: Work | None) -> Tensor:
        if item is None:
            return cast(Tensor, self.inner(x))
        weight = self.executor.backbone.weight(self.site.name).matrix()
        bias = self.bias()
        for level in range(len(item.updates)):
            update = item.linear(level)
            weight, bias = update.effective(weight), update.effective_bias(bias)
        dtype = torch.promote_types(
            x.dtype, weight.dtype if bias is None else torch.promote_types(weight.dtype, bias.dtype)
        )
        y = self._with(x.to(dtype), weight, bias)
        if dtype == x.dtype:
            return y
        frozen = self._with(x.to(dtype), self.executor.backbone.weight(self.site.name).matrix(), self.bias())
        return rounded_once(cast(Tensor, self.inner(x)), frozen, y)

    def _with(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The module on x with another weight and bias, in x's dtype."""
        tensors = {"weight": weight.to(x.dtype)} | ({} if bias is None else {"bias": bias.to(x.dtype)})
        self.plain = True
        try:
            return cast(Tensor, functional_call(self.module, tensors, (x,)))
        finally:
            self.plain = False


def rounded_once(base: Tensor, frozen: Tensor, y: Tensor) -> Tensor:
    """`y` in the dtype of `base`, where `frozen` is what `base` was before the module rounded it in its own manner.

    That manner is kept, and where y is `frozen` the result is `base`, bit for bit. The sum is rounded as a whole: a
    difference of less than half a unit would be lost if it were added to `base`, however many of them there are.
    """
    wide = y + (base.to(y.dtype) - frozen.to(base.dtype).to(y.dtype))
    with torch.no_grad():
        exact = torch.where(y == frozen, base.to(y.dtype) - wide, torch.zeros_like(wide))
    return (wide + exact).to(base.dtype)


class ConvForward(SiteForward):
    """`nn.Conv1d/2d/3d`: A is a convolution with the base's own geometry, B a 1×1 convolution."""

    def __call__(self, input: Tensor) -> Tensor:
        x = input
        if x.ndim == len(self.site.shape) - 1:  # torch's form without a batch axis
            return self(x[None])[0]
        work = self.executor.work(self.site, x.shape[0])
        y = cast(Tensor, self.inner(x))
        if not work:
            return y
        pieces, done = [], 0
        for item in work:
            pieces += [y[done : item.start], self._run(x[item.start : item.stop], y[item.start : item.stop], item)]
            done = item.stop
        return torch.cat([*pieces, y[done:]])

    def _run(self, x: Tensor, y: Tensor, item: Work) -> Tensor:
        """One segment: the base convolution sees x under every input scale, each level under those above it."""
        count = len(item.updates)
        seen = [x]
        for level in reversed(range(count)):
            scale = item.linear(level).in_scale_I
            # every group has its own channels, under one scale, as it has under one A
            wide = None if scale is None else self._wide(scale.to(x.dtype).repeat(cast(Any, self.module).groups), x)
            seen.append(seen[-1] if wide is None else seen[-1] * wide)
        y = y if seen[-1] is x else cast(Tensor, self.inner(seen[-1]))
        bias = self.bias()
        for level in range(count):
            update, dropout = item.linear(level), item.dropouts[level]
            y = self._apply(seen[count - 1 - level], seen[count - level], y, bias, update, dropout)
            bias = update.effective_bias(bias)
        return y

    def _apply(
        self, x: Tensor, x_in: Tensor, y: Tensor, bias: Tensor | None, update: LinearUpdate, dropout: Dropout | None
    ) -> Tensor:
        if update.delta is not None:
            y = y + self._conv(x_in, update.delta.to(x.dtype))
        x_low = x if dropout is None else dropout(x)
        for factor in update.factors:
            plain = factor.folded()
            y = y + self._low_rank(x_low, plain.A_RI.to(x.dtype), plain.B_OR.to(x.dtype))
        if update.out_scale_O is not None:
            f = self._wide(update.out_scale_O.to(x.dtype), y)
            y = f * y if bias is None or update.scale_bias else f * y + (1 - f) * self._wide(bias.to(x.dtype), y)
        return y if update.bias_O is None else y + self._wide(update.bias_O.to(x.dtype), y)

    @staticmethod
    def _wide(vector: Tensor, x: Tensor) -> Tensor:
        """A vector over channels, shaped to act on [rows, channels, *positions]."""
        return vector.view(-1, *(1,) * (x.ndim - 2))

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
