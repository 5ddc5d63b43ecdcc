"""Combining adapters: any rule on any mixture of methods, kept and loaded again; what cannot be, in a sentence."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from lorica.adapters.adapter import Adapter
from lorica.adapters.lineage import Parent
from lorica.adapters.merging import Change, Merging, all_mergings, change_of, make_merging
from lorica.adapters.merging.combine import CombineReport, combine
from lorica.adapters.parents import lineage_of
from lorica.core.errors import ConfigError, FormatError, LoricaError, MergeError, MethodError, MismatchError
from lorica.core.site import Site
from lorica.engine.host import Host
from lorica.methods import all_methods
from lorica.models import wrap
from tests.contract.cases import (
    CASES,
    FORMS,
    add,
    backbone,
    close,
    holds_weights,
    inputs,
    output,
    perturb,
    places,
    small,
)

RULES = sorted(all_mergings())
METHODS = [name for name, cls in all_methods().items() if not cls.kinds <= {"input", "attention"}]
ALL_METHODS = [name if name in FORMS else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
MIXTURES = [("lora", "lora"), ("lora", "dora", "vera"), ("ia3", "delta"), ("pissa", "lora"), ("norm", "bias", "lora")]
FACTORED = ("linear", "soup", "lorahub", "robustmerge", "cat")


def neutral(name: str, **more: Any) -> Merging:
    """The rule with the parameters that leave a single parent as it is."""
    fields = all_mergings()[name].model_fields
    values = {"density": 1.0, "keep": 1.0, "scale": 1.0, **more}
    return make_merging(name, **{key: value for key, value in values.items() if key in fields})


def host_with(*methods: str, family: str = "llama") -> Host:
    """A host with adapters of these methods, moved off their initial values, wherever they can be folded."""
    host = Host(backbone(family))
    for place, name in enumerate(methods):
        method = small(name)
        sites = [site for site in places(host.backbone, method, head=False) if not host.backbone.sites[site].tied]
        perturb(host.add(f"{name}{place}", method, sites, seed=place + 1, dtype=torch.float64), seed=place + 1)
    return host


def attempt(parents: list[Adapter], host: Host, rule: Merging) -> tuple[Adapter, CombineReport] | LoricaError:
    """What `combine` gives, or what it raises."""
    try:
        return combine(parents, host.backbone, rule)
    except LoricaError as error:
        return error


def adapters(host: Host) -> list[Adapter]:
    return list(host.adapters.values())


def same_changes(host: Host, one: Adapter, other: Adapter, tolerance: float = 1e-9) -> None:
    """Every site's ΔW and Δb are equal."""
    for site in host.backbone.sites:
        found, wanted = change_of(one, host.backbone, site), change_of(other, host.backbone, site)
        if wanted is None or (wanted.factored and not wanted.rank and wanted.bias_O is None):
            assert found is None or not found.matrix().any()
            continue
        assert found is not None, site
        close(found.dense(), wanted.dense(), tolerance)
        assert (found.bias_O is None) == (wanted.bias_O is None)
        if found.bias_O is not None and wanted.bias_O is not None:
            close(found.bias_O, wanted.bias_O, tolerance)


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("rule", RULES)
def test_one_parent_with_weight_one_is_itself_or_is_refused_with_a_sentence(
    rule: str, method: str, tmp_path: Path
) -> None:
    host = host_with(method, family=next(case.family for case in CASES if case.method == method))
    (parent,) = adapters(host)
    found = attempt([parent], host, neutral(rule, rank=64))
    if isinstance(found, LoricaError):
        assert rule in FACTORED and "densely" in found.message and found.hint
        return
    made, report = found
    same_changes(host, made, parent, 1e-7 if rule in ("svd", "knots") else 1e-9)
    assert report.sites == len(made.layout.sites) and report.parameters == made.layout.trainable_count()
    host.put(made)
    again = host.load(host.save(tmp_path / "made", made), "again")
    assert torch.equal(again.flat, made.flat) and again.layout.key == made.layout.key


