"""The search itself, on functions whose minimum is known: it begins at zero, stays in its box and keeps its budget."""

from __future__ import annotations

import builtins
import importlib
import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.core.errors import ConfigError, MethodError, MissingError
from lorica.recipes.compose import ComposeConfig
from lorica.recipes.compose.search import best_of, evaluate, optimizer_name, random_search, search

pytest.importorskip("nevergrad", reason="nevergrad is not installed: pip install 'lorica[compose]'")
NAMES = ("Cobyla", "OnePlusOne", "TwoPointsDE", "PSO", "NelderMead")


class Bowl:
    """`Σ (w − 0.3)²`, counting."""

    def __init__(self):
        self.asked = []

    def __call__(self, weights):
        self.asked.append(tuple(weights))
        return sum((w - 0.3) ** 2 for w in weights)


def test_the_penalty_is_the_mean_of_the_sizes_and_not_their_sum():
    one = evaluate(lambda weights: 0.0, (1.5, -1.5, 0, 0), 0.05)
    assert one.value == pytest.approx(0.0375, abs=1e-15) and one.loss == 0.0


@given(st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=8), st.floats(0, 10), st.floats(-5, 5))
def test_the_penalty_is_added_to_the_loss_whatever_its_size(weights, l1, loss):
    found = evaluate(lambda w: loss, weights, l1)
    assert found.value == pytest.approx(loss + l1 * sum(map(abs, weights)) / len(weights))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 4, 20])
def test_every_optimiser_begins_at_zero_stays_in_the_box_and_keeps_the_budget(name, count):
    bowl, config = Bowl(), ComposeConfig(optimizer=name, budget=30, bound=0.7, l1=0.0)
    found = search(bowl, count, config)
    assert len(bowl.asked) == len(found.evaluations) == 30 and found.optimizer == name
    assert bowl.asked[0] == (0.0,) * count
    assert max(abs(w) for weights in bowl.asked for w in weights) <= 0.7
    assert [one.weights for one in found.evaluations] == bowl.asked
    assert found.best.value == min(one.value for one in found.evaluations) <= found.evaluations[0].value


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.sampled_from(NAMES))
def test_equal_seeds_give_equal_searches_and_leave_the_global_random_state_alone(seed, name):
    config = ComposeConfig(optimizer=name, budget=12, seed=seed)
    before = np.random.get_state()[1].copy()
    one, two = search(Bowl(), 3, config), search(Bowl(), 3, config)
    assert one == two
    assert np.array_equal(before, np.random.get_state()[1])
    assert random_search(Bowl(), 3, config) == random_search(Bowl(), 3, config)


def test_seeds_matter_where_the_optimiser_draws():
    found = [search(Bowl(), 3, ComposeConfig(optimizer="OnePlusOne", budget=12, seed=seed)) for seed in (0, 1)]
    assert found[0].evaluations != found[1].evaluations
    assert random_search(Bowl(), 3, ComposeConfig(seed=0)) != random_search(Bowl(), 3, ComposeConfig(seed=1))


def test_cobyla_finds_the_minimum_of_five_weights_and_has_barely_begun_with_twenty():
    few, many = (search(Bowl(), count, ComposeConfig(l1=0.0)).best.weights for count in (5, 20))
    assert few == pytest.approx((0.3,) * 5, abs=0.02)
    assert max(abs(w - 0.3) for w in many) > 0.1


def test_random_search_draws_from_the_whole_box():
    found = random_search(Bowl(), 2, ComposeConfig(budget=200, bound=1.5))
    values = [w for one in found for w in one.weights]
    assert len(found) == 200 and -1.5 <= min(values) < -1.3 and 1.3 < max(values) <= 1.5
    assert best_of(found).value == min(one.value for one in found)


@pytest.mark.parametrize("name", ["NGOpt", "ngopt", "NGOpt10", "Shiwa"])
def test_an_optimiser_that_chooses_another_one_is_refused(name):
    with pytest.raises(ConfigError, match="chooses another optimiser"):
        search(Bowl(), 2, ComposeConfig(optimizer=name))


def test_a_name_is_taken_in_any_case_and_an_unknown_one_names_its_neighbours():
    assert optimizer_name("COBYLA") == "Cobyla"
    with pytest.raises(ConfigError, match="no optimiser 'Cobila'. Did you mean 'Cobyla'"):
        optimizer_name("Cobila")


def test_an_evaluation_that_is_not_finite_counts_as_worst_and_the_search_goes_on():
    def cliff(weights):
        return math.nan if weights[0] > 0.5 else Bowl()(weights)

    found = search(cliff, 2, ComposeConfig(l1=0.0))
    assert any(math.isinf(one.value) for one in found.evaluations) and len(found.evaluations) == 40
    assert found.best.loss < 0.05


def test_an_objective_that_is_not_finite_at_zero_is_one_sentence():
    with pytest.raises(MethodError, match="not finite at weights of zero"):
        search(lambda weights: math.nan, 2, ComposeConfig())


def test_no_thread_of_the_optimiser_is_left_even_after_an_error():
    def fails(weights):
        if any(weights):
            raise KeyError("stop")
        return 1.0

    before = threading.active_count()
    with pytest.raises(KeyError, match="stop"):
        search(fails, 3, ComposeConfig())
    search(Bowl(), 3, ComposeConfig(budget=5))
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(1.0)
    assert threading.active_count() <= before


def test_without_nevergrad_the_sentence_names_the_extra(monkeypatch):
    real = importlib.import_module

    def absent(name, package=None):
        if name.startswith("nevergrad"):
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingError, match="nevergrad, which is not installed") as raised:
        search(Bowl(), 2, ComposeConfig())
    assert "lorica[compose]" in str(raised.value.hint)


def test_an_optimiser_that_needs_a_further_package_says_which(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name == "cma":
            raise ModuleNotFoundError("No module named 'cma'", name="cma")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingError, match="CMA needs a package that is not installed: cma"):
        search(Bowl(), 3, ComposeConfig(optimizer="CMA"))


@pytest.mark.parametrize(
    ("field", "value"), [("budget", 0), ("bound", 0), ("bound", math.inf), ("l1", -1), ("candidates", 0), ("seed", -1)]
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        ComposeConfig(**{field: value})
