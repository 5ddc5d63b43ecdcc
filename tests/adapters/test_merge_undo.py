"""Undoing a merge: bit for bit from kept tensors, or by arithmetic within a bound; and what each state allows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorica.adapters.merge import Merge
from lorica.core.errors import MergeError
from lorica.engine.host import Host, attach
from lorica.methods import make_method
from tests.adapters.test_merge import LORA, host_with
from tests.contract.cases import (
    Case,
    backbone,
    every_kind,
    holds_weights,
    perturb,
    places,
    snapshot,
    unchanged,
)


def test_apply_and_undo_out_of_turn_are_refused() -> None:
    host = host_with()
    merge = Merge(host.backbone, (host.adapter("a"),))
    with pytest.raises(MergeError, match="Nothing is merged"):
        merge.undo()
    merge.apply()
    with pytest.raises(MergeError, match="merged already"):
        merge.apply()
    merge.undo()
    with pytest.raises(MergeError, match="Nothing is merged"):
        merge.undo()
    with pytest.raises(MergeError, match="no adapter to merge"):
        Merge(host.backbone, ()).apply()


def test_merging_again_and_again_leaves_nothing_behind() -> None:
    host = host_with("dora", "all-linear", dtype=torch.bfloat16)
    before = snapshot(host.backbone)
    host.merge()
    merged = snapshot(host.backbone)
    for _ in range(3):
        host.unmerge()
        unchanged(host.backbone, before)
        host.merge()
        unchanged(host.backbone, merged)


def test_norms_and_fingerprints_follow_the_weights() -> None:
    host = host_with()
    base, name = host.backbone, "model.layers.0.self_attn.q_proj"
    finger, norm = base.fingerprint(), base.weight(name).row_square_norm()
    host.merge()
    assert base.fingerprint() != finger
    torch.testing.assert_close(base.weight(name).row_square_norm(), base.weight(name).matrix().square().sum(1))
    host.unmerge()
    assert base.fingerprint() == finger
    assert torch.equal(base.weight(name).row_square_norm(), norm)


def test_suspended_is_the_base_nests_and_survives_exceptions_and_an_undo_inside() -> None:
    host = host_with(targets="all-linear", dtype=torch.bfloat16)
    base, merge = host.backbone, Merge(host.backbone, (host.adapter("a"),))
    before = snapshot(base)
    merge.apply()
    merged = snapshot(base)

    def use_and_fail() -> None:
        with merge.suspended():
            with merge.suspended():
                unchanged(base, before)
            unchanged(base, before)
            raise KeyError

    with pytest.raises(KeyError):
        use_and_fail()
    unchanged(base, merged)
    with merge.suspended():
        merge.undo()
    unchanged(base, before)


# -- undoing by arithmetic -------------------------------------------------------------------------------------------


@every_kind
def test_without_kept_tensors_undoing_gives_the_values_back(case: Case) -> None:
    if not holds_weights(case.make()):
        return
    host = Host(backbone(case.family))
    method = case.make()
    names = [n for n in places(host.backbone, method) if not host.backbone.sites[n].tied]
    stack = (host.add("a", method, names, dtype=torch.float64), host.add("b", LORA, "all", dtype=torch.float64))
    for adapter in stack:
        perturb(adapter)
    stack = tuple(a for a in stack if not any(host.backbone.sites[n].tied for n in a.layout.sites))
    before, merge = snapshot(host.backbone), Merge(host.backbone, stack, keep=False)
    merge.apply()
    assert not merge._kept
    for adapter in stack:
        adapter.flat.zero_()  # training goes on; what was folded is what is taken out
    with pytest.raises(MergeError, match="were not kept"), merge.suspended():
        pass
    merge.undo()
    for name, tensor in host.backbone.module.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-12)
    with pytest.raises(MergeError, match="Nothing is merged"):
        merge.undo()


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-8), (torch.bfloat16, 2e-3)])
def test_undoing_by_arithmetic_is_within_the_bound(method: str, dtype: torch.dtype, bound: float) -> None:
    rng = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 48, dtype=dtype)
    linear.weight.data = (0.1 * torch.randn(48, 64, generator=rng)).clamp(-0.3, 0.3).to(dtype)
    host = attach(nn.Sequential(linear), make_method(method, rank=4), "0", name="a")
    perturb(host.adapter("a"), 0.01)
    before = linear.weight.detach().clone()
    merge = Merge(host.backbone, (host.adapter("a"),), keep=False)
    merge.apply()
    assert not torch.equal(linear.weight, before)
    merge.undo()
    assert float((linear.weight.double() - before.double()).abs().max()) <= bound


def test_a_scale_of_zero_cannot_be_undone_by_arithmetic_and_is_refused() -> None:
    host = host_with("ia3", "k_proj")
    host.adapter("a").flat[3] = 0.0
    before = snapshot(host.backbone)
    with pytest.raises(MergeError, match="by zero") as caught:
        Merge(host.backbone, (host.adapter("a"),), keep=False).apply()
    assert "keep=True" in str(caught.value.hint)
    unchanged(host.backbone, before)
    host.merge()
    host.unmerge()
    unchanged(host.backbone, before)
