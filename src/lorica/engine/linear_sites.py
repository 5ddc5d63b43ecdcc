"""How an update acts at linear sites: one node with the base product, and what stacks need on top of it.

In: a module, its site, the executor. Out: callables that stand in for the module's forward on that one instance, and
the same for a product whose base is given. Refuses to know methods, groups of modules and files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lorica.core.errors import MethodError
from lorica.engine.equation import on_top
from lorica.engine.executor import Work
from lorica.engine.linear import Base, Part, adapted_linear
from lorica.engine.sites import SiteForward, amp


def parts_of(item: Work, index: int = 0) -> list[Part]:
    """What one node can do of a segment: every level where all are sums of products, else the innermost alone."""
    levels = range(len(item.updates)) if is_sum(item) else range(1)
    return [Part(item.start, item.stop, item.linear(level), item.dropouts[level], index) for level in levels]


def is_sum(item: Work) -> bool:
    """Whether the levels of a segment only add to what they stand on, so that their order does not matter."""
    return len(item.updates) == 1 or all(item.linear(level).low_rank_only for level in range(len(item.updates)))


def stacked_linear(x_NI: Tensor, base: Base, work: list[Work], compute: torch.dtype | None) -> Tensor:
    """One node with the base product, and on top of it, segment by segment, the levels of stacks that are no sums."""
    tall = [item for item in work if not is_sum(item)]
    y_NO = adapted_linear(_under(x_NI, tall, 1), base, [part for item in work for part in parts_of(item)], compute)
    if not tall:
        return y_NO
    biases = [item.linear(0).effective_bias(base.bias) for item in tall]
    return _over(x_NI, y_NO, tall, biases, 1)


def _under(x_NI: Tensor, work: list[Work], lowest: int) -> Tensor:
    """x behind the input scales of levels `lowest` and up, which act before the map below sees it."""
    for item in work:
        for level in range(len(item.updates) - 1, lowest - 1, -1):
            scale_I = item.linear(level).in_scale_I
            if scale_I is not None:
                mask = torch.ones_like(x_NI)
                mask[item.start : item.stop] = scale_I.to(x_NI.dtype)
                x_NI = x_NI * mask
    return x_NI


def _over(x_NI: Tensor, y_NO: Tensor, work: list[Work], biases: list[Tensor | None], lowest: int) -> Tensor:
    """Levels `lowest` and up of some segments, over the output and the bias of the level below."""
    pieces, done = [], 0
    for item, bias_O in zip(work, biases, strict=True):
        pieces += [
            y_NO[done : item.start],
            _levels(x_NI[item.start : item.stop], y_NO[item.start : item.stop], bias_O, item, lowest),
        ]
        done = item.stop
    return torch.cat([*pieces, y_NO[done:]])


def _levels(x_NI: Tensor, y_NO: Tensor, bias_O: Tensor | None, item: Work, lowest: int) -> Tensor:
    inputs, levels = [x_NI], range(len(item.updates) - 1, lowest - 1, -1)
    for level in levels:
        scale_I = item.linear(level).in_scale_I
        inputs.append(inputs[-1] if scale_I is None else inputs[-1] * scale_I.to(x_NI.dtype))
    for level in reversed(levels):
        update = item.linear(level)
        x_seen = inputs[len(item.updates) - 1 - level]
        y_NO = on_top(x_seen, y_NO, None if bias_O is None else bias_O.to(y_NO.dtype), update, item.dropouts[level])
        bias_O = update.effective_bias(bias_O)
    return y_NO


class LinearForward(SiteForward):
    """`nn.Linear` and Conv1D."""

    def __call__(self, input: Tensor) -> Tensor:
        x = amp(input)
        leading = x.numel() // x.shape[-1]
        work = self.executor.work(self.site, leading)
        if not work:
            return cast(Tensor, self.inner(x))
        self.executor.check_rows(x.shape)
        x_NI = x.reshape(leading, -1)
        if self.previous is None:
            y_NO = stacked_linear(x_NI, self.base(), work, self.executor.compute)
        else:  # somebody's own forward, of which autograd alone knows the gradient
            y_NO = cast(Tensor, self.inner(_under(x_NI, work, 0)))
            y_NO = _over(x_NI, y_NO, work, [self.bias()] * len(work), 0)
        return y_NO.view(*x.shape[:-1], -1)

    def base(self) -> Base:
        weight = self.executor.backbone.weight(self.site.name)  # asked for its matrix where that is used
        return Base(self.inner, lambda dy_NO: dy_NO @ weight.matrix().to(dy_NO.dtype), self.bias())


class _Products(TorchFunctionMode):
    """Inside, `F.linear` with one weight, or with a copy of it in another dtype, is another function of its input."""

    CASTS = (Tensor.float, Tensor.to, Tensor.type, Tensor.double, Tensor.half, Tensor.bfloat16)

    def __init__(self, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weights, self.product = [weight], product
        self.used = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        if func is F.linear and any(given["weight"] is weight for weight in self.weights):
            self.used = True
            return self.product(given["input"], given["weight"])
        result = func(*args, **(kwargs or {}))
        if func in self.CASTS and any(args[0] is weight for weight in self.weights):
            self.weights.append(result)
        return result


class RouterForward(SiteForward):
    """A router of experts: its own forward, in which the product with its weight is the adapted one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        route = self.executor.live_route()
        if route is None or not route.touches(self.site.name):
            return self.inner(*args, **kwargs)
        with _Products(cast(Tensor, self.module.weight), self._product) as products:
            result = self.inner(*args, **kwargs)
        if not products.used:
            raise MethodError(
                f"{type(self.module).__name__} makes its logits in a way that no adapter can reach, at site "
                f"{self.site.name!r}.",
                hint="Leave routers out of the targets.",
            )
        return result

    def _product(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        x, leading = amp(x), x.numel() // x.shape[-1]
        bias_O = self.bias()
        bias_O = None if bias_O is None else bias_O.to(weight_OI.dtype)
        base = Base(lambda x: F.linear(x, weight_OI, bias_O), lambda dy: dy @ weight_OI.to(dy.dtype), bias_O)
        work = self.executor.work(self.site, leading)
        return stacked_linear(x.reshape(leading, -1), base, work, self.executor.compute).view(*x.shape[:-1], -1)
