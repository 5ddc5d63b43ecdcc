"""Every adapter of weights as a plain LoRA: the same logits, or a sentence that says what no LoRA can hold."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given as forall
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from lorica.adapters.export import as_lora, export_lora
from lorica.adapters.export.decompose import factor
from lorica.adapters.files import save_adapter
from lorica.core.errors import ConfigError, FormatError, MethodError
from lorica.core.update import LinearUpdate, LowRank
from lorica.engine.host import Host
from lorica.methods.lora import LoRA
from tests.contract.cases import (
    CASES,
    MORE,
    Case,
    add,
    attached,
    backbone,
    bits,
    cases,
    close,
    inputs,
    output,
    perturb,
    places,
    small,
    snapshot,
    unchanged,
)

REFUSED = frozenset({"prompt", "prefix", "norm", "aqn"})
SHOWN = [
    case
    for case in CASES + MORE
    if case.method not in REFUSED and case.family in ("llama", "qwen3-moe", "gpt2", "gemma", "bert", "conv")
]


def linear_host(case: Case, dtype: torch.dtype = torch.float64) -> Host:
    """A host whose active adapter `a` acts at every site that both its method and LoRA can."""
    host = Host(backbone(case.family, dtype))
    method = case.make()
    names = [n for n in places(host.backbone, method) if host.backbone.sites[n].kind in LoRA.kinds]
    perturb(host.add("a", method, names, dtype=torch.promote_types(dtype, torch.float32)))
    host.activate("a")
    return host


@cases(SHOWN)
def test_an_export_is_a_plain_lora_with_the_same_logits(case: Case) -> None:
    host = linear_host(case)
    before, given = snapshot(host.backbone), inputs(host)
    y = output(host, given)
    exported, report = export_lora(host.adapter("a"), host.backbone)
    assert all(type(m) is LoRA for m in exported.layout.methods.values())
    exported.name = "plain"
    host.put(exported)
    host.activate("plain")
    close(output(host, given), y, 1e-6)
    unchanged(host.backbone, before)
    assert report.method == case.method
    assert report.sites == len(exported.layout.sites)
    assert report.parameters == exported.layout.size
    assert report.lost < 1e-12 and report.relative < 1e-6
    assert "nothing was cut" in str(report)


@pytest.mark.parametrize("method", ["lora", "pissa", "vera"])
def test_products_of_factors_keep_their_rank(method: str) -> None:
    host = linear_host(Case("llama", method))
    exported = as_lora(host.adapter("a"), host.backbone)
    most = {"lora": 3, "pissa": 6, "vera": 3}[method]
    assert {m.rank for m in exported.layout.methods.values() if isinstance(m, LoRA)} == {most}


def test_a_plain_lora_is_copied_bit_for_bit_and_shares_nothing() -> None:
    host = linear_host(Case("llama", "lora", (("rslora", True),)), torch.float32)
    adapter = host.adapter("a")
    exported = as_lora(adapter, host.backbone, rank=3)
    assert exported.layout.key == adapter.layout.key
    assert torch.equal(bits(exported.flat), bits(adapter.flat))
    exported.flat.zero_()
    assert bool(adapter.flat.any())


@pytest.mark.parametrize("method", ["lora", "dora", "delta", "ia3", "pissa"])
def test_a_cut_to_a_rank_is_the_nearest_matrix_of_that_rank(method: str) -> None:
    host = linear_host(Case("llama", method))
    adapter = host.adapter("a")
    exported, report = export_lora(adapter, host.backbone, rank=2)
    worst = 0.0
    for name in adapter.layout.sites:
        frozen = host.backbone.weight(name)
        weight = frozen.matrix()
        changes: list[Tensor] = []
        for one in (adapter, exported):
            update = one.update(name, frozen)
            assert isinstance(update, LinearUpdate)
            changes.append((update.effective(weight) - weight).detach())
        sigma = torch.linalg.svdvals(changes[0])
        assert torch.linalg.matrix_rank(changes[1], rtol=1e-6) <= 2
        error = torch.linalg.norm(changes[0] - changes[1]).square()
        torch.testing.assert_close(error, sigma[2:].square().sum(), rtol=1e-5, atol=1e-9)
        worst = max(worst, float(sigma[2:].square().sum() / sigma.square().sum()))
    assert math.isclose(report.lost, worst, rel_tol=1e-6)
    assert f"{worst:.1%} of a site's change was cut away" in str(report)


def test_a_change_of_a_bias_becomes_a_lora_bias() -> None:
    host = linear_host(Case("gpt2", "bias"))
    exported = as_lora(host.adapter("a"), host.backbone)
    assert isinstance(exported.method, LoRA) and exported.method.lora_bias
    without = as_lora(linear_host(Case("llama", "ia3")).adapter("a"), backbone("llama"))
    assert isinstance(without.method, LoRA) and not without.method.lora_bias


@pytest.mark.parametrize(
    ("family", "method", "words"),
    [
        ("llama", "prompt", "'prompt' adapter 'a' adds virtual tokens at site 'input'"),
        ("llama", "prefix", "'prefix' adapter 'a' adds keys and values at site 'model.layers.0.self_attn'"),
        ("llama", "norm", "'norm' adapter 'a' changes a norm at site 'model.layers.0.input_layernorm'"),
        ("gpt2", "bias", "'bias' adapter 'a' changes a norm"),
    ],
)
def test_what_no_lora_can_hold_is_refused_by_name_and_site(family: str, method: str, words: str) -> None:
    host = attached(Case(family, method))
    with pytest.raises(MethodError, match=words):
        as_lora(host.adapter("a"), host.backbone)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"rank": 0}, "at least 1"), ({"tolerance": -0.1}, "from 0 to below 1"), ({"tolerance": 1.0}, "from 0")],
)
def test_a_rank_or_tolerance_out_of_range_is_refused(changes: dict[str, float], words: str) -> None:
    host = attached(Case("mlp", "lora"))
    with pytest.raises(ConfigError, match=words):
        as_lora(host.adapter("a"), host.backbone, **changes)  # type: ignore[arg-type]


def test_values_that_are_not_finite_are_refused() -> None:
    host = attached(Case("mlp", "ia3"))
    host.adapter("a").flat[0] = math.inf
    with pytest.raises(FormatError, match="not finite"):
        as_lora(host.adapter("a"), host.backbone)


def test_an_adapter_that_changes_nothing_exports_to_rank_one_zeros() -> None:
    host = Host(backbone("llama", torch.float32))
    add(host, "a", small("ia3"), move=0.0)
    exported, report = export_lora(host.adapter("a"), host.backbone)
    assert (report.lowest, report.highest, report.lost, report.difference) == (1, 1, 0.0, 0.0)
    assert not exported.flat.any()


@pytest.mark.parametrize("method", ["dora", "ia3", "vera", "pissa"])
def test_an_export_survives_files_and_another_base_in_float32(method: str, tmp_path: Path) -> None:
    host = linear_host(Case("llama", method), torch.float32)
    given = inputs(host)
    y = output(host, given)
    folder = save_adapter(as_lora(host.adapter("a"), host.backbone), host.backbone, tmp_path / "plain")
    other = Host(backbone("llama", torch.float32))
    other.load(folder, "again")
    other.activate("again")
    close(output(other, given), y, 1e-4)


@settings(max_examples=40, deadline=None)
@forall(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    scaled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_factors_give_the_change_whatever_the_shapes(
    rows: int, columns: int, ranks: list[int], scaled: bool, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=rng)

    pairs = tuple(LowRank(draw(r, columns), draw(rows, r), 0.5, draw(r)) for r in ranks)
    weight, update = draw(rows, columns), LinearUpdate(factors=pairs, out_scale_O=draw(rows) if scaled else None)
    change = update.effective(weight) - weight
    found = factor(weight, update, None, 1e-12)
    assert found.rank <= min(rows, columns)
    close(found.B_OR @ found.A_RI, change, 1e-9)
    assert found.lost < 1e-20


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", "dora"), ("llama", "ia3"), ("llama", "vera"), ("gpt2", "pissa"), ("gpt2", "ia3"), ("llama", "delta")],
)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_reads_an_export_with_the_same_logits(family: str, method: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    host = Host(backbone(family, torch.float32))
    perturb(host.add("a", small(method), None if method == "ia3" else "all-linear"))
    host.activate("a")
    given = inputs(host)
    y = output(host, given)
    exported = as_lora(host.adapter("a"), host.backbone)
    folder = save_adapter(exported, host.backbone, tmp_path / "plain")
    theirs = peft.PeftModel.from_pretrained(backbone(family, torch.float32).module, str(folder)).eval()
    close(theirs(**given).logits, y, 1e-4)