@pytest.mark.parametrize("methods", MIXTURES, ids="-".join)
@pytest.mark.parametrize("rule", RULES)
def test_any_mixture_is_combined_or_refused_with_a_sentence(
    rule: str, methods: tuple[str, ...], tmp_path: Path
) -> None:
    host = host_with(*methods, family="gpt2" if "bias" in methods else "llama")
    parents = adapters(host)
    before = [parent.flat.clone() for parent in parents]
    found = attempt(parents, host, make_merging(rule, **({"rank": 3} if rule == "svd" else {})))
    if isinstance(found, LoricaError):
        assert isinstance(found, MergeError) and rule in found.message and found.hint
        return
    made, report = found
    assert all(torch.equal(a.flat, b) for a, b in zip(parents, before, strict=True))
    assert torch.isfinite(made.flat).all() and str(report).startswith(f"{len(parents)} adapters by {rule}: ")
    host.put(made)
    host.load(host.save(tmp_path / "made", made), "again")
    host.activate("again")
    y = output(host, inputs(host))
    host.merge()
    close(output(host, inputs(host)), y, 1e-9)


@pytest.mark.parametrize("family", ["gpt2", "qwen3-moe", "conv"])
@pytest.mark.parametrize("rule", RULES)
def test_every_kind_of_site_is_combined(rule: str, family: str) -> None:
    host = host_with("lora", "lora", family=family)
    made, _ = combine(adapters(host), host.backbone, neutral(rule))
    assert set(made.layout.sites) == set(adapters(host)[0].layout.sites)
    if rule in ("cat", "task_arithmetic"):
        for site in made.layout.sites:
            parts = [change_of(parent, host.backbone, site) for parent in adapters(host)[:2]]
            found = change_of(made, host.backbone, site)
            assert found is not None
            close(found.dense(), sum(part.dense() for part in parts if part is not None), 1e-9)


def test_the_sum_of_disjoint_adapters_acts_as_both() -> None:
    host = Host(backbone("llama"))
    for name, site in (("q", "q_proj"), ("v", "v_proj")):
        adapter = host.add(name, small("lora"), site, dtype=torch.float64)
        adapter.flat.normal_(generator=torch.Generator().manual_seed(len(name)))
    host.activate("q", "v")
    y, parents = output(host, inputs(host)), adapters(host)
    for rule in ("cat", "task_arithmetic", "linear", "lorahub", "dare", "ties", "knots", "magnitude_prune"):
        host.put(combine(parents, host.backbone, neutral(rule), name=rule)[0])
        host.activate(rule)
        close(output(host, inputs(host)), y, 1e-8)


def test_a_rank_cuts_and_the_report_says_what_was_lost() -> None:
    host = host_with("lora", "lora")
    parents = adapters(host)
    made, report = combine(parents, host.backbone, make_merging("task_arithmetic"), rank=2)
    assert (report.lowest, report.highest, report.factored) == (2, 2, len(made.layout.sites))
    change = combine(parents, host.backbone, make_merging("task_arithmetic"))[0]
    values = (
        torch.linalg.svdvals(wanted.matrix()) if (wanted := change_of(change, host.backbone, report.worst)) else None
    )
    assert values is not None
    assert report.lost == pytest.approx(float(values[2:].square().sum() / values.square().sum()))
    assert f"up to {report.lost:.1%} of a site's change was cut away (at {report.worst})" in str(report)
    exact = combine(parents, host.backbone, make_merging("ties", density=0.5), rank=64)[1]
    assert exact.lost < 1e-12 and "cut away" not in str(exact)


