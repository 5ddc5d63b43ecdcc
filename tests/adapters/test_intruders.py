"""Intruder dimensions: the golden table, invariances, the cache of base vectors, scaling, PEFT's helper."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lorica.adapters.analysis.bases import Bases
from lorica.adapters.analysis.intruders import Search, find_intruders, leading
from lorica.adapters.analysis.rescale import rescale_intruders
from lorica.adapters.merging.change import change_of
from lorica.core.errors import ConfigError, FormatError, MethodError, StorageError
from lorica.engine.host import Host
from lorica.methods import make_method
from lorica.models import tiny, wrap

BASE = torch.diag(torch.arange(16, 0, -1).double())
UV = torch.full((16, 16), 1 / 16, dtype=torch.float64)
"""u vᵀ with u = v = 1/4 in every entry."""


def matrix(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(size, seed):
    return torch.linalg.qr(matrix(size, size, seed=seed)).Q


def vectors(weight):
    return torch.linalg.svd(weight, full_matrices=False)[0]


def count(base, tuned, threshold=0.5, top=10):
    return len(leading(vectors(base), tuned, top).intruders(threshold))


@pytest.mark.parametrize(
    ("c", "intruders", "nearest"),
    [(1, 0, 0.9957), (5, 0, 0.7714), (10, 1, 0.4972), (20, 1, 0.3594), (50, 1, 0.2900), (1000, 1, 0.2519)],
)
def test_a_planted_direction_is_an_intruder_from_the_golden_size_on(c, intruders, nearest):
    seen = leading(vectors(BASE), BASE + c * UV)
    assert len(seen.intruders(0.5)) == intruders
    assert float(seen.cosine_K[0]) == pytest.approx(nearest, abs=5e-5)


@pytest.mark.parametrize("factor", [1e-3, 0.7, 50.0])
def test_a_base_that_is_only_scaled_has_no_intruder(factor):
    assert count(BASE, factor * BASE, threshold=0.99) == 0


@given(st.integers(0, 999))
@settings(max_examples=20)
def test_the_count_bears_orthogonal_maps_on_either_side(seed):
    tuned = BASE + 20 * UV + 0.3 * matrix(16, 16, seed=seed)
    Q, R = orthogonal(16, seed), orthogonal(16, seed + 1)
    for threshold in (0.4, 0.6):
        near = (leading(vectors(BASE), tuned).cosine_K - threshold).abs().min() < 1e-6
        assert near or count(Q @ BASE, Q @ tuned, threshold) == count(BASE, tuned, threshold)
        assert near or count(BASE @ R, tuned @ R, threshold) == count(BASE, tuned, threshold)


def test_small_dense_noise_brings_no_intruder():
    for seed in range(10):
        assert count(BASE, BASE + 0.02 * matrix(16, 16, seed=seed)) == 0


@given(st.integers(0, 999), st.integers(1, 20))
@settings(max_examples=20)
def test_the_count_never_falls_with_the_threshold_and_is_at_most_the_top(seed, top):
    tuned = matrix(12, 9, seed=seed)
    counts = [count(matrix(12, 9, seed=seed + 1), tuned, t / 10, top) for t in range(1, 11)]
    assert counts == sorted(counts) and counts[-1] <= min(top, 9)


def test_signs_of_singular_vectors_do_not_count():
    assert len(leading(-vectors(BASE), BASE + 5 * UV).intruders(0.5)) == 0


def test_a_base_with_other_outputs_is_refused():
    with pytest.raises(MethodError, match="16 outputs and the tuned weight 12"):
        leading(vectors(BASE), matrix(12, 16))


@pytest.fixture
def planted():
    """A linear layer with the golden base, and a LoRA that adds 1000 u vᵀ."""
    layer = nn.Sequential(nn.Linear(16, 16, bias=False)).double()
    with torch.no_grad():
        layer[0].weight.copy_(BASE)
    host = Host(wrap(layer))
    adapter = host.add("a", make_method("lora", rank=1, alpha=2), dtype=torch.float64)
    adapter.set("0", "A", torch.full((1, 16), 1 / 4))
    adapter.set("0", "B", torch.full((16, 1), 1000 / 8))  # s = 2
    return host, adapter


def tuned(adapter, backbone, site="0"):
    return backbone.weight(site).matrix().double() + change_of(adapter, backbone, site).matrix()


@pytest.mark.parametrize(("factor", "top"), [(0.75, 756.3909), (1.25, 1260.6516), (0.0, 15.7385), (1.0, 1008.5212)])
def test_scaling_moves_the_leading_singular_value_to_the_golden_one(planted, factor, top):
    host, adapter = planted
    made, report = rescale_intruders(adapter, host.backbone, factor, exact=True)
    found = torch.linalg.svdvals(tuned(made, host.backbone))
    assert float(found[0]) == pytest.approx(top, abs=5e-5)
    assert (report.scaled, report.weights, report.of) == (1, 1, 1)


def test_a_factor_of_1_is_the_identity_and_a_site_without_intruders_keeps_its_change(planted):
    host, adapter = planted
    made, report = rescale_intruders(adapter, host.backbone, 1.0)
    assert torch.allclose(tuned(made, host.backbone), tuned(adapter, host.backbone), atol=1e-10)
    adapter.set("0", "B", torch.full((16, 1), 1 / 8))
    made, report = rescale_intruders(adapter, host.backbone, 0.0)
    assert report.scaled == 0 and "no intruders in 1 weights" in str(report)
    assert torch.equal(tuned(made, host.backbone), tuned(adapter, host.backbone))


def test_cutting_to_the_rank_of_the_adapter_says_what_it_loses(planted):
    host, adapter = planted
    adapter.set("0", "B", torch.full((16, 1), 20 / 8))
    made, report = rescale_intruders(adapter, host.backbone, 0.5)
    exact, _ = rescale_intruders(adapter, host.backbone, 0.5, exact=True)
    assert made.layout.methods["0"].rank == 1 and exact.layout.methods["0"].rank == 2
    whole, kept = (change_of(one, host.backbone, "0").matrix() for one in (exact, made))
    lost = float((whole - kept).square().sum() / whole.square().sum())
    assert report.lost == pytest.approx(lost, rel=1e-6) and 0.001 < lost < 0.5
    assert f"lost up to {lost:.2%}" in str(report) and report.worst == "0"
    assert made.meta["intruders"] == {"scaled_by": 0.5, "top": 10, "threshold": 0.5}


def test_full_fine_tuning_is_scaled_densely_and_exactly(planted):
    host, adapter = planted
    full = host.add("full", make_method("delta"), dtype=torch.float64)
    full.set("0", "delta", change_of(adapter, host.backbone, "0").matrix())
    made, report = rescale_intruders(full, host.backbone, 0.75)
    exact, _ = rescale_intruders(adapter, host.backbone, 0.75, exact=True)
    assert made.method.name == "delta" and report.lost == 0
    assert torch.allclose(tuned(made, host.backbone), tuned(exact, host.backbone), atol=1e-9)
    cut, _ = rescale_intruders(full, host.backbone, 0.75, rank=1)
    assert cut.method.name == "lora" and cut.method.rank == 1


def test_wrong_settings_and_adapters_are_one_sentence(planted):
    host, adapter = planted
    for words, more in (("scaled by -1", {"factor": -1}), ("scaled by inf", {"factor": float("inf")}),
                        ("rank is 0", {"rank": 0}), ("cut to no rank", {"rank": 1, "exact": True})):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            rescale_intruders(adapter, host.backbone, **more)
    for wrong in ({"top": 0}, {"threshold": 0.0}, {"threshold": 1.1}):
        with pytest.raises(ConfigError, match="Search"):
            Search(**wrong)
    adapter.set("0", "A", torch.full((1, 16), float("nan")))
    with pytest.raises(FormatError, match=r"not finite, at site '0': 16 NaN of 16 values of A"):
        rescale_intruders(adapter, host.backbone)
    assert [one.site for one in find_intruders(adapter, host.backbone).unread] == ["0"]
    llama = Host(tiny("llama"))
    prompt = llama.add("p", make_method("prompt", tokens=2))
    with pytest.raises(MethodError, match="it adds virtual tokens"):
        rescale_intruders(prompt, llama.backbone)


def test_base_vectors_are_kept_on_the_disk_for_this_weight_alone(planted, tmp_path):
    host, adapter = planted
    first = Bases(tmp_path)
    found = find_intruders(adapter, host.backbone, bases=first)
    again = Bases(tmp_path)
    assert find_intruders(adapter, host.backbone, bases=again) == found
    assert (first.computed, again.computed) == (1, 0)
    (file,) = (tmp_path / host.backbone.fingerprint()).iterdir()
    for damage in (b"", file.read_bytes()[:100]):
        file.write_bytes(damage)
        assert find_intruders(adapter, host.backbone, bases=again) == found
    assert again.computed == 2
    # another weight, under the same fingerprint and name
    host.model[0].weight.data[15, 15] += 1e-9
    find_intruders(adapter, host.backbone, bases=again)
    assert again.computed == 3 and len(list(file.parent.iterdir())) == 2
    kept = Bases(keep=True)
    assert find_intruders(adapter, host.backbone, bases=kept) == find_intruders(adapter, host.backbone, bases=kept)
    assert kept.computed == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot write"):
        find_intruders(adapter, host.backbone, bases=Bases(tmp_path / "file"))


def test_counts_are_grouped_by_layer_and_role_and_move_with_the_threshold():
    host = Host(tiny("llama"))
    adapter = host.add("a", make_method("lora", rank=2))
    adapter.flat.copy_(0.3 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(0)))
    found = find_intruders(adapter, host.backbone, Search(top=4))
    assert found.count == sum(found.by_layer().values()) == sum(found.by_role().values()) > 0
    assert found.by_layer().keys() == {"0", "1"} and found.by_role().keys() >= {"q_proj", "down_proj"}
    assert found.count == found.at(0.5) <= found.at(0.8) <= 4 * len(found.sites) == found.at(1.1)
    assert all(len(site.cosines) == 4 and max(site.cosines) <= 1 + 1e-6 for site in found.sites)


def test_embeddings_and_norms_are_not_looked_at_and_keep_their_change():
    host = Host(tiny("llama"))
    adapter = host.add("a", make_method("delta"), "all")
    adapter.flat.copy_(torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(0)))
    found = find_intruders(adapter, host.backbone)
    assert not any("norm" in site.site or "embed" in site.site for site in found.sites)
    made, _ = rescale_intruders(adapter, host.backbone, 0.5)
    assert torch.equal(made.values("model.norm")["delta"], adapter.values("model.norm")["delta"])


@pytest.mark.parametrize("factor", [0.75, 0.0, 1.3])
def test_peft_scales_the_same_intruders_by_the_same_factor(factor):
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    torch.manual_seed(0)
    base = tiny("llama")
    model = peft.get_peft_model(
        tiny("llama").module, peft.LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "down_proj"])
    )
    host = Host(base)
    adapter = host.add("a", make_method("lora", rank=3, alpha=12), ["q_proj", "down_proj"])
    for name, module in model.named_modules():
        if hasattr(module, "lora_B"):
            with torch.no_grad():
                module.lora_B["default"].weight.normal_(std=0.3)
            site = name.removeprefix("base_model.model.")
            adapter.set(site, "A", module.lora_A["default"].weight)
            adapter.set(site, "B", module.lora_B["default"].weight)
    said: list[str] = []
    reduce_intruder_dimension(model, top_k=6, threshold_epsilon=0.6, mitigation_lambda=factor, logging_sink=said.append)
    search = Search(top=6, threshold=0.6)
    found = {one.site: len(one.which) for one in find_intruders(adapter, host.backbone, search).sites}
    theirs = {
        line.partition(":")[0].removeprefix("base_model.model."): int(line.rpartition(":")[2])
        if "Intruders" in line
        else 0
        for line in said
        if ":" in line
    }
    assert found == theirs and sum(found.values()) > 0
    made, _ = rescale_intruders(adapter, host.backbone, factor, search)
    for name, module in model.named_modules():
        if hasattr(module, "lora_B"):
            site = name.removeprefix("base_model.model.")
            ours = change_of(made, host.backbone, site).matrix()
            wanted = module.get_delta_weight("intruder_reduced").detach().double()
            assert torch.allclose(ours, wanted, atol=2e-5 * float(wanted.abs().max())), site


def test_kernels_are_looked_at_as_matrices_and_scaled_in_their_shape():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(20, 6), nn.Conv2d(4, 6, 3, groups=2), nn.Linear(6, 8)).double()
    host = Host(wrap(module))
    adapter = host.add("a", make_method("lora", rank=2), ["0", "1", "2"], dtype=torch.float64)
    adapter.flat.copy_(matrix(*adapter.flat.shape))
    search = Search(top=3, threshold=0.8)
    found = find_intruders(adapter, host.backbone, search)
    assert [site.site for site in found.sites] == ["1", "2"] and found.count > 0
    made, report = rescale_intruders(adapter, host.backbone, 0.0, search, exact=True)
    for site in found.sites:
        base = host.backbone.weight(site.site).matrix().flatten(1)
        before, after = (base + change_of(one, host.backbone, site.site).matrix() for one in (adapter, made))
        U, S, V = torch.linalg.svd(before, full_matrices=False)
        which = list(site.which)
        assert torch.allclose(after, before - (U[:, which] * S[which]) @ V[which], atol=1e-9)
    assert torch.equal(change_of(made, host.backbone, "0").matrix(), change_of(adapter, host.backbone, "0").matrix())
    assert report.of == 2
