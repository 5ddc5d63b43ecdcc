"""Fused nodes keep what a first derivative needs: a second one is refused in words, and is never wrong in silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.core.update import LinearUpdate, LowRank
from lorica.engine.buckets import plan
from lorica.engine.fused import FORMS, FusedNorm
from lorica.engine.host import attach
from lorica.engine.linear import Base, Part, adapted_linear
from lorica.engine.short_attention import short_attention
from lorica.methods import make_method


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(x: Tensor) -> Tensor:
    weight = rand(5, 6, seed=1)
    base = Base(lambda x: F.linear(x, weight), lambda dy: dy @ weight, None)
    update = LinearUpdate((LowRank(rand(2, 6, seed=2).requires_grad_(True), rand(5, 2, seed=3)),))
    return adapted_linear(x, base, [Part(1, 4, update)])


def made(x: Tensor) -> Tensor:
    weight = rand(5, 6, seed=1)
    base = Base(lambda x: F.linear(x, weight), lambda dy: dy @ weight, None)
    return adapted_linear([x, rand(7, 6, seed=4)], base, [], make=lambda gate, up: F.silu(gate) * up)


def norm(x: Tensor) -> Tensor:
    return FusedNorm(rand(6, seed=1), 1e-6, FORMS[0])(x)


def attention(x: Tensor) -> Tensor:
    q = x[None, :, None, :]
    return short_attention(q, q, q, 0.5)


def spread(x: Tensor) -> Tensor:
    return plan((3, 4), (0, 0), True, x.device).spread(x[:, None])[0]


def joined(x: Tensor) -> Tensor:
    found = plan((3, 4), (0, 0), True, x.device)
    return found.join(found.spread(x[:, None]))


NODES = [linear, made, norm, attention, spread, joined]


@pytest.mark.parametrize("node", NODES)
def test_a_second_derivative_of_a_fused_node_is_refused(node: Callable[[Tensor], Tensor]) -> None:
    x = rand(7, 6).requires_grad_(True)
    (slope,) = torch.autograd.grad(node(x).square().sum(), x, create_graph=True)
    (plain,) = torch.autograd.grad(node(x).square().sum(), x)
    assert torch.equal(slope, plain), "the first is as ever"
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


def test_a_gradient_penalty_through_an_adapted_layer_is_refused_and_one_of_the_base_works() -> None:
    host = attach(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)), make_method("lora", rank=1), "0")
    x = rand(7, 6).requires_grad_(True)
    (slope,) = torch.autograd.grad(host(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()
    x.grad = None
    with host.disabled():
        (slope,) = torch.autograd.grad(host(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
    assert x.grad is not None and bool(x.grad.any())
