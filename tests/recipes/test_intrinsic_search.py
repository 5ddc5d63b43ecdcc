"""The search for d90 on synthetic runs, and the recipe on a small model."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lorica.core.errors import ConfigError, MethodError
from lorica.recipes import intrinsic_search
from lorica.recipes.d90 import GridConfig, Tuned, search_d90
from lorica.recipes.intrinsic_search import IntrinsicSearchConfig
from lorica.recipes.ledger import Ledger

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)


def curve(need: int, best: float = 0.01) -> Any:
    """A metric that reaches 0.72 of full fine-tuning's 0.8 at `need` directions, best at one learning rate."""
    runs: Counter[tuple[int | None, float, int]] = Counter()

    def train(dimension: int | None, lr: float, seed: int) -> float:
        runs[dimension, lr, seed] += 1
        loss = 0.1 * abs(math.log10(lr / best))
        return (0.8 if dimension is None else 0.8 * min(1.0, 0.9 * (dimension / need) ** 0.2)) - loss

    return train, runs


def grid(**changes: Any) -> GridConfig:
    return GridConfig.parse({"rates": RATES, "full_rates": RATES, **changes})


def test_the_grid_is_even_in_the_logarithm_and_has_both_ends() -> None:
    assert grid(smallest=10, largest=10_000, per_decade=1).dimensions() == [10, 100, 1000, 10_000]
    assert grid(smallest=10, largest=10_000, per_decade=2).dimensions() == [10, 32, 100, 316, 1000, 3162, 10_000]
    assert grid(smallest=7, largest=7).dimensions() == [7]
    assert grid(smallest=100, largest=150).dimensions() == [100, 150]
    with pytest.raises(ConfigError, match="above its largest"):
        grid(smallest=10, largest=9)
    for rates in ((0.1, 0.1), (-1.0,), ()):
        with pytest.raises(ConfigError, match="positive"):
            grid(rates=rates)


def test_it_is_the_smallest_dimension_of_the_grid_that_is_enough() -> None:
    train, _ = curve(need=300)
    found = search_d90(train, grid(per_decade=4))
    assert found.d90 == 316
    assert found.full == Tuned(None, 0.8, 0.01, (0.003, 0.01, 0.03))
    assert found.target == pytest.approx(0.72)
    assert [row.dimension for row in found.rows] == [10, 18, 32, 56, 100, 178, 316]
    assert all(row.metric < found.target for row in found.rows[:-1])


def test_it_is_exact_where_the_steps_between_are_tried_too() -> None:
    train, _ = curve(need=300)
    assert search_d90(train, grid(per_decade=1, refinements=12)).d90 == 300


def test_no_dimension_of_the_grid_may_be_enough() -> None:
    train, _ = curve(need=10**6)
    found = search_d90(train, grid(largest=1000, refinements=3))
    assert found.d90 is None and found.rows[-1].dimension == 1000


def test_the_whole_grid_is_tried_on_request_and_the_first_that_is_enough_counts() -> None:
    train, _ = curve(need=300)
    found = search_d90(train, grid(per_decade=1, whole=True))
    assert found.d90 == 1000
    assert [row.dimension for row in found.rows] == [10, 100, 1000, 10_000]

    def wavy(dimension: int | None, lr: float, seed: int) -> float:
        return {None: 1.0, 10: 0.2, 100: 0.95, 1000: 0.5, 10_000: 0.99}[dimension]

    assert search_d90(wavy, grid(per_decade=1, whole=True)).d90 == 100


@pytest.mark.parametrize("best", RATES)
def test_the_learning_rate_is_tuned_for_each_dimension_from_the_one_before(best: float) -> None:
    train, runs = curve(need=300, best=best)
    found = search_d90(train, grid(per_decade=2))
    assert {row.lr for row in (*found.rows, found.full)} == {best}
    assert max(runs.values()) == 1  # nothing is run twice
    later = [lr for dimension, lr, _ in runs if dimension == 100]
    assert len(later) <= 3  # the best and its neighbours


def test_a_metric_is_the_mean_over_seeds_and_a_run_that_diverged_never_wins() -> None:
    def train(dimension: int | None, lr: float, seed: int) -> float:
        if lr > 0.01 and seed == 1:
            return math.nan
        return 0.5 + 0.1 * seed + lr

    found = search_d90(train, grid(seeds=(0, 1), smallest=5, largest=5))
    assert found.full.lr == 0.01 and found.full.metric == pytest.approx(0.56)


