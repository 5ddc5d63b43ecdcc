"""Merging on a quantised base: dequantised, folded, quantised again, the rounding reported, nothing promised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorica.adapters.merge import Merge
from lorica.adapters.save_merged import save_merged
from lorica.core.errors import MergeError, MismatchError
from lorica.engine.host import Host
from lorica.models import load
from lorica.models.quantize.apply import quantize_backbone
from lorica.models.quantize.config import Quantization
from lorica.models.quantize.functions import packed_as
from tests.contract.cases import CASES as ALL
from tests.contract.cases import METHODS, TINY, Case, add, close, holds_weights, inputs, output, perturb, small
from tests.engine.test_quantized_batches import packed_bits
from tests.tiny import tiny

FOLDING = [n for n in METHODS if Case("llama", n) in ALL and holds_weights(small(n)) and "linear" in METHODS[n].kinds]
SITE = "model.layers.0.self_attn.q_proj"


def host_on(kind: str = "nf4", method: str = "lora", dtype: torch.dtype = torch.float32, move: float = 0.1) -> Host:
    base = quantize_backbone(tiny("llama", dtype=dtype, **TINY["llama"]), Quantization(kind=kind))
    base.packed_from(lambda: tiny("llama", dtype=dtype, **TINY["llama"]))
    host = Host(base)
    add(host, "a", small(method), head=False, move=move)
    host.activate("a")
    return host


def packed_sites(host: Host) -> set[str]:
    return {name for name in host.adapter("a").layout.sites if host.backbone.weight(name).packed is not None}


@pytest.mark.parametrize("method", FOLDING)
def test_every_method_merges_to_the_quantised_sum_and_back_bit_for_bit(method: str) -> None:
    host = host_on(method=method)
    base, adapter = host.backbone, host.adapter("a")
    before = packed_bits(base)
    wanted = {}
    for name in adapter.layout.sites:
        packed = base.weight(name).packed
        if packed is not None:
            update = adapter.update(name, base.weight(name))
            with torch.no_grad():
                wanted[name] = packed_as(packed.form, update.effective(base.weight(name).matrix().double()).float())
    report = host.merge()
    for name, packed_wanted in wanted.items():
        found = base.weight(name).packed
        assert found is not None
        close(found.packed.dense(), packed_wanted.dense(), 0.05)  # float64 and float32 sums part at a boundary
    assert set(report.rounding) <= set(wanted)
    assert all(0 <= r.weight < 0.2 and r.update >= 0 for r in report.rounding.values())
    host.unmerge()
    assert all(torch.equal(before[k], v) for k, v in packed_bits(base).items())


def test_the_report_says_what_was_lost_at_each_site_and_claims_nothing_exact() -> None:
    host = host_on(move=0.3)
    report = host.merge()
    assert set(report.rounding) == packed_sites(host)
    worst = max(r.update for r in report.rounding.values())
    assert report.dtype == "nf4"
    assert "no exact merge" in str(report) and f"{worst:.0%}" in str(report)
    lines = "\n".join(report.lines())
    assert all(name in lines for name in report.rounding)
    assert report.relative > 1e-3, "4 bits show in the outputs"


def test_the_reported_rounding_is_that_of_the_stored_weight() -> None:
    host = host_on(move=0.3)
    base, adapter = host.backbone, host.adapter("a")
    frozen = base.weight(SITE).matrix().double()
    full = adapter.update(SITE, base.weight(SITE)).effective(frozen).detach()
    report = host.merge()
    lost = float((base.weight(SITE).matrix().double() - full).norm())
    assert report.rounding[SITE].weight == pytest.approx(lost / float(full.norm()), rel=1e-5)
    assert report.rounding[SITE].update == pytest.approx(lost / float((full - frozen).norm()), rel=1e-5)


def test_a_tiny_update_is_reported_as_lost() -> None:
    report = host_on(move=1e-4).merge()
    assert max(r.update for r in report.rounding.values()) > 1
    assert "of the size of what was merged" in str(report)


def test_an_adapter_that_changes_nothing_merges_to_almost_the_same_weights() -> None:
    host = host_on(kind="nf4", move=0.0)
    before = host.backbone.weight(SITE).matrix()
    report = host.merge()
    # double quantisation rounds scales again, and an all-zero update has no size to compare with
    close(host.backbone.weight(SITE).matrix(), before, 0.02)
    assert report.rounding[SITE].update == 0.0


@pytest.mark.parametrize("kind", ["nvfp4", "nf3", "uniform4"])
def test_other_formats_merge_too(kind: str) -> None:
    host = host_on(kind, move=0.3)
    before = packed_bits(host.backbone)
    with host.disabled():
        base = output(host, inputs(host))
    report = host.merge()
    assert report.dtype == kind and set(report.rounding) == packed_sites(host)
    with host.disabled():
        assert torch.equal(output(host, inputs(host)), base)
    host.unmerge()
    assert all(torch.equal(before[k], v) for k, v in packed_bits(host.backbone).items())


def test_undoing_by_arithmetic_is_refused() -> None:
    host = host_on()
    before = packed_bits(host.backbone)
    with pytest.raises(MergeError, match="stored as nf4"):
        Merge(host.backbone, (host.adapter("a"),), keep=False).apply()
    assert all(torch.equal(before[k], v) for k, v in packed_bits(host.backbone).items())


def test_values_that_cannot_be_quantised_leave_the_weights_as_they_were() -> None:
    host = host_on()
    before = packed_bits(host.backbone)
    host.adapter("a").flat.fill_(float("nan"))
    with pytest.raises(MergeError, match="nothing was merged|cannot be quantised"):
        host.merge()
    assert all(torch.equal(before[k], v) for k, v in packed_bits(host.backbone).items())


def test_row_norms_and_fingerprints_follow_a_merge_into_packed_weights() -> None:
    host = host_on(move=0.3)
    base = host.backbone
    finger, norm = base.fingerprint(), base.weight(SITE).row_square_norm()
    host.merge()
    assert base.fingerprint() != finger
    torch.testing.assert_close(base.weight(SITE).row_square_norm(), base.weight(SITE).matrix().square().sum(1))
    host.unmerge()
    assert base.fingerprint() == finger and torch.equal(base.weight(SITE).row_square_norm(), norm)


def test_a_merged_quantised_model_saves_packed_and_loads_to_the_same_outputs(tmp_path: Path) -> None:
    host = host_on(move=0.3)
    host.merge()
    path = save_merged(host.backbone, tmp_path / "merged")
    again = load(str(path))
    assert again.quantization is not None and again.quantization.kind == "nf4"
    assert again.fingerprint() == host.backbone.fingerprint()
    assert torch.equal(output(again, inputs(host)), output(host, inputs(host)))


def test_an_adapter_of_a_quantised_base_goes_to_the_full_one_only_when_asked(tmp_path: Path) -> None:
    host = host_on(move=0.3)
    adapter = host.adapter("a")
    host.save(tmp_path / "a", "a")
    full = Host(tiny("llama", **TINY["llama"]))
    with pytest.raises(MismatchError, match="trained beside nf4 weights") as caught:
        full.load(tmp_path / "a", "b")
    assert "--quantize nf4" in str(caught.value.hint)
    loaded = full.load(tmp_path / "a", "b", from_quantized=True)
    assert torch.equal(loaded.flat, adapter.flat)
    full.activate("b")
    adapted = output(full, inputs(full)).detach()
    report = full.merge()
    assert not report.rounding and report.dtype == "float32"
    close(output(full, inputs(full)), adapted, 1e-5)
    other = Host(tiny("llama", seed=1, **TINY["llama"]))
    with pytest.raises(MismatchError, match="was made for"):
        other.load(tmp_path / "a", "b", from_quantized=True)


def test_a_bias_alone_merges_on_a_packed_site_without_touching_its_bits() -> None:
    base = quantize_backbone(tiny("gpt2"), Quantization())
    host = Host(base)
    adapter = add(host, "a", small("bias"), head=False)
    perturb(adapter)
    host.activate("a")
    wanted = output(host, inputs(host)).detach()
    before = {n: m.packed.parts["codes"].clone() for n, m in base.module.named_modules() if hasattr(m, "packed")}
    report = host.merge()
    assert not report.rounding
    for name, codes in before.items():
        assert torch.equal(base.module.get_submodule(name).packed.parts["codes"], codes)  # type: ignore[union-attr]
    close(output(host, inputs(host)), wanted, 1e-5)
