"""Composing adapters by a search: what a weight means, what is asked how often, what is reported and written."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lorica.adapters.files import load_adapter
from lorica.adapters.lineage import Data, Lineage
from lorica.adapters.merging.provenance import origins_of
from lorica.client.local import Service
from lorica.core.errors import ConfigError, DataError, MergeError, RouteError
from lorica.data.example import Example
from lorica.data.render import Renderer
from lorica.methods import make_method
from lorica.models import load
from lorica.recipes.compose import ComposeConfig, compose, few_shot, loss_on, save_composition
from lorica.recipes.compose.composer import composer
from lorica.recipes.forgetting import mean_loss
from tests.tiny import tiny

pytest.importorskip("nevergrad", reason="nevergrad is not installed: pip install 'lorica[compose]'")
FEW = [Example.whole([5, 6, 7, 8, 9, 10]), Example((9, 30, 31, 4), (0.0, 0.0, 1.0, 1.0))]
MORE = [Example.whole([7, 8, 9, 10, 11])]
LORA = make_method("lora", rank=2, alpha=4.0)


def moved(host, name, seed, method=LORA, targets=None):
    adapter = host.add(name, method, targets, seed=seed, dtype=torch.float64)
    adapter.flat += 0.2 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(seed)).double()
    return adapter


@pytest.fixture
def service():
    """A tiny model in float64 with three adapters off their initial values."""
    service = Service(tiny("llama", dtype=torch.float64))
    for seed, name in enumerate("abc"):
        moved(service.host, name, seed + 1)
    return service


def parents(service):
    return [service.host.adapter(name) for name in "abc"]


def maker(service, how="lorahub", **parameters):
    rule = ComposeConfig(how=how, parameters=parameters).rule()
    return composer(service.host, parents(service), rule, "made", origins(service, parents(service)))


def origins(service, adapters):
    return origins_of(adapters, service.host.backbone, None)


@torch.no_grad()
def logits(service, *stack):
    with service.host.rows([list(stack) or None]):
        return service.host(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


def test_weights_of_zero_are_the_base_bit_for_bit_and_a_single_one_is_that_adapter(service):
    objective, before = loss_on(service, FEW), mean_loss(service, None, FEW, "rows")
    with maker(service) as made:
        assert torch.equal(logits(service, made.at([0.0, 0.0, 0.0])), logits(service))
        assert objective(made.at([0.0, 0.0, 0.0])) == before
        for n, parent in enumerate(parents(service)):
            adapter = made.at([float(m == n) for m in range(3)])
            assert torch.equal(logits(service, adapter), logits(service, parent))
    assert "made" not in service.host.adapters


def test_recomposing_in_place_is_the_rule_and_loads_nothing_again(service):
    weights = [0.3, -1.2, 0.7]
    with maker(service) as made:
        first = made.at([1.0, 1.0, 1.0])
        flat = first.flat
        second = made.at(weights)
        assert second is first and second.flat is flat
        torch.testing.assert_close(second.flat, made.combined(weights).flat)
        first_logits = logits(service, second)
        assert not torch.equal(first_logits, logits(service, made.at([0.3, -1.2, 0.8])))
        assert torch.equal(first_logits, logits(service, made.at(weights)))


def test_other_rules_are_computed_anew_and_act_as_they_do(service):
    weights = [0.3, -1.2, 0.7]
    with maker(service, "task_arithmetic", scale=0.5) as made:
        adapter = made.at(weights)
        total = 0.5 * sum(
            w * parent.update(site, service.host.backbone.weight(site)).factors[0].dense()
            for w, parent in zip(weights, parents(service), strict=True)
            for site in [next(iter(parent.layout.sites))]
        )
        site = next(iter(adapter.layout.sites))
        update = adapter.update(site, service.host.backbone.weight(site))
        torch.testing.assert_close(update.factors[0].dense(), total)


def test_only_the_sum_matters_for_equal_adapters_while_the_penalty_differs(service):
    same = service.host.adapter("a")
    twins = [same]
    for name in ("a2", "a3"):
        twin = service.host.add(name, LORA, seed=1, dtype=torch.float64)
        twin.flat.copy_(same.flat)
        twins.append(twin)
    objective = loss_on(service, FEW)
    with composer(service.host, twins, ComposeConfig().rule(), "made", origins(service, twins)) as made:
        losses = [objective(made.at(w)) for w in ([0.6, 0.0, 0.0], [0.2, 0.2, 0.2], [1.4, -1.4, 0.6], [-0.6, 0.0, 0.0])]
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-9)


def test_the_loss_does_not_depend_on_how_examples_are_batched(service):
    whole = loss_on(service, FEW)(service.host.adapter("a"))
    small = Service(tiny("llama", dtype=torch.float64), token_budget=8)
    twin = small.host.add("a", LORA, seed=1, dtype=torch.float64)
    twin.flat.copy_(service.host.adapter("a").flat)
    assert loss_on(small, FEW)(twin) == pytest.approx(whole, abs=1e-12)
    assert loss_on(service, FEW + FEW)(service.host.adapter("a")) == pytest.approx(whole, abs=1e-12)


def test_every_row_is_there_and_says_what_its_weights_give(service):
    objective, test = loss_on(service, FEW), loss_on(service, MORE)
    found = compose(service.host, parents(service), objective, ComposeConfig(budget=12), test=test)
    assert [row.name for row in found.rows] == ["zero", "uniform", "best single", "random search", "lorahub"]
    zero, uniform, single, random_, result = found.rows
    assert zero.loss == zero.value == mean_loss(service, None, FEW, "rows")
    assert zero.test == mean_loss(service, None, MORE, "rows")
    assert uniform.weights == pytest.approx((1 / 3,) * 3)
    assert single.loss == min(found.alone.values()) == objective(service.host.adapter("abc"[single.weights.index(1.0)]))
    assert single.value == pytest.approx(single.loss + 0.05 / 3)
    assert random_.value == min(one["value"] for one in found.log["random"])
    assert result.value == pytest.approx(min(one["value"] for one in found.log["evaluations"])) and result is found.row
    assert result.value <= zero.value
    assert result.loss == pytest.approx(objective(found.adapter)) and result.test == test(found.adapter)
    with maker(service) as made:
        for row in (uniform, random_, result):
            assert objective(made.at(row.weights)) == pytest.approx(row.loss, abs=1e-9)
            assert test(made.at(row.weights)) == pytest.approx(row.test, abs=1e-9)


def test_the_objective_is_any_function_and_is_asked_as_often_as_it_is_said(service):
    asked = []

    def count(adapter):
        asked.append(adapter.name)
        return -float(adapter.flat.sum())

    found = compose(service.host, parents(service), count, ComposeConfig(budget=9))
    assert len(asked) == 3 + 9 + 9 + 1 + 1  # alone, search, random search, equal weights, the result
    assert asked[:3] == ["a", "b", "c"] and set(asked[3:]) == {"composed"}
    assert len(found.log["evaluations"]) == len(found.log["random"]) == 9


def test_the_log_says_optimiser_seed_settings_and_every_evaluation(service, tmp_path):
    config = ComposeConfig(optimizer="OnePlusOne", budget=7, seed=3)
    data = Data("few.jsonl", "ab" * 32, 2)
    found = compose(service.host, parents(service), loss_on(service, FEW), config, data=data)
    folder = save_composition(found, service.host.backbone, tmp_path / "out")
    log = json.loads((folder / "compose.json").read_text(encoding="utf-8"))
    assert log["optimizer"]["name"] == "OnePlusOne" and log["optimizer"]["seed"] == 3
    assert log["optimizer"]["nevergrad"] and log["settings"]["budget"] == 7 and log["data"]["sha256"] == "ab" * 32
    assert len(log["evaluations"]) == 7 and log["evaluations"][0]["weights"] == [0.0, 0.0, 0.0]
    again = load_adapter(folder, service.host.backbone, "again")
    assert torch.equal(again.flat, found.adapter.flat)
    lineage = Lineage.from_meta(again.meta)
    assert [(p.relation, p.weight) for p in lineage.parents] == [("merged-from", w) for w in found.row.weights]
    assert lineage.how == "lorahub" and lineage.data == data
    assert lineage.settings["search"]["optimizer"]["name"] == "OnePlusOne"


def test_equal_seeds_give_equal_compositions(service):
    config = ComposeConfig(budget=8, optimizer="OnePlusOne", seed=5)
    found = []
    for _ in range(2):
        found.append(compose(service.host, parents(service), loss_on(service, FEW), config).to_dict())
        service.host.delete("composed")
    assert found[0] == found[1]


def test_candidates_are_those_that_score_best_alone_in_their_order(service):
    scores = {"a": 3.0, "b": 2.0, "c": 1.0}
    found = compose(
        service.host,
        parents(service),
        lambda adapter: scores.get(adapter.name, 5.0),
        ComposeConfig(budget=3, candidates=2),
    )
    assert found.parents == ("b", "c") and found.alone == scores
    assert len(found.row.weights) == 2 and found.rows[2].weights == (0.0, 1.0)
    assert [parent.weight for parent in Lineage.from_meta(found.adapter.meta).parents] == list(found.row.weights)
    with pytest.raises(ConfigError, match="4 candidates are to be kept of 3 adapters"):
        compose(service.host, parents(service), lambda adapter: 1.0, ComposeConfig(candidates=4))


def test_a_search_that_is_beaten_says_so(service):
    def objective(adapter):
        return 0.0 if adapter.name == "b" else 1.0

    found = compose(service.host, parents(service), objective, ComposeConfig(budget=3))
    assert any("best single has a lower loss (0.0000)" in note for note in found.notes)
    assert any("first simplex takes 4 evaluations, so a budget of 3" in note for note in found.notes)


def test_weights_at_the_bound_are_said(service):
    found = compose(service.host, parents(service), lambda adapter: -float(adapter.flat[0]), ComposeConfig(budget=30))
    assert any("weights are at the bound of ±1.5" in note for note in found.notes)


def test_losses_that_are_not_finite_are_counted_and_logged_as_null(service):
    def objective(adapter):
        if adapter.name == "a":
            return math.nan
        return float(adapter.flat.square().sum()) if adapter.flat.abs().max() < 0.5 else math.inf

    found = compose(service.host, parents(service), objective, ComposeConfig(budget=8))
    assert found.alone["a"] == math.inf and any("were not finite" in note for note in found.notes)
    assert found.to_dict()["alone"]["a"] is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_adapters_that_are_not_resident_are_taken_and_given_back(service):
    own = parents(service)
    service.host.delete("b")
    compose(service.host, own, loss_on(service, FEW), ComposeConfig(budget=3))
    assert list(service.host.adapters) == ["a", "c", "composed"]


def test_nothing_is_left_in_the_host_after_an_error(service):
    def fails(adapter):
        if adapter.name == "composed":
            raise KeyError("stop")
        return 1.0

    with pytest.raises(KeyError, match="stop"):
        compose(service.host, parents(service), fails)
    assert list(service.host.adapters) == ["a", "b", "c"]


def test_parents_that_do_not_fit_are_one_sentence(service):
    host, objective = service.host, loss_on(service, FEW)
    own = parents(service)
    wide = moved(host, "wide", 7, make_method("lora", rank=3))
    with pytest.raises(MergeError, match="ranks differ: 2 of a, .*3 of wide"):
        compose(host, [*own, wide], objective)
    with pytest.raises(MergeError, match="'lorahub' .*dense"):
        compose(host, [*own, moved(host, "dense", 8, make_method("ia3"))], objective)
    with pytest.raises(MergeError, match="virtual tokens"):
        compose(host, [*own, moved(host, "prompt", 9, make_method("prompt", tokens=2))], objective)
    with pytest.raises(MergeError, match="no adapter"):
        compose(host, [], objective)
    with pytest.raises(MergeError, match="given twice"):
        compose(host, [own[0], own[0]], objective)
    with pytest.raises(RouteError, match="an adapter 'a' already"):
        compose(host, own[1:], objective, name="a")
    with pytest.raises(ConfigError, match="no rule of merging 'lorahug'. Did you mean 'lorahub'"):
        compose(host, own, objective, ComposeConfig(how="lorahug"))


def test_sites_that_differ_are_composed_and_said(service):
    part = moved(service.host, "part", 7, targets=["q_proj"])
    found = compose(service.host, [*parents(service), part], loss_on(service, FEW), ComposeConfig(budget=3))
    acting = len(part.layout.sites)
    assert f"part acts at {acting} of {len(found.adapter.layout.sites)} sites, and adds nothing at the others." in (
        found.notes
    )


def test_task_arithmetic_takes_what_lorahub_cannot(service):
    wide = moved(service.host, "wide", 7, make_method("lora", rank=3))
    scaled = moved(service.host, "scaled", 8, make_method("ia3"))
    config = ComposeConfig(how="task_arithmetic", budget=6)
    found = compose(service.host, [*parents(service), wide, scaled], loss_on(service, FEW), config)
    assert found.row.name == "task_arithmetic" and found.row.value <= found.rows[0].value


def test_the_examples_are_so_many_rows_in_an_order_of_the_seed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p {i}", "completion": f"c {i}"}) + "\n" for i in range(9)))
    renderer = Renderer(load("nano").tokenizer)
    first = few_shot(path, renderer, 5, seed=0, max_length=64)
    assert len(first.examples) == 5 == len(set(first.where)) == first.data.rows
    assert first == few_shot(path, renderer, 5, seed=0, max_length=64)
    assert first.where != few_shot(path, renderer, 5, seed=1, max_length=64).where
    assert len(few_shot(path, renderer, None, max_length=64).examples) == 9
    with pytest.raises(DataError, match="has 9 rows, and 10 examples were asked for"):
        few_shot(path, renderer, 10, max_length=64)
    assert "cut off" in few_shot(path, renderer, 2, max_length=12).said[0]
