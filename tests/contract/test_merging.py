"""Merging folds any stack into the weights and unmerging gives every bit back."""

from __future__ import annotations

import pytest
import torch

from lorica.core.errors import MergeError
from lorica.engine.host import Host
from tests.contract.cases import (
    Case,
    add,
    attached,
    backbone,
    close,
    every_kind,
    every_variant,
    holds_weights,
    inputs,
    output,
    perturb,
    places,
    small,
    snapshot,
    unchanged,
)


def mergeable(case: Case, dtype: torch.dtype = torch.float64) -> Host:
    """A host whose active adapter `a` acts at every site that may be merged: tied weights may not."""
    host = Host(backbone(case.family, dtype))
    method = case.make()
    names = [name for name in places(host.backbone, method) if not host.backbone.sites[name].tied]
    adapter = host.add("a", method, names, dtype=torch.promote_types(dtype, torch.float32))
    perturb(adapter)
    host.activate("a")
    return host


@every_variant
def test_merged_weights_give_the_adapted_output_and_unmerging_restores_every_bit(case: Case) -> None:
    if not holds_weights(case.make()):
        return  # refused, see below
    host = mergeable(case)
    given, before = inputs(host), snapshot(host.backbone)
    y = output(host, given)
    host.merge()
    assert host.active == ()
    close(output(host, given), y, 1e-9)
    merged = host.backbone.module.state_dict()
    assert list(merged) == list(before)
    assert any(not torch.equal(merged[name], before[name]) for name in before)
    assert not any(p.requires_grad for p in host.model.parameters())
    host.unmerge()
    unchanged(host.backbone, before)
    assert host.active == ("a",)
    assert torch.equal(output(host, given), y)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_merging_into_lower_precision_rounds_once_and_unmerging_restores_every_bit(
    case: Case, dtype: torch.dtype
) -> None:
    if not holds_weights(case.make()):
        return
    host = mergeable(case, dtype)
    before = snapshot(host.backbone)
    exact = {
        name: update.effective(host.backbone.weight(name).matrix().double())
        for name in host.adapter("a").layout.sites
        if (update := host.adapter("a").update(name, host.backbone.weight(name)))
    }
    host.merge()
    for name, wanted in exact.items():
        found = host.backbone.weight(name).matrix()
        assert found.dtype == dtype
        bound = torch.finfo(dtype).eps * wanted.detach().abs() + 1e-5 * wanted.detach().abs().max()
        assert ((found.double() - wanted.detach()).abs() <= bound).all(), name
    host.unmerge()
    unchanged(host.backbone, before)


@every_kind
def test_a_stack_merges_as_it_acts(case: Case) -> None:
    if not holds_weights(case.make()):
        return
    host = mergeable(case)
    method = small("lora")
    names = [name for name in places(host.backbone, method) if not host.backbone.sites[name].tied]
    perturb(host.add("b", method, names, dtype=torch.float64), seed=3)
    given, before = inputs(host), snapshot(host.backbone)
    for stack in (("a", "b"), ("b", "a")):
        host.activate(*stack)
        y = output(host, given)
        host.merge()
        close(output(host, given), y, 1e-9)
        host.unmerge()
        unchanged(host.backbone, before)
        assert host.active == stack


@every_kind
def test_what_cannot_be_folded_is_refused_and_nothing_changes(case: Case) -> None:
    host = attached(case)
    before, given = snapshot(host.backbone), inputs(host)
    y = output(host, given)
    if holds_weights(case.make()):
        host.adapter("a").flat[0] = float("nan")
        words, y = "finite|NaN|nan", output(host, given)
        # a tied weight has a bias of its own, so a method that changes biases alone may merge there
        tied = case.method != "bias" and any(host.backbone.sites[name].tied for name in host.adapter("a").layout.sites)
        words = "tied" if tied else words
    else:
        words = case.method
    with pytest.raises(MergeError, match=words):
        host.merge()
    unchanged(host.backbone, before)
    assert host.active == ("a",)
    torch.testing.assert_close(output(host, given), y, rtol=0, atol=0, equal_nan=True)


def test_while_merged_a_second_merge_routing_and_deleting_are_refused() -> None:
    host = mergeable(Case("llama", "lora"))
    add(host, "b", small("lora"), seed=2)
    host.merge()
    for act in (host.merge, lambda: host.delete("a"), lambda: host.rows(["a", "b"]).__enter__()):
        with pytest.raises(MergeError, match=r"unmerge\(\)"):
            act()
    host.unmerge()
    host.delete("a")


def test_disabled_is_the_base_bit_for_bit_while_merged_too() -> None:
    host = mergeable(Case("llama", "lora"))
    given = inputs(host)
    with host.disabled():
        base = output(host, given)
    host.merge()
    merged = output(host, given)
    with host.disabled():
        assert torch.equal(output(host, given), base)
    assert torch.equal(output(host, given), merged)


def test_detaching_unmerges_first() -> None:
    host = mergeable(Case("llama", "dora"))
    before = snapshot(host.backbone)
    host.merge()
    unchanged(host.detach(), before)
