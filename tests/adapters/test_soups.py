"""LoRA-Soups of parents: their factors frozen, a weight for each at every site, and nothing else trains."""

from __future__ import annotations

import pytest
import torch

from lorica.adapters.files import load_adapter, save_adapter
from lorica.adapters.lineage import Lineage
from lorica.adapters.merging import change_of, make_merging
from lorica.adapters.merging.combine import combine
from lorica.adapters.soups import learnt_weights, soup_of
from lorica.core.errors import ConfigError, MergeError, MethodError
from lorica.engine.host import Host
from lorica.methods import make_method
from lorica.methods.lora_soups import LoRASoups
from lorica.models.factory import example_inputs
from tests.tiny import tiny


def moved(host, name, seed, method=None, targets=None):
    adapter = host.add(name, method or make_method("lora", rank=2, alpha=4.0), targets, seed=seed, dtype=torch.float64)
    adapter.flat += 0.2 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(seed)).double()
    return adapter


@pytest.fixture
def host():
    """A tiny model with adapters of other ranks, scales, sites and methods."""
    host = Host(tiny("llama", dtype=torch.float64))
    moved(host, "a", 1)
    moved(host, "b", 2, make_method("lora", rank=3, alpha=1.5))
    moved(host, "c", 3, make_method("vera", rank=5), ["q_proj", "down_proj"])
    return host


def parents(host):
    return [host.adapter(name) for name in "abc"]


def mixed(soup, values):
    for site in soup.layout.sites:
        soup.set(site, "mix", torch.tensor(values, dtype=torch.float64))
    return soup


@torch.no_grad()
def logits(host, *stack):
    with host.rows([list(stack) or None] * 2):
        return host(**example_inputs(host.backbone)).logits


def changes(adapter, host):
    return {site: change_of(adapter, host.backbone, site).matrix() for site in adapter.layout.sites}


@pytest.mark.parametrize("weighting", ["softmax", "free"])
def test_equal_logits_weigh_every_parent_one_in_n(host, weighting):
    soup = soup_of(parents(host), host.backbone, weighting=weighting)
    for weights in learnt_weights(soup).values():
        assert weights == pytest.approx((1 / 3,) * 3, abs=1e-7)
    third, _ = combine(parents(host), host.backbone, make_merging("task_arithmetic"), [1 / 3] * 3)
    for site, found in changes(soup, host).items():
        torch.testing.assert_close(found, change_of(third, host.backbone, site).matrix(), rtol=1e-6, atol=1e-7)


def test_a_gap_of_20_between_logits_selects_one_parent(host):
    soup = mixed(soup_of(parents(host), host.backbone, weighting="softmax"), [0.0, 20.0, 0.0])
    for site, found in changes(soup, host).items():
        wanted = change_of(host.adapter("b"), host.backbone, site).matrix()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7 * float(wanted.abs().max()) + 1e-8)


def test_a_free_weight_of_one_is_that_parent_and_its_scale_counts_once(host):
    soup = soup_of(parents(host), host.backbone, weighting="free")
    host.put(soup)
    for n, parent in enumerate(parents(host)):
        mixed(soup, [float(m == n) for m in range(3)])
        torch.testing.assert_close(logits(host, soup), logits(host, parent), rtol=1e-9, atol=1e-9)
    mixed(soup, [0.0] * 3)
    torch.testing.assert_close(logits(host, soup), logits(host), rtol=0, atol=1e-12)


def test_only_the_weights_train(host):
    soup = soup_of(parents(host), host.backbone)
    sites = len(soup.layout.sites)
    assert soup.layout.trainable_count() == 3 * sites
    assert {param for _, param, _ in soup.named_tensors(trainable_only=True)} == {"mix"}
    assert not any(group.decay for group in soup.layout.groups)
    host.put(soup)
    host.activate("soup")
    host(**example_inputs(host.backbone)).logits.square().sum().backward()
    assert soup.collect_grad().count_nonzero() > 2 * sites
    assert host.adapter("a")._grad is None


def test_where_a_parent_does_not_act_its_rank_is_zero(host):
    soup = soup_of(parents(host), host.backbone)
    ranks = {site.rsplit(".", 1)[-1]: method.ranks for site, method in soup.layout.methods.items()}
    assert ranks["q_proj"] == (2, 3, 5) and ranks["k_proj"] == (2, 3, 0)
    assert soup.method.ranks == (2, 3, 0)  # what most sites have


def test_what_was_learnt_is_exported_as_cat_with_weights_by_site(host):
    soup = soup_of(parents(host), host.backbone, spread=1.0, seed=4)
    assert len(set(learnt_weights(soup).values())) == len(soup.layout.sites)
    made, report = combine(parents(host), host.backbone, make_merging("cat"), learnt_weights(soup))
    assert report.weights is None
    for site, found in changes(soup, host).items():
        torch.testing.assert_close(change_of(made, host.backbone, site).matrix(), found, rtol=1e-6, atol=1e-7)


def test_the_spread_is_drawn_from_the_seed_site_by_site(host):
    one, two, other = (soup_of(parents(host), host.backbone, spread=1.0, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(one.flat, two.flat) and not torch.equal(one.flat, other.flat)
    assert 0.3 < float(one.flat.std()) < 1.7


def test_a_soup_survives_its_folder_and_knows_its_parents(host, tmp_path):
    for name in "ab":
        save_adapter(host.adapter(name), host.backbone, tmp_path / name)
    soup = soup_of(parents(host)[:2], host.backbone, spread=0.5)
    save_adapter(soup, host.backbone, tmp_path / "soup")
    again = load_adapter(tmp_path / "soup", host.backbone, "again")
    assert torch.equal(again.flat, soup.flat) and again.layout.key == soup.layout.key
    for site in soup.layout.sites:
        assert torch.equal(again.values(site)["A"], soup.values(site)["A"])
    lineage = Lineage.from_meta(again.meta)
    assert [(p.relation, p.method, p.weight) for p in lineage.parents] == [("merged-from", "lora", None)] * 2
    assert all(p.sha256 for p in lineage.parents) and lineage.how == "lora_soups"
    assert lineage.settings == {"weighting": "free", "spread": 0.5}


def test_what_holds_no_factors_is_one_sentence(host):
    with pytest.raises(MergeError, match="'ia3' adapter 'dense' changes it densely at site"):
        soup_of([*parents(host), moved(host, "dense", 7, make_method("ia3"))], host.backbone)
    biased = moved(host, "biased", 8, make_method("lora", rank=2, lora_bias=True))
    with pytest.raises(MergeError, match="'lora' adapter 'biased' changes its bias at site"):
        soup_of([biased], host.backbone)
    with pytest.raises(MergeError, match="virtual tokens"):
        soup_of([moved(host, "prompt", 9, make_method("prompt", tokens=2))], host.backbone)
    with pytest.raises(MergeError, match="no adapter"):
        soup_of([], host.backbone)
    with pytest.raises(MethodError, match="'a' is of method 'lora', which has no weights of parents"):
        learnt_weights(host.adapter("a"))


@pytest.mark.parametrize("ranks", [(), (0, 0), (2, -1)])
def test_ranks_that_are_none_are_refused(ranks):
    with pytest.raises(ConfigError, match="ranks is"):
        LoRASoups(ranks=ranks)
