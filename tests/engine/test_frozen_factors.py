"""Frozen factors in the dtype of a pass: cast once for all adapters that share them, and never of an older content."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorica.core.shared import shared_of
from lorica.data.example import Example
from lorica.engine import frozen_factors
from lorica.engine.engine import Engine, Item
from lorica.engine.frozen_factors import in_dtype, product
from lorica.engine.host import Host
from lorica.methods.vera import VeRA
from tests.tiny import tiny

ROWS = [[3 + (i * j) % 100 for i in range(40)] for j in (1, 7)]


def host_of(*names: str, rank: int = 24) -> Host:
    """VeRA of a rank that is large beside its maps, in bfloat16, its b away from zero."""
    host = Host(tiny("llama", dtype=torch.bfloat16))
    for seed, name in enumerate(names):
        adapter = host.add(name, VeRA(rank=rank), seed=seed)
        adapter.flat.add_(0.1 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(seed)))
    return host


def projections(host: Host, name: str) -> dict[str, Tensor]:
    return host.adapter(name).tensors("")


def run(host: Host, name: str) -> tuple[Tensor, Tensor]:
    host.adapter(name).zero_grad()
    results = Engine(host).forward_backward([Item(Example.whole(row), name) for row in ROWS])
    return torch.cat([torch.tensor(r.logprobs) for r in results]), host.adapter(name).grad.clone()


def test_views_of_a_shared_factor_come_from_one_cast() -> None:
    host = host_of("a")
    A_RI = projections(host, "a")["A"]
    halves = [in_dtype(view, torch.bfloat16) for view in (A_RI, A_RI[:, :5], A_RI[2:].mT)]
    for half, view in zip(halves, (A_RI, A_RI[:, :5], A_RI[2:].mT), strict=True):
        assert torch.equal(half, view.bfloat16())
        assert half.untyped_storage().data_ptr() == halves[0].untyped_storage().data_ptr()


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_with_a_shared_factor_is_that_with_its_cast(transposed: bool) -> None:
    host = host_of("a")
    B_OR = projections(host, "a")["B"][:17]
    F_OI = B_OR.mT if transposed else B_OR
    x_NI = torch.randn(40, F_OI.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x_NI.double() @ F_OI.bfloat16().double().mT
    for _ in range(2):
        assert (product(x_NI, F_OI).double() - exact).abs().max() <= 2**-7 * exact.abs().max()


def test_a_second_adapter_and_a_second_pass_make_no_further_copies() -> None:
    host = host_of("a", "b")
    run(host, "a")
    shared = [shared_of(t) for t in projections(host, "a").values()]
    before = [dict(s._made) for s in shared if s is not None]
    assert len(before) == 2 and all(before)
    run(host, "b")
    run(host, "a")
    assert [dict(s._made) for s in shared if s is not None] == before


@pytest.mark.parametrize("how", ["replaced", "written to"])
def test_a_changed_factor_is_never_served_from_before(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = host_of("a")
    before = run(host, "a")
    for param, value in dict(projections(host, "a")).items():
        if how == "replaced":
            host.adapter("a").set("", param, -0.5 * value)
        else:
            value.mul_(-0.5)
    after = run(host, "a")
    assert not torch.equal(before[0], after[0])
    monkeypatch.setattr(frozen_factors, "shared_of", lambda factor: None)
    monkeypatch.setattr(frozen_factors, "can_pack", lambda dtype: False)
    plain = run(host, "a")
    assert (after[0] - plain[0]).abs().max() < 0.05
    assert (after[1] - plain[1]).norm() < 0.02 * plain[1].norm()


def test_factors_of_an_adapters_own_are_cast_where_they_are_read() -> None:
    own = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    first = in_dtype(own, torch.bfloat16)
    own.data.add_(1.0)  # which no version counts
    assert not torch.equal(in_dtype(own, torch.bfloat16), first)
    x = torch.ones(2, 6).bfloat16()
    assert torch.equal(product(x, own), x @ own.bfloat16().mT)


def test_a_float32_pass_keeps_no_copies() -> None:
    host = Host(tiny("llama"))
    host.add("a", VeRA(rank=24))
    run(host, "a")
    found = [shared_of(t) for t in projections(host, "a").values()]
    assert all(s is not None and not s._made for s in found)
