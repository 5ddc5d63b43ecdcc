"""Norms of known form under adapters, as single autograd nodes: what `fused` is for bare ones.

In: a site's forward and the stand-in of its bare norm. Out: a forward that equals the site's own bit for bit, with its
gradients up to rounding, and saves x and one number a row. Refuses to know methods and norms of other forms.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorica.engine.executor import Work
from lorica.engine.fused import FusedNorm
from lorica.engine.sites import NormForward


class AdaptedNorm(NormForward):
    """Stands before a `NormForward` for the time of a packed pass."""

    def __init__(self, site: NormForward, bare: FusedNorm) -> None:
        super().__init__(site.executor, site.module, site.site)
        self.previous = None  # `site` is no part of this one
        self.bare = bare

    def _run(self, x: Tensor, item: Work | None) -> Tensor:
        if item is None:
            return self.bare(x)
        weight = self.executor.backbone.weight(self.site.name).matrix()
        updates = [item.linear(level) for level in range(len(item.updates))]
        for update in updates:
            weight = update.effective(weight)
        plain = self.bare.weight.dtype == x.dtype and weight.dtype in (x.dtype, torch.float32)
        if not plain or any(update.bias_O is not None for update in updates):
            return super()._run(x, item)
        result: Tensor = cast(Any, _Adapted).apply(x, weight, self.bare)
        return result


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_I: Tensor, bare: FusedNorm) -> Tensor:
        wide_NI = x_NI.float()
        root_N1 = bare.root(wide_NI)
        ctx.save_for_backward(x_NI, root_N1, weight_I)
        ctx.form = bare.form
        hat_NI, apply = wide_NI * root_N1, bare.form.apply
        y_NI = apply(hat_NI, weight_I, weight_I.dtype)
        if weight_I.dtype == x_NI.dtype:
            return y_NI
        # as `sites.rounded_once` does it, whose gradient is that of y; the two that are subtracted are so near to each
        # other that their difference is exact
        base_NI = apply(hat_NI, bare.weight, x_NI.dtype)
        frozen_NI = apply(hat_NI, bare.weight.to(weight_I.dtype), weight_I.dtype)
        same_NI = y_NI == frozen_NI
        return torch.where(same_NI, base_NI, y_NI.add_(base_NI - frozen_NI.to(x_NI.dtype)).to(x_NI.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x_NI, root_N1, weight_I = ctx.saved_tensors
        dy_NI, hat_NI = grads[0].float(), x_NI.float() * root_N1
        dweight_I = (dy_NI * hat_NI).sum(0).to(weight_I.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dweight_I, None
        dhat_NI = dy_NI * ctx.form.factor(weight_I)
        dot_N1 = torch.linalg.vecdot(dhat_NI, hat_NI)[..., None]
        dx_NI = dhat_NI.addcmul_(hat_NI, dot_N1, value=-1 / x_NI.shape[-1]).mul_(root_N1).to(x_NI.dtype)
        return dx_NI, dweight_I, None