def test_factors_of_more_ranks_than_a_site_has_are_kept_exactly_at_its_own() -> None:
    host = Host(wrap(nn.Sequential(nn.Linear(3, 4, dtype=torch.float64))))
    for name in ("a", "b"):
        adapter = host.add(name, small("lora"), "0", dtype=torch.float64)
        adapter.flat.normal_(generator=torch.Generator().manual_seed(ord(name)))
    made, report = combine(adapters(host), host.backbone, make_merging("cat"))
    assert report.highest == 3 and report.lost < 1e-20
    parts = [change_of(parent, host.backbone, "0") for parent in adapters(host)]
    found = change_of(made, host.backbone, "0")
    assert found is not None
    close(found.matrix(), sum(part.matrix() for part in parts if part is not None), 1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_the_order_in_which_an_adapter_lists_its_sites_changes_nothing(rule: str) -> None:
    """RobustMerge's published code took B's coefficients from whichever A came before it."""
    host = host_with("lora", "lora")
    parents = adapters(host)
    turned = []
    for parent in parents:
        picked = {n: (s, parent.layout.methods[n]) for n, s in reversed(parent.layout.sites.items())}
        other = Adapter(parent.name, type(parent.layout)(parent.method, picked), base=parent.base, dtype=torch.float64)
        for site, param, value in parent.named_tensors():
            other.set(site, param, value)
        turned.append(other)
    rule_ = make_merging(rule)
    one, other = combine(parents, host.backbone, rule_)[0], combine(turned, host.backbone, rule_)[0]
    assert list(one.layout.sites) == list(other.layout.sites) and torch.equal(one.flat, other.flat)


class Spy(Merging):
    """A sum that remembers which changes are alive when it is called."""

    name: ClassVar[str] = "spy"
    summary: ClassVar[str] = "a sum that watches"
    alive: ClassVar[list[int]] = []
    seen: ClassVar[list[weakref.ref[Change]]] = []

    def survey(self, sites: Any) -> None:
        for item in sites:
            self._watch(item.changes)

    def _watch(self, changes: Sequence[Change]) -> None:
        Spy.alive.append(sum(ref() is not None for ref in Spy.seen))
        Spy.seen += [weakref.ref(change) for change in changes]

    def merge(self, site: Site, changes: Sequence[Change], weights: Sequence[float], survey: Any = None) -> Change:
        self._watch(changes)
        return Change.of_dense(site.shape, sum(change.matrix() for change in changes))  # type: ignore[arg-type]


def test_thousands_of_layers_are_streamed_one_at_a_time() -> None:
    host = Host(wrap(nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(2000)))))
    for name in ("a", "b"):
        host.add(name, small("lora", rank=1), "all-linear").flat.fill_(0.1)
    Spy.alive, Spy.seen = [], []
    made, _ = combine(adapters(host), host.backbone, Spy())
    assert len(made.layout.sites) == 2000 and len(Spy.alive) == 4000
    assert max(Spy.alive) <= 4  # the parents' changes of one site, and of the one before while it is handed over


def test_what_the_parents_are_stands_in_the_lineage(tmp_path: Path) -> None:
    host = host_with("lora", "lora")
    parents = adapters(host)
    host.save(tmp_path / "first", parents[0])
    made, _ = combine(parents, host.backbone, make_merging("ties", density=0.3), [0.5, 2.0], rank=3)
    lineage = lineage_of(made)
    assert lineage.how == "ties" and lineage.settings["density"] == 0.3 and lineage.settings["rank"] == 3
    saved, unsaved = lineage.parents
    assert (saved.relation, saved.path, saved.weight) == ("merged-from", str(tmp_path / "first"), 0.5)
    assert saved.method == "lora" and len(saved.sha256) == 64 and saved.base == host.backbone.fingerprint()
    assert (unsaved.path, unsaved.sha256, unsaved.weight) == ("", "", 2.0)
    parents[0].flat.add_(1)  # trained on: the folder is no longer what was merged
    assert lineage_of(combine(parents, host.backbone, make_merging("cat"))[0]).parents[0].path == ""
    origins = [Parent("merged-from", f"tinker://{n}", "0" * 64, "lora") for n in "ab"]
    known = combine(parents, host.backbone, make_merging("cat"), origins=origins)[0]
    assert [parent.path for parent in lineage_of(known).parents] == ["tinker://a", "tinker://b"]


def test_adapters_that_were_trained_on_top_of_others_need_these(tmp_path: Path) -> None:
    host = host_with("lora")
    (below,) = adapters(host)
    host.save(tmp_path / "below", below)
    above = host.add("above", small("lora"), dtype=torch.float64, on=below.name)
    alone = host.add("alone", small("lora"), dtype=torch.float64)
    rule = make_merging("task_arithmetic")
    with pytest.raises(MergeError, match="'above' was trained on top of .*below, and 'alone' was not"):
        combine([alone, above], host.backbone, rule)
    both = lineage_of(combine([below, above], host.backbone, rule)[0])
    assert [parent.relation for parent in both.parents] == ["merged-from", "merged-from"]
    one = lineage_of(combine([above], host.backbone, rule)[0])
    assert [parent.relation for parent in one.parents] == ["stacked-on", "merged-from"]


