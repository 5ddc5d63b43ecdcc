"""What is measured of an adapter, with its base and without; what looks wrong in it; how alike two are."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from lorica.adapters.analysis.anomalies import FAR, RULES, find_anomalies
from lorica.adapters.analysis.intruders import Search
from lorica.adapters.analysis.report import LIMITS, inspect_adapter
from lorica.adapters.analysis.similarity import similarities
from lorica.adapters.analysis.sites import measure_sites
from lorica.adapters.files import load_adapter
from lorica.adapters.merging.change import change_of
from lorica.adapters.outline import load_without_base
from lorica.core.errors import FormatError, MismatchError, MissingError
from lorica.engine.host import Host
from lorica.methods import all_methods, get_method, make_method
from lorica.models import load, tiny, wrap


def filled(host, method, targets=None, *, name="a", seed=0, std=0.03):
    """An adapter whose trained values are random, as if it were trained."""
    adapter = host.add(name, method, targets)
    adapter.flat.copy_(std * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(seed)))
    return adapter


@pytest.fixture
def host():
    return Host(tiny("llama"))


@pytest.mark.parametrize("name", list(all_methods()))
def test_norms_of_any_method_are_those_of_what_merging_would_add(name):
    host = Host(load("tiny-gpt2"))  # it has biases, which bias tuning needs
    small = {"rank": 4} if "rank" in get_method(name).model_fields else {}
    adapter = filled(host, make_method(name, **small))
    sites, unread = measure_sites(adapter, host.backbone)
    assert len(sites) + len(unread) == len(adapter.layout.sites)
    assert {one.reason for one in unread} <= {"changes no weight"} and bool(unread) == (name in ("prompt", "prefix"))
    for site in sites:
        change, weight = change_of(adapter, host.backbone, site.site).matrix(), host.backbone.weight(site.site).matrix()
        assert site.norm == pytest.approx(float(change.norm()), rel=1e-6, abs=1e-9)
        assert site.relative == pytest.approx(site.norm / float(weight.double().norm()), rel=1e-5)
        assert site.rms == pytest.approx(float(change.square().mean().sqrt()), rel=1e-6, abs=1e-9)
        assert site.moving <= site.rank <= min(change.shape) or site.kind == "norm"
        assert site.effective_rank <= site.moving + 1e-6
    assert sum(site.energy for site in sites) == pytest.approx(1 if any(site.norm for site in sites) else 0)


def test_a_factored_change_has_the_spectrum_of_the_dense_one_and_no_rank_above_its_own(host):
    adapter = filled(host, make_method("lora", rank=3))
    sites, _ = measure_sites(adapter, host.backbone)
    for site in sites:
        dense = torch.linalg.svdvals(change_of(adapter, host.backbone, site.site).matrix())
        assert site.factored and site.rank == site.moving == 3 == len(site.singular_values)
        assert site.singular_values == pytest.approx(dense[:3].tolist(), rel=1e-9)
        assert max(site.effective_rank, site.stable_rank, site.participation_ratio, site.k90) <= 3
        assert site.rank_use == pytest.approx(site.effective_rank / 3)


def test_groups_sum_energy_and_average_ranks(host):
    adapter = filled(host, make_method("delta"), "all")
    found = inspect_adapter(adapter, host.backbone)
    assert [group.name for group in found.layers] == ["0", "1", "-"]
    assert sum(g.energy for g in found.layers) == pytest.approx(1) == sum(g.energy for g in found.roles)
    q = next(group for group in found.roles if group.name == "q_proj")
    own = [site for site in found.sites if site.role == "q_proj"]
    assert q.effective_rank == pytest.approx(sum(s.effective_rank for s in own) / len(own))
    assert (q.sites, q.largest) == (2, max(s.relative for s in own))
    assert found.norm == pytest.approx(math.sqrt(sum(s.norm**2 for s in found.sites)))
    norms = next(group for group in found.roles if "norm" in group.name)
    assert norms.effective_rank is None and norms.norm > 0  # a vector has a size and no spectrum


WITHOUT = {"lora", "pissa", "milora", "adalora", "loftq", "lora_fa", "lora_pro", "delta"}
"""Methods whose files tell all of the change, at these targets."""
UNTOLD = {
    *("aqn", "bias", "glora", "ia3", "intrinsic", "longlora", "lora_fused"),
    *("miss", "multilora", "norm", "prefix", "prompt", "singlora", "vera"),
}
"""Methods whose files do not tell the shapes of the weights."""


@pytest.mark.parametrize("name", list(all_methods()))
def test_without_a_base_what_can_be_measured_is_the_same_and_the_rest_says_why(name, tmp_path):
    host = Host(tiny("llama", num_hidden_layers=11))
    small = {"rank": 4} if "rank" in get_method(name).model_fields else {}
    if name in ("bias", "lora_fused"):
        host = Host(tiny("gpt2", n_layer=11))  # which has what these look for
    adapter = filled(host, make_method(name, **small))
    host.save(tmp_path / name, "a")
    if name in UNTOLD:
        with pytest.raises(MissingError, match="do not tell the shapes"):
            load_without_base(tmp_path / name, "alone")
        return
    alone, outline = load_without_base(tmp_path / name, "alone")
    wanted = {site.site: site for site in measure_sites(adapter, host.backbone)[0]}
    sites, unread = measure_sites(alone, outline)
    assert {one.reason for one in unread} <= {"needs the base"}
    assert len(sites) + len(unread) == len(wanted) and (not unread or name not in WITHOUT)
    layers = [site.layer for site in sites if site.layer is not None]
    assert layers == sorted(layers)  # 10 behind 9
    for site in sites:
        other = wanted[site.site]
        assert (site.rank, site.moving, site.k90, site.shape) == (other.rank, other.moving, other.k90, other.shape)
        assert site.norm == pytest.approx(other.norm, rel=1e-5) and site.relative is None


def test_a_folder_of_peft_is_measured_without_its_base(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny("llama")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2}
    )
    model = peft.get_peft_model(base.module, config)
    for module in model.modules():
        if hasattr(module, "lora_B"):
            nn.init.normal_(module.lora_B["default"].weight)
    model.save_pretrained(str(tmp_path))
    adapter, outline = load_without_base(tmp_path, "theirs")
    found = {site.site: site for site in inspect_adapter(adapter, outline).sites}
    for name, module in model.named_modules():
        if hasattr(module, "lora_B"):
            site = found[name.removeprefix("base_model.model.")]
            assert site.norm == pytest.approx(float(module.get_delta_weight("default").detach().norm()), rel=1e-5)


def test_changes_that_depend_on_the_base_ask_for_it(host, tmp_path):
    filled(host, make_method("dora", rank=2))
    host.save(tmp_path / "d", "a")
    adapter, outline = load_without_base(tmp_path / "d", "a")
    found = inspect_adapter(adapter, outline)
    assert not found.sites and {one.reason for one in found.unread} == {"needs the base"} and found.base is None
    with pytest.raises(MissingError, match="there is no base"):
        inspect_adapter(adapter, outline, search=Search())
    host.add("p", make_method("prompt", tokens=2))
    host.save(tmp_path / "p", "p")
    with pytest.raises(MissingError, match="do not tell the shapes"):
        load_without_base(tmp_path / "p", "p")


def test_every_analysis_that_was_made_says_what_it_cannot_say(host, tmp_path):
    adapter = filled(host, make_method("lora", rank=2))
    plain = inspect_adapter(adapter, host.backbone)
    assert {limit.analysis for limit in plain.limits} == {"spectrum", "anomalies"}
    more = inspect_adapter(adapter, host.backbone, [(adapter, host.backbone)], search=Search(top=2))
    assert {limit.analysis for limit in more.limits} == set(LIMITS) - {"no base"}
    host.save(tmp_path / "a", "a")
    assert "no base" in {limit.analysis for limit in inspect_adapter(*load_without_base(tmp_path / "a", "a")).limits}
    assert json.loads(json.dumps(more.to_dict(), allow_nan=False))["intruders"]["count"] == more.intruders.count


# -- anomalies ------------------------------------------------------------------------------------------------------


def anomalies(adapter, backbone):
    return [(one.kind, one.site) for one in inspect_adapter(adapter, backbone).anomalies]


def test_a_sound_adapter_has_no_anomaly_and_an_untrained_one_no_change(host):
    assert anomalies(filled(host, make_method("lora", rank=2)), host.backbone) == []
    fresh = host.add("fresh", make_method("lora", rank=2))
    assert anomalies(fresh, host.backbone) == [("no change", site) for site in fresh.layout.sites]


def test_values_that_are_not_finite_are_reported_with_their_place_and_the_others_are_measured(host, tmp_path):
    adapter = filled(host, make_method("lora", rank=2))
    first, second, third, *_ = adapter.layout.sites
    adapter.tensors(first)["A"].data[0, :3] = math.nan
    adapter.tensors(second)["B"].data[1, 1] = -math.inf
    adapter.tensors(third)["B"].data[:] = 1e38
    adapter.tensors(third)["A"].data[:] = 1e38
    host.save(tmp_path / "a", "a")
    with pytest.raises(FormatError, match="NaN or infinity"):
        load_adapter(tmp_path / "a", host.backbone, "again")
    for source in (
        (load_adapter(tmp_path / "a", host.backbone, "again", finite=False), host.backbone),
        load_without_base(tmp_path / "a", "again"),
    ):
        found = inspect_adapter(*source)
        wrong = {one.site: one.says for one in found.anomalies if one.kind == "not finite"}
        values = adapter.tensors(first)["A"].numel()
        assert wrong[first] == f"3 NaN of {values} values of A" and "1 infinite" in wrong[second]
        assert wrong.keys() == {first, second}  # float64 holds the product of the third
        assert {site.site for site in found.sites} == adapter.layout.sites.keys() - wrong.keys()
        assert ("exploding", third) in [(one.kind, one.site) for one in found.anomalies]
        json.dumps(found.to_dict(), allow_nan=False)


def test_shared_values_that_are_not_finite_are_named_at_every_site(host):
    adapter = filled(host, make_method("vera", rank=4))
    adapter.frozen[""] = {**adapter.frozen[""], "A": torch.full_like(adapter.frozen[""]["A"], math.nan)}
    adapter._leaves.clear()
    found = inspect_adapter(adapter, host.backbone)
    assert not found.sites and all("A (shared by all sites)" in one.says for one in found.unread)


def test_a_direction_that_moves_nothing_is_dead_and_a_dense_change_has_none(host):
    adapter = filled(host, make_method("lora", rank=4))
    site = next(iter(adapter.layout.sites))
    adapter.tensors(site)["A"].data[2] = 0
    adapter.tensors(site)["A"].data[3] = adapter.tensors(site)["A"].data[0]  # the same direction twice
    (found,) = inspect_adapter(adapter, host.backbone).anomalies
    assert (found.kind, found.site, found.says) == ("dead directions", site, "2 of 4")
    low = host.add("low", make_method("delta"), [site])
    low.flat.copy_(change_of(adapter, host.backbone, site).matrix().flatten())
    assert anomalies(low, host.backbone) == []


def test_a_site_far_above_the_others_explodes_by_the_rule_that_is_stated(host):
    adapter = filled(host, make_method("lora", rank=2), ["q_proj", "k_proj", "v_proj"])
    site = list(adapter.layout.sites)[1]
    assert anomalies(adapter, host.backbone) == []
    adapter.tensors(site)["B"].data *= 3 * FAR
    found = inspect_adapter(adapter, host.backbone)
    assert ("exploding", site) in [(one.kind, one.site) for one in found.anomalies] and f"{FAR:g}" in RULES["exploding"]
    few = [one for one in found.sites if one.site == site] + [one for one in found.sites if one.site != site][:2]
    assert not [one for one in find_anomalies(few) if one.kind == "exploding"]  # three sites have no usual size


def test_a_change_larger_than_its_weight_is_told():
    layer = nn.Sequential(nn.Linear(4, 4, bias=False))
    nn.init.eye_(layer[0].weight)
    host = Host(wrap(layer))
    adapter = host.add("a", make_method("delta"))
    adapter.flat.copy_(1.5 * torch.eye(4).flatten())
    (found,) = inspect_adapter(adapter, host.backbone).anomalies
    assert (found.kind, found.says) == ("above the weight", "1.5 times the weight's norm")
    layer[0].weight.data.zero_()
    host.backbone.invalidate()
    assert inspect_adapter(adapter, host.backbone).to_dict()["sites"][0]["relative"] is None


# -- similarity -----------------------------------------------------------------------------------------------------


def test_an_adapter_is_like_itself_and_unlike_a_random_one(host):
    one = filled(host, make_method("lora", rank=3), name="one")
    two = filled(host, make_method("lora", rank=3), name="two", seed=1)
    host.backbone.invalidate()
    first, third, _ = similarities([(one, host.backbone), (one, host.backbone), (two, host.backbone)])
    assert (first.cosine, first.out, first.into) == pytest.approx((1, 1, 1)) and first.alone == 0
    assert abs(third.cosine) < 0.1 and third.out == pytest.approx(third.out_chance, abs=0.06)
    dense = [
        torch.cat([change_of(a, host.backbone, s).matrix().flatten() for s in one.layout.sites]) for a in (one, two)
    ]
    assert third.cosine == pytest.approx(float(torch.cosine_similarity(*dense, dim=0)), rel=1e-6)


def test_sites_of_one_alone_count_in_the_cosine_and_not_in_the_overlap(host):
    both = filled(host, make_method("lora", rank=2), ["q_proj", "v_proj"], name="both")
    half = filled(host, make_method("lora", rank=2), ["q_proj"], name="half")
    for site in half.layout.sites:
        for param, value in both.values(site).items():
            half.set(site, param, value)
    (found,) = similarities([(both, host.backbone), (half, host.backbone)])
    assert (found.shared, found.alone) == (2, 2) and found.out == pytest.approx(1)
    squares = [site.norm**2 for site in measure_sites(both, host.backbone)[0]]
    q = [site.norm**2 for site in measure_sites(half, host.backbone)[0]]
    assert found.cosine == pytest.approx(math.sqrt(sum(q) / sum(squares)))


def test_what_cannot_be_compared_has_no_numbers_and_other_shapes_are_refused(host, tmp_path):
    one = filled(host, make_method("lora", rank=2), ["q_proj"], name="one")
    fresh = host.add("fresh", make_method("lora", rank=2), ["q_proj"])
    (found,) = similarities([(one, host.backbone), (fresh, host.backbone)])
    assert math.isnan(found.cosine) and found.shared == 0 and found.out is None
    assert inspect_adapter(one, host.backbone, [(fresh, host.backbone)]).to_dict()["similarity"][0]["cosine"] is None
    other = Host(tiny("llama", hidden_size=32, head_dim=8, num_attention_heads=4))
    small = filled(other, make_method("lora", rank=2), ["q_proj"])
    with pytest.raises(MismatchError, match="cannot be compared"):
        similarities([(one, host.backbone), (small, other.backbone)])
