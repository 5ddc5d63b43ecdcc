"""GLoRA's evolutionary search on synthetic scores, and the recipe on a small model."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from lorica.adapters.parents import lineage_of
from lorica.core.errors import ConfigError, MethodError, StorageError
from lorica.core.glora_choices import ALL, Choice
from lorica.core.site import Site
from lorica.engine.host import Host
from lorica.methods.glora import GLoRA
from lorica.methods.lora import LoRA
from lorica.models import load
from lorica.recipes import glora_search
from lorica.recipes.evolution import Evolution, EvolutionConfig, Genome
from lorica.recipes.glora_search import GLoRASearchConfig, fixed_adapter, set_choices
from lorica.recipes.ledger import Ledger
from lorica.recipes.observer import Observer
from tests.contract.cases import backbone, close, inputs, output

SITES = [Site(f"layers.{n}.fc", "linear", (32, 16 + 8 * n), bias=True) for n in range(4)]
BEST: Genome = (ALL[3], ALL[77], ALL[205], ALL[431])


def likeness(genome: Genome) -> float:
    """Options that are those of `BEST`: 20 at the optimum."""
    return float(sum(a == b for one, two in zip(genome, BEST, strict=True) for a, b in zip(one, two, strict=True)))


def test_the_optimum_of_a_synthetic_score_is_recovered() -> None:
    found = Evolution(EvolutionConfig(generations=40), SITES, 4).run(likeness)
    assert found.best.genome == BEST and found.best.score == 20
    assert list(found.history) == sorted(found.history)
    assert found.best.parameters == sum(c.trained(s, 4) for c, s in zip(BEST, SITES, strict=True))


def test_no_candidate_repeats_and_every_generation_is_made_as_told() -> None:
    config = EvolutionConfig(generations=6, population=40, keep=7, mutations=20, crossovers=10)
    seen: list[Genome] = []

    def score(genome: Genome) -> float:
        seen.append(genome)
        return likeness(genome)

    found = Evolution(config, SITES, 4).run(score)
    assert len(seen) == len(set(seen)) == 6 * 40 == found.evaluated
    ranked = sorted(seen[:40], key=lambda genome: -likeness(genome))[:7]
    for genome in seen[60:70]:  # crossovers of the second generation
        for at, choice in enumerate(genome):
            for letter, option in choice._asdict().items():
                assert option in {getattr(parent[at], letter) for parent in ranked}


@given(st.integers(1, 9000), st.integers(0, 3000), st.integers(0, 5))
@settings(deadline=None, max_examples=25)
def test_every_candidate_is_within_the_budget(smallest: int, width: int, seed: int) -> None:
    top = Evolution(EvolutionConfig(), SITES, 4).parameters((Choice("lora", "lora", "lora", "vector", "vector"),) * 4)
    smallest = min(smallest, top - 300)
    config = EvolutionConfig(
        smallest=smallest,
        largest=smallest + width + 300,
        generations=3,
        population=12,
        mutations=5,
        crossovers=5,
        keep=4,
        seed=seed,
    )
    evolution = Evolution(config, SITES, 4)
    sizes: list[int] = []

    def score(genome: Genome) -> float:
        sizes.append(evolution.parameters(genome))
        return likeness(genome)

    evolution.run(score)
    assert sizes and all(smallest <= size <= smallest + width + 300 for size in sizes)


def test_a_budget_that_nothing_meets_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"at most [\d,]+ parameters at rank 4"):
        Evolution(EvolutionConfig(smallest=10**6), SITES, 4)
    with pytest.raises(ConfigError, match="at least 9 and at most 8"):
        EvolutionConfig(smallest=9, largest=8)
    with pytest.raises(ConfigError, match="more than a population of 50"):
        EvolutionConfig(mutations=30)
    with pytest.raises(ConfigError, match="wider budget"):
        Evolution(EvolutionConfig(smallest=31, largest=31), SITES[:1], 4).random()


def test_candidates_are_uniform_where_the_budget_leaves_all() -> None:
    evolution = Evolution(EvolutionConfig(smallest=1), SITES[:1], 2)
    seen = Counter(evolution.random()[0] for _ in range(431 * 20))
    counted = [choice for choice in ALL if choice.trained(SITES[0], 2)]  # but for the one that trains nothing
    assert set(seen) <= set(counted) and len(counted) == 431
    # the walk out of the empty one ends at its neighbours: 1 in 432 draws
    assert chisquare([seen[choice] for choice in counted]).pvalue > 1e-4


def test_without_a_bias_configurations_that_differ_in_d_alone_are_one() -> None:
    site = Site("fc", "linear", (8, 8))
    evolution = Evolution(EvolutionConfig(population=200, keep=5, generations=3), [site], 2)
    seen: set[Genome] = set()
    found = evolution.run(lambda genome: seen.add(genome) or 0.0)  # type: ignore[func-returns-value]
    assert {genome[0].D for genome in seen} == {"none"}
    assert found.evaluated <= 143


def test_a_search_ends_when_everything_within_the_budget_was_tried() -> None:
    config = EvolutionConfig(smallest=1, largest=3, generations=50)
    site = Site("fc", "linear", (8, 8), bias=True)
    found = Evolution(config, [site], 2).run(lambda genome: float(genome[0].A == "none"))
    # one to three of A, B, D and E are constants: 2⁴ − 2
    assert found.evaluated == 14 and len(found.history) < 50


def test_a_score_of_nan_is_the_worst() -> None:
    found = Evolution(EvolutionConfig(generations=2), SITES, 4).run(
        lambda genome: float("nan") if genome[0].A == "lora" else likeness(genome)
    )
    assert found.best.genome[0].A != "lora" and found.best.score > 0


def test_a_stopped_search_goes_on_to_the_same_result(tmp_path: Path) -> None:
    def search(path: Path | None, most: int | None) -> Any:
        ledger, count = Ledger(path), 0

        def score(genome: Genome) -> float:
            def compute() -> float:
                nonlocal count
                count += 1
                if most is not None and count > most:
                    raise KeyboardInterrupt
                return likeness(genome)

            return ledger.value({"choices": [str(choice) for choice in genome]}, compute)

        return Evolution(EvolutionConfig(generations=5, seed=3), SITES, 4).run(score), count

    whole, evaluations = search(None, None)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "scores.jsonl", 120)
    again, rest = search(tmp_path / "scores.jsonl", None)
    assert again == whole
    assert rest == evaluations - 120
    other = Evolution(EvolutionConfig(generations=5, seed=4), SITES, 4).run(likeness)
    assert other.top != whole.top


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_a_choice_selects_of_a_supernet_computes_the_same(family: str) -> None:
    host = Host(backbone(family))
    net = host.add("net", GLoRA(rank=2, supernet=True), "all-linear", dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    net.flat += 0.1 * torch.randn(net.flat.shape, generator=rng, dtype=torch.float64)
    choices = {site: Choice.draw(rng) for site in net.layout.sites}
    set_choices(net, choices)
    host.activate("net")
    given_ = inputs(host)
    y = output(host, given_)
    fixed = host.put(fixed_adapter(net, choices, "fixed"))
    host.activate("fixed")
    close(output(host, given_), y, 1e-12)
    sites = net.layout.sites
    assert fixed.layout.trainable_count() == sum(choices[name].trained(site, 2) for name, site in sites.items())
    assert fixed.layout.trainable_count() < net.layout.trainable_count()


def test_only_a_supernet_has_something_to_choose() -> None:
    host = Host(backbone("llama"))
    for method in (LoRA(rank=2), GLoRA(rank=2)):
        adapter = host.add(method.name, method, "q_proj")
        names = list(adapter.layout.sites)
        with pytest.raises(MethodError, match="no GLoRA supernet"):
            fixed_adapter(adapter, dict.fromkeys(names, ALL[0]), "fixed")
        with pytest.raises(MethodError, match="no supernet at site"):
            set_choices(adapter, dict.fromkeys(names, ALL[0]))


class _StopError(Exception):
    """Stands for a process that ends in the middle."""


class _Stopping(Observer):
    """Ends the search after so many units of work."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise _StopError


