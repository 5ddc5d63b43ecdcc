"""The base is bitwise untouched, always, and it is what acts when adapters are off."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.contract.cases import (
    Case,
    add,
    attached,
    bits,
    every,
    every_kind,
    fails_after,
    gradient,
    inputs,
    output,
    snapshot,
    unchanged,
)


@every
def test_the_base_keeps_every_bit_and_key_through_an_adapters_whole_life(case: Case) -> None:
    from lorica.engine.host import Host
    from tests.contract.cases import backbone

    base = backbone(case.family)
    before, own = snapshot(base), [set(part.__dict__) for part in base.module.modules()]
    given = inputs(base)
    y = output(base, given)

    host = Host(base)
    adapter = add(host, "a", case.make())
    unchanged(base, before)
    host.activate("a")
    optimizer = torch.optim.AdamW(adapter.optimizer_groups(), lr=0.05, weight_decay=0.1)
    host.train()
    for _ in range(3):
        gradient(host, "a", given)
        optimizer.step()
        unchanged(base, before)
    host.eval()
    assert all(p.grad is None and not p.requires_grad for p in base.module.parameters())
    assert not torch.equal(output(host, given), y)
    with host.disabled():
        assert torch.equal(output(host, given), y)
    with pytest.raises(KeyError):
        fails_after(host, given)()
    unchanged(base, before)
    host.delete("a")
    assert torch.equal(output(host, given), y)
    unchanged(base, before)
    assert host.detach() is base
    assert torch.equal(output(base, given), y)
    unchanged(base, before)
    assert [set(part.__dict__) for part in base.module.modules()] == own


@every_kind
def test_disabled_is_the_base_bit_for_bit_nests_and_survives_exceptions(case: Case) -> None:
    host = attached(case)
    given = inputs(host)
    y = output(host, given)
    with host.disabled():
        base = output(host, given)
        with host.disabled():
            assert torch.equal(bits(output(host, given)), bits(base))
        assert torch.equal(bits(output(host, given)), bits(base))
    assert torch.equal(bits(output(host, given)), bits(y))
    with pytest.raises(KeyError), host.disabled():
        fails_after(host, given)()
    assert host.active == ("a",)
    assert torch.equal(bits(output(host, given)), bits(y))
    assert not torch.equal(y, base)


@every_kind
def test_an_adapter_of_nan_does_not_reach_the_base(case: Case) -> None:
    host = attached(case)
    given = inputs(host)
    with host.disabled():
        base = output(host, given)
    host.adapter("a").flat.fill_(float("nan"))
    assert output(host, given).isnan().any()
    with host.disabled():
        assert torch.equal(output(host, given), base)
    with host.rows([None, None]):
        assert torch.equal(output(host, given), base)


@every_kind
def test_a_deep_copy_lives_on_its_own(case: Case) -> None:
    host = attached(case)
    given = inputs(host)
    y = output(host, given)
    twin = copy.deepcopy(host)
    assert torch.equal(output(twin, given), y)
    twin.adapter("a").flat.add_(0.1)
    assert torch.equal(output(host, given), y)
    assert not torch.equal(output(twin, given), y)
    expected = gradient(host, "a", given)
    host.adapter("a").zero_grad()
    twin.adapter("a").flat.copy_(host.adapter("a").flat)
    assert torch.equal(gradient(twin, "a", given), expected)
    assert not host.adapter("a").grad.any()
    twin.detach()
    assert torch.equal(output(host, given), y)
