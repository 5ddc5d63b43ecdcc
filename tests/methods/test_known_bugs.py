"""Bugs that were found in other implementations of these methods, and that no other test of ours would catch.

Those that a method's own file catches are not repeated here. Each test says whose bug it is.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lorica.adapters.layout import Layout
from lorica.core.site import Site
from lorica.engine.host import Host
from lorica.methods import Method, all_methods, get_method, make_method
from lorica.methods.dora import DoRA
from lorica.methods.lora import LoRA
from lorica.methods.lora_pro import LoRAPro
from lorica.methods.vera import VeRA
from lorica.models import wrap
from lorica.training.optimizer import AdamStep, AdapterOptimizer
from tests.methods.one import SITE, hosted, linear, matrix, same, tensors

W, X, DY = matrix(8, 5, seed=1), matrix(7, 5, seed=2), matrix(7, 8, seed=3)
A, B = matrix(2, 5, seed=4), matrix(8, 2, seed=5)


@pytest.mark.parametrize(("rank", "targets"), [(4, "1"), (2, ["0", "1"]), (6, ["0", "1"])], ids=str)
def test_vera_beside_another_adapter_is_vera_alone(rank: int, targets: str | list[str]) -> None:
    """PEFT gives a second adapter the projections of the first, and crashes where it has a smaller rank."""

    def made(*, crowded: bool) -> Host:
        host = Host(wrap(nn.Sequential(linear(matrix(8, 5)), linear(matrix(3, 8)))))
        if crowded:
            host.add("first", VeRA(rank=4), ["0", "1"], dtype=torch.float64)
        adapter = host.add("second", VeRA(rank=rank, d_initial=1.0), targets, dtype=torch.float64)
        adapter.flat += 0.5
        host.activate("second")
        return host

    assert torch.equal(made(crowded=True)(X), made(crowded=False)(X))


def test_dora_drops_nothing_of_the_base_though_its_magnitude_has_moved() -> None:
    """The authors and PEFT multiply `f − 1` with a base output that was computed from a dropped input."""
    m = 1.5 * W.norm(dim=1)
    host = hosted(linear(W), DoRA(rank=2, dropout=0.5), B=torch.zeros(8, 2, dtype=torch.float64), m=m)
    host.train()
    same(host(X), 1.5 * X @ W.T)


def test_a_clipped_lora_pro_step_is_that_share_of_the_step() -> None:
    """The authors' code measures the norm of the raw gradients and applies the factor to the adjusted ones alone; here
    the projection is linear and comes after clipping, so both are the same.
    """
    moved = []
    for clip in (0.0, 1e-3):
        host = hosted(linear(W), LoRAPro(rank=2, optimizer="sgd"), A=A, B=B)
        adapter = host.adapter("a")
        (host(X) * DY).sum().backward()
        before = adapter.flat.clone()
        norm = AdapterOptimizer(adapter).step(AdamStep(1e-2, clip=clip))
        moved.append((adapter.flat - before) * (norm / clip if clip else 1.0))
    same(moved[1], moved[0], 1e-9)


@pytest.mark.parametrize(("kind", "axes"), [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)], ids=["1d", "2d", "3d"])
def test_a_convolution_of_any_dimension_costs_what_the_formula_says(kind: Callable[..., nn.Module], axes: int) -> None:
    """loralib's factors have the wrong number of elements for all but two dimensions."""
    host = Host(wrap(nn.Sequential(kind(4, 6, 3))))
    adapter = host.add("a", LoRA(rank=2), "all-conv")
    assert adapter.layout.trainable_count() == 2 * (4 * 3**axes + 6)


@pytest.mark.parametrize("name", list(all_methods()))
def test_a_name_makes_its_own_method_and_no_other(name: str) -> None:
    """The trainer of the RLVR study built plain LoRA whatever was asked for, and one script named another method."""
    cls = get_method(name)
    assert cls.name == name == cls.__module__.rsplit(".", 1)[-1]
    assert type(make_method(name)) is cls


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_overflows_half_precision_inside_an_adapter_is_no_infinity(dtype: torch.dtype, rows: int) -> None:
    """Of ports that cast factors to the base's dtype: x Aᵀ is beyond float16's 65504 here, and `s·x Aᵀ Bᵀ` is not."""
    host = Host(wrap(nn.Sequential(linear(W.to(dtype)))))
    adapter = host.add("a", LoRA(rank=2, alpha=2.0), "0", dtype=torch.float32)
    host.activate("a")
    adapter.set("0", "A", 1e5 * torch.ones(2, 5))
    adapter.set("0", "B", 1e-5 * torch.ones(8, 2))
    x = 10 * torch.ones(rows, 5, dtype=dtype)
    y = host(x)
    y.float().sum().backward()
    assert y.dtype == dtype and torch.isfinite(y).all()
    assert all(bool(value.grad.isfinite().all()) for value in adapter.tensors("0").values() if value.grad is not None)
    wanted = x.double() @ W.to(dtype).double().T + 100
    torch.testing.assert_close(y.double(), wanted, rtol=2e-2, atol=0.1)


# -- initial values, counts --------------------------------------------------------------------------------------------


def test_decay_shrinks_the_random_factor_already_at_the_first_step() -> None:
    """Its gradient is zero there, which hides that it is decayed: half of what an init experiment varies moves."""
    host = hosted(linear(W), LoRA(rank=2))
    before = {name: value.clone() for name, value in tensors(host).items()}
    (host(X) * DY).sum().backward()
    AdapterOptimizer(host.adapter("a")).step(AdamStep(0.1, weight_decay=0.5))
    same(tensors(host)["A"], before["A"] * (1 - 0.1 * 0.5))


def _count(method: Method, o: int, i: int) -> int:
    site = Site(SITE, "linear", (o, i))
    return Layout(method, {SITE: (site, method)}).trainable_count()


def test_a_factor_that_is_frozen_or_absent_is_not_counted() -> None:
    """What tables of parameters get wrong first: LoRA-FA's A, SingLoRA's second factor, VeRA's projections."""
    o, i, r = 30, 20, 4
    assert _count(make_method("lora", rank=r), o, i) == r * (o + i)
    assert _count(make_method("lora_fa", rank=r), o, i) == r * o
    assert _count(make_method("singlora", rank=r), o, i) == r * o
    assert _count(make_method("vera", rank=r), o, i) == r + o
    assert _count(make_method("lora_xs", rank=r), o, i) == r * r