def test_weights_may_differ_by_site() -> None:
    host = host_with("lora", "lora")
    parents = adapters(host)
    sites = list(parents[0].layout.sites)
    weights = {site: (1.0, 0.0) if n % 2 else (0.0, 1.0) for n, site in enumerate(sites)}
    made, report = combine(parents, host.backbone, make_merging("task_arithmetic"), weights)
    assert report.weights is None
    for n, site in enumerate(sites):
        found, wanted = (change_of(a, host.backbone, site) for a in (made, parents[0 if n % 2 else 1]))
        assert found is not None and wanted is not None
        close(found.matrix(), wanted.matrix())
    with pytest.raises(ConfigError, match="there is none"):
        combine(parents, host.backbone, make_merging("cat"), dict(list(weights.items())[1:]))
    with pytest.raises(ConfigError, match="no parent acts there"):
        combine(parents, host.backbone, make_merging("cat"), {**weights, "elsewhere": (1.0, 1.0)})


@pytest.mark.parametrize("weights", [[1.0], [1.0, float("nan")], [1.0, 1.0, 1.0]])
def test_weights_that_do_not_fit_the_parents_are_refused(weights: list[float]) -> None:
    host = host_with("lora", "lora")
    with pytest.raises(ConfigError, match="do not fit 2 adapters"):
        combine(adapters(host), host.backbone, make_merging("cat"), weights)


def test_robustmerge_has_no_weights_and_a_rank_is_at_least_one() -> None:
    host = host_with("lora", "lora")
    with pytest.raises(ConfigError, match="has no weights"):
        combine(adapters(host), host.backbone, make_merging("robustmerge"), [0.5, 0.5])
    with pytest.raises(ConfigError, match="at least 1"):
        combine(adapters(host), host.backbone, make_merging("cat"), rank=0)
    with pytest.raises(MergeError, match="no adapter"):
        combine([], host.backbone, make_merging("cat"))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_prompts_and_prefixes_are_refused(method: str) -> None:
    host = Host(backbone("llama"))
    add(host, "a", small("lora"), head=False)
    add(host, "soft", small(method))
    assert not holds_weights(small(method)) and places(host.backbone, small(method))
    with pytest.raises(MergeError, match="changes no weight, so it cannot be combined"):
        combine(adapters(host), host.backbone, make_merging("task_arithmetic"))


def test_a_dense_result_needs_a_bias_in_the_module_and_one_of_a_rank_does_not() -> None:
    host = Host(backbone("llama"))
    perturb(host.add("a", small("lora", lora_bias=True), "v_proj", dtype=torch.float64))
    with pytest.raises(MethodError, match="is dense and has a bias") as error:
        combine(adapters(host), host.backbone, make_merging("ties", density=1.0))
    assert "--rank" in str(error.value.hint)
    same_changes(host, combine(adapters(host), host.backbone, neutral("ties"), rank=3)[0], adapters(host)[0], 1e-6)


def test_adapters_of_another_base_are_refused() -> None:
    host, other = host_with("lora"), host_with("lora")
    with torch.no_grad():
        other.backbone.module.get_parameter("model.norm.weight").add_(1)
    other.backbone.invalidate()
    strange = other.add("strange", small("lora"), dtype=torch.float64)
    with pytest.raises(MismatchError, match="changes of different bases do not add up"):
        combine([*adapters(host), strange], host.backbone, make_merging("task_arithmetic"))
    made, _ = combine([*adapters(host), strange], host.backbone, make_merging("task_arithmetic"), other_base=True)
    assert made.base == host.backbone.fingerprint()


def test_values_that_are_not_finite_are_refused() -> None:
    host = host_with("lora", "lora")
    adapters(host)[1].flat[0] = float("inf")
    with pytest.raises(FormatError, match="'lora1' holds values that are not finite, at site"):
        combine(adapters(host), host.backbone, make_merging("cat"))


def test_what_restores_rounding_is_merged_with_no_other() -> None:
    from lorica.models.quantize.apply import quantize_backbone
    from lorica.models.quantize.config import Quantization

    full = backbone("llama", torch.float32)
    packed = quantize_backbone(backbone("llama", torch.float32), Quantization(kind="nf4")).packed_from(full)
    host = Host(packed)
    host.add("loft", small("loftq"), "q_proj")
    host.add("plain", small("lora"), "q_proj")
    with pytest.raises(MergeError, match="'loftq' adapter 'loft' holds what packing took"):
        combine(adapters(host), packed, make_merging("task_arithmetic"))
