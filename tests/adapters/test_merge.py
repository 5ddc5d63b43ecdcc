"""Merging: what is refused and why, that a failure leaves no trace, and that the check on probes can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorica.adapters.fold import blocks, doubled, fold_weight
from lorica.adapters.merge import Merge, MergeReport
from lorica.adapters.probe import Difference, beside, compare, probe_inputs
from lorica.core.errors import MergeError
from lorica.core.update import LinearUpdate
from lorica.engine.host import Host, attach
from lorica.methods import make_method
from lorica.models import Backbone
from tests.contract.cases import (
    Case,
    add,
    attached,
    backbone,
    bits,
    close,
    every_kind,
    holds_weights,
    inputs,
    output,
    perturb,
    places,
    run_dense,
    small,
    snapshot,
    unchanged,
)
from tests.tiny import tiny

LORA = make_method("lora", rank=2)


def host_with(
    method: str = "lora", targets: str = "q_proj", family: str = "llama", dtype: torch.dtype = torch.float64
) -> Host:
    host = Host(backbone(family, dtype))
    perturb(host.add("a", small(method), targets, dtype=torch.promote_types(dtype, torch.float32)))
    host.activate("a")
    return host


def refused(host: Host, words: str) -> MergeError:
    """Merging fails with these words, and nothing changed: weights, routing, output."""
    before, given = snapshot(host.backbone), inputs(host)
    y = output(host, given)
    with pytest.raises(MergeError, match=words) as caught:
        host.merge()
    unchanged(host.backbone, before)
    assert host.active == ("a",)
    torch.testing.assert_close(output(host, given), y, rtol=0, atol=0, equal_nan=True)
    return caught.value


# -- the report ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_the_report_names_the_dtype_and_a_difference_that_rounding_explains(dtype: torch.dtype, limit: float) -> None:
    host = host_with("dora", "all-linear", dtype=dtype)
    report = host.merge()
    name = str(dtype).removeprefix("torch.")
    assert isinstance(report, MergeReport)
    assert report.sites == 14 and report.dtype == name
    assert report.worst in host.adapter("a").layout.sites
    assert 0 <= report.relative < limit
    assert str(report).startswith("Merged 14 sites in float64 and rounded to " + name)
    assert report.lines() == [str(report)] and str(report).count("\n") == 0
    assert set(asdict(report)) == {"sites", "difference", "relative", "worst", "rounding", "dtype"}


@every_kind
def test_float32_logits_are_the_adapted_ones_up_to_rounding(case: Case) -> None:
    if not holds_weights(case.make()):
        return
    host = Host(backbone(case.family, torch.float32))
    method = case.make()
    names = [n for n in places(host.backbone, method, head=False) if not host.backbone.sites[n].tied]
    perturb(host.add("a", method, names), 0.03)
    host.activate("a")
    given = inputs(host)
    y = output(host, given)
    host.merge()
    close(output(host, given), y, 1e-4)


def test_a_report_over_blocks_of_rows_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    host = host_with("dora", "all-linear")
    whole = host.merge()
    merged = snapshot(host.backbone)
    host.unmerge()
    monkeypatch.setattr("lorica.adapters.fold.BLOCK", 100)
    assert len(list(blocks((48, 32)))) == 16
    parts = host.merge()
    for name, tensor in host.backbone.module.state_dict().items():
        close(tensor, merged[name], 1e-14)
    assert parts.sites == whole.sites
    assert parts.relative == pytest.approx(whole.relative, abs=1e-14)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "targets", "words"),
    [
        ("prompt", "input", "'prompt' adapter 'a' adds virtual tokens at site 'input' and changes no weight"),
        ("prefix", "all-attention", "'prefix' adapter 'a' adds keys and values at site 'model.layers.0.self_attn'"),
    ],
)
def test_updates_without_a_weight_are_refused_by_method_and_site(method: str, targets: str, words: str) -> None:
    assert "beside the model" in str(refused(host_with(method, targets), words).hint)


def test_one_update_that_cannot_be_folded_keeps_the_whole_stack_out() -> None:
    host = host_with()
    add(host, "p", make_method("prompt", tokens=2), seed=2)
    before = snapshot(host.backbone)
    host.activate("a", "p")
    with pytest.raises(MergeError, match="'prompt' adapter 'p'"):
        host.merge()
    unchanged(host.backbone, before)
    assert host.active == ("a", "p")


@pytest.mark.parametrize(
    ("targets", "partner"), [("embed_tokens", "lm_head.weight"), ("lm_head", "model.embed_tokens.weight")]
)
def test_half_of_a_tied_pair_is_refused_and_the_other_half_named(targets: str, partner: str) -> None:
    refused(host_with(targets=targets, family="qwen3"), f"tied to '{partner}'")


def test_a_weight_that_a_module_which_is_no_site_shares_is_refused_too() -> None:
    class Reader(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.table = weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.table.T

    first = nn.Linear(6, 6, dtype=torch.float64)
    host = attach(nn.Sequential(first, Reader(first.weight)), LORA, "0", name="a", dtype=torch.float64)
    perturb(host.adapter("a"))
    before = snapshot(host.backbone)
    with pytest.raises(MergeError, match=r"tied to '1\.table'"):
        host.merge()
    unchanged(host.backbone, before)


def test_a_bias_beside_a_tied_weight_is_folded() -> None:
    host = host_with("bias", "cls.predictions.decoder", "bert")
    given, before = inputs(host), snapshot(host.backbone)
    y = output(host, given)
    host.merge()
    close(output(host, given), y, 1e-12)
    host.unmerge()
    unchanged(host.backbone, before)


def test_a_trained_bias_needs_a_module_with_a_bias() -> None:
    host = Host(backbone("llama"))
    adapter = host.add("a", make_method("lora", rank=2, lora_bias=True), "q_proj", dtype=torch.float64)
    host.activate("a")
    host.merge()  # still zero, so it changes nothing
    host.unmerge()
    perturb(adapter)
    refused(host, "Site 'model.layers.0.self_attn.q_proj' has no bias")


def test_a_trained_bias_is_folded_where_there_is_one() -> None:
    host = Host(backbone("gpt2"))
    perturb(host.add("a", make_method("lora", rank=2, lora_bias=True), "c_attn", dtype=torch.float64))
    host.activate("a")
    given = inputs(host)
    y = output(host, given)
    host.merge()
    close(output(host, given), y, 1e-12)


def test_an_adapter_of_another_base_is_refused() -> None:
    adapter = host_with(family="gpt2", targets="c_attn").adapter("a")
    base = backbone("llama")
    before = snapshot(base)
    with pytest.raises(MergeError, match="belongs to another base"):
        Merge(base, (adapter,)).apply()
    unchanged(base, before)


def test_a_backbone_without_values_is_refused() -> None:
    base = backbone("llama")
    adapter = Host(base).add("a", LORA, "q_proj")
    meta = Backbone(base.module.to("meta"))
    with pytest.raises(MergeError, match="meta device"):
        Merge(meta, (adapter,)).apply()


# -- failures in the middle ------------------------------------------------------------------------------------------


def test_a_value_that_is_not_finite_in_the_last_site_undoes_all_the_others() -> None:
    host = host_with(targets="all-linear")
    last = list(host.adapter("a").layout.sites)[-1]
    host.adapter("a").tensors(last)["B"].data[0, 0] = float("nan")
    refused(host, f"site '{last}' values that are not finite")


def test_a_value_that_half_precision_cannot_hold_undoes_all_the_others() -> None:
    host = host_with("delta", "all-linear", dtype=torch.float16)
    last = list(host.adapter("a").layout.sites)[-1]
    host.adapter("a").tensors(last)["delta"].data[0, 0] = 1e6
    before = snapshot(host.backbone)
    with pytest.raises(MergeError, match=f"'{last}' reach 1.0e\\+06, which float16 cannot hold") as caught:
        host.merge()
    assert "bfloat16" in str(caught.value.hint)
    unchanged(host.backbone, before)


class FaultyCopy(TorchDispatchMode):
    """Lets the first `good` copies into tensors pass, and then once does something else."""

    def __init__(self, good: int, fault: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.left, self.fault = good, fault

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.left -= 1
            if self.left == -1:
                return self.fault(args[0], args[1])
        return func(*args, **(kwargs or {}))


def interrupt(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    raise KeyboardInterrupt


@pytest.mark.parametrize("good", [0, 4, 13])
def test_an_interrupt_in_the_middle_undoes_what_was_written(good: int) -> None:
    host = host_with(targets="all-linear")
    before = snapshot(host.backbone)
    with pytest.raises(KeyboardInterrupt), FaultyCopy(good, interrupt):
        host.merge()
    unchanged(host.backbone, before)
    host.merge()


# -- the check on probes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt2", "conv"])
@pytest.mark.parametrize("damage", [0.0, 1e-3])
def test_a_wrong_weight_fails_on_probes_and_a_right_one_passes(family: str, damage: float) -> None:
    host = attached(Case(family, "lora"), dtype=torch.float32)
    for name, site in host.adapter("a").layout.sites.items():
        frozen = host.backbone.weight(name)
        update = host.adapter("a").update(name, frozen)
        assert isinstance(update, LinearUpdate)
        exact = doubled(update, torch.device("cpu"))
        x_NC, found = probe_inputs(site, torch.device("cpu")), Difference()
        stored = fold_weight(frozen.matrix().double(), [exact]).float().double()
        wanted_NO = beside(x_NC, frozen.matrix().double(), [exact])
        compare(found, x_NC, wanted_NO, stored + damage, None, torch.float32)
        assert found.explained == (damage == 0.0), name


def test_a_weight_that_was_not_stored_as_computed_fails_the_merge() -> None:
    host = host_with(targets="all-linear", dtype=torch.float32)
    before = snapshot(host.backbone)
    with (
        pytest.raises(MergeError, match="more than rounding to float32 explains"),
        FaultyCopy(5, lambda target, source: target.copy_(source + 1e-3)),
    ):
        host.merge()
    unchanged(host.backbone, before)


# -- states and stacks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "a", "b"), ("b", "c", "a")])
def test_three_adapters_of_different_methods_merge_in_their_order(order: tuple[str, ...]) -> None:
    host = host_with("dora", "all-linear", "gpt2")
    for seed, (name, method) in enumerate((("b", "ia3"), ("c", "lora"))):
        perturb(host.add(name, small(method), "c_attn", dtype=torch.float64, seed=seed), seed=seed + 5)
    host.activate(*order)
    given = inputs(host)
    y = output(host, given)
    wanted = run_dense(host, [host.adapter(name) for name in order], given).detach()
    host.merge()
    close(output(host, given), y, 1e-11)
    close(output(host, given), wanted, 1e-11)


@pytest.mark.parametrize("change", [lambda m: m.requires_grad_(True), lambda m: m.train()])
def test_merging_leaves_the_mode_and_the_gradient_flags_alone(change: Callable[[nn.Module], nn.Module]) -> None:
    host = attach(tiny("mlp"), LORA, "all-linear", name="a")
    change(host.model)
    flags, mode = [p.requires_grad for p in host.model.parameters()], host.model.training
    perturb(host.adapter("a"))
    host.merge()
    host.unmerge()
    assert [p.requires_grad for p in host.model.parameters()] == flags
    assert host.model.training == mode
    assert not any(p.grad is not None for p in host.model.parameters())


def test_only_adapted_slices_of_fused_experts_are_kept_and_changed() -> None:
    host = host_with(targets=r"re:.*layers\.1.*experts\.2\.down_proj", family="qwen3-moe")
    before = snapshot(host.backbone)
    merge = Merge(host.backbone, (host.adapter("a"),))
    report = merge.apply()
    assert report.sites == 1 and "1 site " in str(report)
    assert sum(saved.numel() for _, saved in merge._kept) == host.backbone.weight(report.worst).matrix().numel()
    after = host.backbone.module.state_dict()
    changed = {name for name in before if not torch.equal(bits(after[name]), bits(before[name]))}
    assert changed == {"model.layers.1.mlp.experts.down_proj"}
    (name,) = changed
    assert [torch.equal(after[name][e], before[name][e]) for e in range(4)] == [True, True, False, True]
