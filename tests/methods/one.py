"""One frozen layer with one adapter, in float64: the smallest place to check a formula."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from lorica.adapters.adapter import Adapter
from lorica.engine.host import Host
from lorica.methods import Method
from lorica.models import wrap

SITE = "fc"


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(weight_OI: Tensor, bias_O: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=bias_O is not None, dtype=weight_OI.dtype)
    layer.weight.data.copy_(weight_OI)
    if bias_O is not None:
        layer.bias.data.copy_(bias_O)
    return layer


def hosted(layer: nn.Module, method: Method, **values: Tensor) -> Host:
    """A host whose adapter `a` acts on the one layer, with some of its tensors set."""
    host = Host(wrap(nn.Sequential(OrderedDict({SITE: layer}))))
    host.add("a", method, SITE, dtype=torch.float64)
    host.activate("a")
    for name, value in values.items():
        host.adapter("a").set(SITE, name, value)
    return host


def tensors(host: Host, name: str = "a") -> dict[str, Tensor]:
    return host.adapter(name).tensors(SITE)


def grads(host: Host, x_NI: Tensor, dy_NO: Tensor) -> dict[str, Tensor]:
    """Gradients of `Σ dy ⊙ y` by parameter; `G = dyᵀ x` is the gradient that the weight itself would get."""
    adapter = host.adapter("a")
    adapter.zero_grad()
    (host(x_NI) * dy_NO).sum().backward()
    return {name: t.grad.clone() for name, t in tensors(host).items() if t.grad is not None}


def effective(host: Host) -> Tensor:
    """W' of the one layer under adapter `a`, dense."""
    adapter: Adapter = host.adapter("a")
    weight = host.backbone.weight(SITE)
    update: Any = adapter.update(SITE, weight)
    merged: Tensor = update.effective(weight.matrix())
    return merged.detach()


def same(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=tolerance, atol=tolerance)