def test_a_share_of_nothing_is_no_target() -> None:
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(MethodError, match="no share can be a target"):
            search_d90(lambda dimension, lr, seed, value=value: value, grid())  # type: ignore[misc]


def test_a_second_search_with_another_grid_reuses_the_runs_of_the_first(tmp_path: Path) -> None:
    def search(**changes: Any) -> Any:
        train, runs = curve(need=300)
        ledger = Ledger(tmp_path / "runs.jsonl")
        known = search_d90(
            lambda d, lr, seed: ledger.value({"d": d, "lr": lr, "seed": seed}, lambda: train(d, lr, seed)),
            grid(**changes),
        )
        return known, runs

    first, runs = search(per_decade=1)
    again, none = search(per_decade=1)
    assert again == first and runs and not none
    _, finer = search(per_decade=2)
    assert {d for d, _, _ in finer} == {32, 316}
    lower, _ = search(per_decade=2, threshold=0.5)
    assert lower.d90 < first.d90


def config_of(rows: Path, out: Path, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "data": {"path": str(rows)},
        "targets": {"include": ["q_proj", "input_layernorm"], "layers": "0-1"},
        "steps": 3,
        "batch_size": 2,
        "validation_rows": 3,
        "test_rows": 3,
        "metric": "probability",
        "grid": {
            "smallest": 10,
            "largest": 100,
            "per_decade": 1,
            "rates": [0.01],
            "full_rates": [0.001],
            "whole": True,
        },
        "out": str(out),
    }
    return values | changes


@pytest.mark.slow
def test_the_recipe_trains_once_and_reports_the_same_from_what_is_kept(rows: Path, tmp_path: Path) -> None:
    config = IntrinsicSearchConfig.parse(config_of(rows, tmp_path / "d90"))
    first = intrinsic_search.run(config)
    assert (first.computed, first.reused) == (3, 0)
    assert [row.dimension for row in first.rows] == [10, 100]
    assert 0 < first.full.metric < 1
    again = intrinsic_search.run(config)
    assert (again.computed, again.reused) == (0, 3)
    assert (again.rows, again.full, again.test) == (first.rows, first.full, first.test)
    stored = json.loads((tmp_path / "d90" / "d90.json").read_text())
    assert stored["d90"] == first.d90 and len(stored["rows"]) == 2
    said = intrinsic_search.run(IntrinsicSearchConfig.parse(config_of(rows, tmp_path / "d90", structured=True)))
    assert said.computed == 2  # full fine-tuning is the same


@pytest.mark.slow
def test_what_does_not_fit_is_told_before_anything_is_trained(rows: Path, tmp_path: Path) -> None:
    values = config_of(rows, tmp_path / "d90", structured=True)
    values["grid"] |= {"smallest": 3}
    with pytest.raises(MethodError, match="at least 5 is right"):
        intrinsic_search.run(IntrinsicSearchConfig.parse(values))
    assert not (tmp_path / "d90" / "runs.jsonl").exists()


@pytest.mark.slow
def test_both_searches_run_from_the_command_line(rows: Path, tmp_path: Path) -> None:
    from lorica.cli.main import cli

    few = ["targets.layers=0-1", "batch_size=2", "validation_rows=3", "test_rows=3", "--steps", "3"]
    where = ["--data", str(rows), "--targets", "q_proj"]
    grid_of = ["grid.smallest=10", "grid.largest=10", "grid.rates=[0.01]", "grid.full_rates=[0.001]"]
    out = CliRunner().invoke(
        cli,
        ["search", "d90", *where, *few, "--out", str(tmp_path / "d"), "--metric", "probability", *grid_of, "--json"],
    )
    assert out.exit_code == 0, out.output
    assert json.loads(out.stdout)["rows"][0]["dimension"] == 10
    small = ["evolution.population=3", "evolution.keep=2", "evolution.mutations=1", "evolution.crossovers=1"]
    out = CliRunner().invoke(
        cli,
        [
            "search",
            "glora",
            *where,
            *few,
            "--out",
            str(tmp_path / "g"),
            "--largest",
            "900",
            *small,
            "evolution.generations=2",
        ],
    )
    assert out.exit_code == 0, out.output
    assert out.stdout.strip() == str(tmp_path / "g" / "adapter")
    assert "generation 2" in out.stderr
    out = CliRunner().invoke(cli, ["search", "glora", *where, "steps"])
    assert out.exit_code == 2 and "KEY=VALUE" in out.stderr