def settings_of(model: str, rows: Path, out: Path, **changes: Any) -> GLoRASearchConfig:
    values: dict[str, Any] = {
        "model": model,
        "data": {"path": str(rows)},
        "targets": {"include": ["q_proj"], "layers": "0-1"},
        "steps": 4,
        "batch_size": 2,
        "save_every": 2,
        "rank": 2,
        "validation_rows": 3,
        "test_rows": 3,
        "evolution": {"population": 4, "keep": 2, "mutations": 2, "crossovers": 1, "generations": 2, "largest": 2000},
        "optimizer": {"lr": 0.01},
        "out": str(out),
    }
    return GLoRASearchConfig.parse(values | changes)


@pytest.mark.slow
def test_the_recipe_finds_an_adapter_within_the_budget_and_resumes_to_the_same(
    small: str, rows: Path, tmp_path: Path
) -> None:
    whole = glora_search.run(settings_of(small, rows, tmp_path / "whole"))
    assert 1 <= whole.parameters <= 2000 and whole.evaluated == 8 and whole.reused == 0
    assert whole.validation_loss == pytest.approx(-whole.history[-1], rel=1e-4)
    assert json.loads((tmp_path / "whole" / "search.json").read_text())["choices"] == whole.choices
    host = Host(load(small))
    loaded = host.load(whole.adapter, "found")
    layout = loaded.layout
    chosen = {name: str(layout.methods[name].choice_at(site)) for name, site in layout.sites.items()}  # type: ignore[attr-defined]
    assert chosen == whole.choices
    known = lineage_of(loaded)
    assert known.recipe is not None and known.base is not None and known.data is not None
    assert (known.recipe["name"], known.recipe["rank"]) == ("glora search", 2)
    assert known.recipe["validation_loss"] == pytest.approx(whole.validation_loss, rel=1e-4)
    assert known.data.path == str(rows)
    for after in (2, 7):  # in the supernet's training, and among the scores
        with pytest.raises(_StopError):
            glora_search.run(settings_of(small, rows, tmp_path / "stopped"), _Stopping(after))
    again = glora_search.run(settings_of(small, rows, tmp_path / "stopped"))
    assert again.reused > 0
    assert (again.choices, again.history, again.test_loss) == (whole.choices, whole.history, whole.test_loss)
    with pytest.raises(StorageError, match="other settings"):
        glora_search.run(settings_of(small, rows, tmp_path / "stopped", seed=1))
