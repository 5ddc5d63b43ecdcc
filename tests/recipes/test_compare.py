"""A comparison: methods in the same batches, alone and among others, few or many at a time, healthy or ill."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorica
from lorica.adapters.files import load_adapter
from lorica.adapters.parents import lineage_of
from lorica.client.local import Service
from lorica.core.errors import ConfigError, DataError, MethodError, StorageError
from lorica.data.example import Example
from lorica.data.records import load_records
from lorica.data.render import Renderer, prepare
from lorica.methods.lora import LoRA
from lorica.recipes import compare
from lorica.recipes.compare.config import CompareConfig, default_rate, entries, split
from lorica.recipes.compare.costs import Costs, Saved, seconds
from lorica.recipes.compare.data import question, read_parts
from lorica.recipes.compare.plot import comparison_plot
from lorica.recipes.compare.ready import prepare as make_ready
from lorica.recipes.compare.report import Base, Comparison, Rate, Row, edge_note, markdown
from lorica.recipes.observer import Observer

Make = Callable[..., CompareConfig]


@pytest.fixture
def setup(rows: Path, small: str) -> Make:
    """A comparison of a few steps on a small model."""

    def make(*methods: str, **changes: Any) -> CompareConfig:
        values: dict[str, Any] = {
            "methods": methods,
            "model": small,
            "dtype": "float32",
            "data": {"path": str(rows)},
            "validation_rows": 2,
            "test_rows": 2,
            "answer_rows": 0,
            "lr_factors": [0.3, 2.0],
            "halvings": 1,
            "steps": 2,
            "batch_size": 2,
            "timing_pairs": 0,
        }
        return CompareConfig.parse(values | changes)

    return make


def numbers(found: Comparison) -> dict[str, Any]:
    """What a comparison found, without times."""
    return {
        row.label: (row.lr, row.curve, row.losses, [(r.lr, r.validation, r.test, r.beaten) for r in row.rates])
        for row in found.rows
    }


def assert_equal(one: Any, two: Any) -> None:
    """Equal up to the rounding of other joint batches."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, tuple | list):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_equal(a, b)
    elif isinstance(one, float):
        assert one == pytest.approx(two, rel=2e-4, abs=1e-6)
    else:
        assert one == two


# -- entries -----------------------------------------------------------------------------------------------------


def test_entries_hold_settings_targets_and_rates_of_their_own() -> None:
    plain, tuned = entries(["lora", "lora:rank=4:targets=[q_proj, v_proj]:lr=[1e-3,3e-4]"])
    assert plain.method == LoRA() and plain.targets is None and plain.rates is None
    assert tuned.method == LoRA(rank=4) and tuned.rates == (3e-4, 1e-3)
    assert tuned.targets is not None and tuned.targets.include == ("q_proj", "v_proj")


def test_all_is_the_registry_and_a_minus_takes_out() -> None:
    names = [e.label for e in entries(["all", "-delta", "lora:rank=2"])]
    assert set(names) == set(lorica.all_methods()) - {"delta"} | {"lora:rank=2"}


@pytest.mark.parametrize(
    ("texts", "error", "said"),
    [
        (["lora", "lora"], ConfigError, "'lora' is named twice"),
        (["all", "dora"], ConfigError, "'dora' is named twice"),
        (["-dora"], ConfigError, "takes out 'dora', which is not there"),
        (["lora", "-lora"], ConfigError, "nothing to compare"),
        (["lorra"], MethodError, "Did you mean 'lora'"),
        (["lora:rank"], ConfigError, "not of the form setting=value"),
        (["lora:rank=2:rank=3"], ConfigError, "sets 'rank' twice"),
        (["lora:ranks=2"], ConfigError, "'ranks'"),
        (["lora:lr=fast"], ConfigError, "must be different positive numbers"),
        (["lora:lr=[0.1,0.1]"], ConfigError, "must be different positive numbers"),
    ],
)
def test_a_wrong_entry_is_refused_with_a_sentence(texts: list[str], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        entries(texts)


def test_signs_inside_brackets_divide_nothing() -> None:
    assert split("prompt:init_ids=[1,2],lora", ",") == ["prompt:init_ids=[1,2]", "lora"]


def test_a_rate_of_the_optimiser_is_refused_because_it_is_tuned(setup: Make) -> None:
    with pytest.raises(ConfigError, match="tunes optimizer.lr"):
        setup("lora", optimizer={"lr": 1e-3})


@pytest.mark.parametrize("seeds", [[], [1, 1], [-1]])
def test_seeds_must_differ(setup: Make, seeds: list[int]) -> None:
    with pytest.raises(ConfigError, match="different integers"):
        setup("lora", seeds=seeds)


def test_rates_are_around_the_methods_own_or_as_given(setup: Make) -> None:
    one, two = entries(["ia3", "lora:lr=0.5"])
    around = setup("ia3", lr_scale=0.1)
    assert around.rates(one) == pytest.approx([0.03 * default_rate("ia3"), 0.2 * default_rate("ia3")])
    assert around.rates(two) == (0.5,)
    assert setup("ia3", lr_grid=[0.2, 0.1]).rates(one) == (0.1, 0.2)


def test_rungs_halve_the_steps_and_end_with_the_run(setup: Make) -> None:
    assert setup("lora", steps=100, halvings=2).rungs() == [25, 50, 100]
    assert setup("lora", steps=100, halvings=0).rungs() == [100]
    assert setup("lora", steps=1, halvings=2).rungs() == [1]


# -- data --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(lorica.load("nano").tokenizer)


def test_parts_share_no_row_and_equal_rows_stay_together(setup: Make, renderer: Renderer) -> None:
    parts = read_parts(setup("lora", validation_rows=2, test_rows=2), renderer)
    seen = [{e.tokens for e in part} for part in (parts.train, parts.validation, parts.test)]
    assert [len(parts.validation), len(parts.test)] == [2, 2]  # 12 different rows of 24
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert len(set.union(*seen)) == 12
    again = read_parts(setup("lora", validation_rows=2, test_rows=2, seeds=[5]), renderer)
    assert [e.tokens for e in again.test] == [e.tokens for e in parts.test]


def test_held_out_rows_that_are_in_the_training_file_are_told(setup: Make, renderer: Renderer, rows: Path) -> None:
    parts = read_parts(setup("lora", test_path=str(rows)), renderer)
    assert any("are in the training file too" in text for text in parts.said)
    assert any("2 of 24 rows" in text for text in parts.said)


def test_too_few_rows_to_hold_some_out_are_refused(setup: Make, renderer: Renderer, tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"row {i}"}) for i in range(3)))
    with pytest.raises(DataError, match="too few to hold some out"):
        read_parts(setup("lora", data={"path": str(path)}), renderer)


def test_a_question_is_the_prompt_and_its_answer_and_running_text_asks_nothing(renderer: Renderer, rows: Path) -> None:
    record = load_records(rows).records[0]
    (example, *_) = prepare(load_records(rows), renderer, 256).examples
    asked = question(example, renderer)
    assert asked is not None
    assert asked.tokens == renderer.prompt(record.messages[:-1])  # type: ignore[union-attr]
    assert asked.expected == "alarm 7 pm"
    assert question(Example.whole(example.tokens), renderer) is None
    cut = Example(example.tokens[:-2], example.weights[:-2])
    assert question(cut, renderer) is None


# -- comparing ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_method_alone_and_among_others_has_equal_losses(setup: Make) -> None:
    mixed = ("dora:rank=4", "vera:rank=16", "ia3", "prompt:tokens=3", "prefix:tokens=3", "lora:rank=4:dropout=0.2")
    among = numbers(compare.run(setup(*mixed)))
    assert set(among) == set(mixed)
    for label in ("lora:rank=4:dropout=0.2", "prefix:tokens=3", "prompt:tokens=3"):
        assert_equal(numbers(compare.run(setup(label)))[label], among[label])


@pytest.mark.slow
def test_the_result_does_not_depend_on_how_many_are_in_memory(setup: Make) -> None:
    methods = ("lora:rank=4:dropout=0.2", "pissa:rank=4", "vera:rank=16")
    all_, two = (numbers(compare.run(setup(*methods, together=n, seeds=[0, 1]))) for n in (40, 2))
    assert_equal(two, all_)


def test_a_comparison_equals_a_training_run_of_its_own(setup: Make) -> None:
    config = setup("lora:rank=4:lr=0.01", halvings=0)
    found = compare.run(config)
    ready = make_ready(config, Observer())
    client = Service(lorica.load(config.model, dtype="float32")).training_client(
        LoRA(rank=4), seed=0, optimizer=config.optimizer.replace(lr=0.01), steps=config.steps
    )
    losses = []
    for batch in ready.order(0):
        losses.append(client.forward_backward(batch).mean)
        client.optim_step()
    assert found.rows[0].curve == pytest.approx(losses, rel=1e-5)
    assert found.rows[0].loss == pytest.approx(client.forward(ready.parts.test).mean, rel=1e-4)


@pytest.mark.slow
def test_a_candidate_whose_numbers_are_not_finite_drops_out_and_hurts_nobody(setup: Make) -> None:
    nano = {"model": "nano"}  # on which DoRA overflows within two steps
    found = compare.run(setup("lora:rank=4:lr=[0.01,1e37]", "dora:rank=4:lr=1e37", "ia3", **nano))
    assert {row.label for row in found.rows} == {"lora:rank=4:lr=[0.01,1e37]", "ia3"}
    ill = next(row for row in found.rows if row.method == "lora")
    assert ill.lr == 0.01 and any("not finite" in note for note in ill.notes)
    (absent,) = found.absent
    assert absent.label == "dora:rank=4:lr=1e37"
    assert "No learning rate could be trained to the end" in absent.reason and "not finite" in absent.reason
    well = compare.run(setup("lora:rank=4:lr=0.01", "ia3", **nano))
    assert_equal(numbers(found)["ia3"], numbers(well)["ia3"])
    assert_equal(list(ill.curve), list(next(r for r in well.rows if r.method == "lora").curve))


def test_methods_that_the_base_cannot_host_are_listed_with_the_reason(setup: Make) -> None:
    found = compare.run(setup("bias", "ia3", "lora:targets=nowhere"))
    assert [row.label for row in found.rows] == ["ia3"]
    reasons = {one.label: one.reason for one in found.absent}
    assert "all-bias" in reasons["bias"]
    assert "'nowhere' matches no site" in reasons["lora:targets=nowhere"]


def test_the_best_rate_is_chosen_by_validation_and_the_worse_half_is_given_up(setup: Make) -> None:
    (row,) = compare.run(setup("lora:rank=4", lr_factors=[0.1, 0.3, 1.0, 3.0, 10.0], halvings=2, steps=8)).rows
    beaten = [rate.beaten for rate in row.rates]
    assert beaten.count(2) == 2 and beaten.count(4) == 1 and beaten.count(None) == 2
    last = {rate.lr: rate.validation[8] for rate in row.rates if rate.beaten is None}
    assert row.lr == min(last, key=lambda lr: last[lr])
    at_two = sorted(row.rates, key=lambda rate: rate.validation[2])
    assert all(rate.beaten == 2 for rate in at_two[3:]) and len(row.curve) == 8
    assert [rate.test is None for rate in row.rates] == [rate.beaten is not None for rate in row.rates]


def test_seeds_give_a_mean_and_a_spread_and_only_the_winner_runs_again(setup: Make) -> None:
    found = compare.run(setup("lora:rank=4", seeds=[3, 4, 5]))
    (row,) = found.rows
    assert set(row.losses) == {3, 4, 5} and len(set(row.losses.values())) == 3
    assert row.loss == pytest.approx(sum(row.losses.values()) / 3) and row.spread is not None and row.spread > 0
    assert "mean ± standard deviation over 3 seeds" in markdown(found)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(setup: Make) -> None:
    config = setup("lora:rank=4:dropout=0.1", "ia3")
    assert numbers(compare.run(config)) == numbers(compare.run(config))


@pytest.mark.slow
def test_files_hold_everything_and_a_folder_is_not_written_twice(setup: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = setup("lora:rank=4", "bias", answer_rows=1, timing_pairs=1)
    found = compare.run(config, out, save_adapters=True)
    document = json.loads((out / "results.json").read_text())
    (row,) = document["rows"]
    assert row["loss"] == found.rows[0].loss and row["costs"]["parameters"] == found.rows[0].costs.parameters
    assert document["rows_of"]["answered"] == 1 and 0 <= row["exact"]["0"] <= 1
    assert "lr" not in document["config"]["optimizer"]
    assert CompareConfig.parse(document["config"]) == config
    table = (out / "table.md").read_text()
    for said in ("| lora:rank=4 |", "| (base) |", "Not compared: bias.", "One seed"):
        assert said in table
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    base = lorica.load(config.model, dtype="float32")
    winner = load_adapter(out / "adapters" / "lora_rank=4", base, "x")
    assert winner.method == LoRA(rank=4)
    known = lineage_of(winner)
    assert known.base is not None and known.base.fingerprint == base.fingerprint()
    assert known.recipe is not None and known.data is not None
    assert (known.recipe["name"], known.recipe["optimizer"]["lr"]) == ("compare", found.rows[0].lr)
    assert (known.data.path, known.data.sha256) == (config.data.path, document["environment"]["data"]["train"])
    with pytest.raises(StorageError, match="holds a comparison already"):
        compare.run(config, out)


def test_a_targets_setting_applies_to_every_method_and_an_entrys_own_wins(setup: Make) -> None:
    found = compare.run(setup("lora:rank=2", "lora:rank=2:targets=v_proj", targets={"include": ["q_proj"]}))
    assert {tuple(row.targets["include"]) for row in found.rows} == {("q_proj",), ("v_proj",)}


def test_the_base_may_be_packed(setup: Make) -> None:
    config = setup("lora:rank=2", quantize="nf4,block=128")
    found = compare.run(config)
    assert found.config["quantize"]["block"] == 128 and math.isfinite(found.rows[0].loss)
    assert found.base.parameters == lorica.load(config.model).parameter_count()


# -- costs -------------------------------------------------------------------------------------------------------


def test_costs_are_of_the_method_alone(setup: Make) -> None:
    ready = make_ready(setup("lora:rank=4", "vera:rank=16", timing_pairs=1), Observer())
    lora, vera = ready.costs.values()
    assert lora.adapter_bytes == 4 * 4 * lora.parameters  # value, gradient, two moments, float32
    assert lora.frozen == 0 < vera.frozen
    assert vera.adapter_bytes == 16 * vera.parameters + 4 * vera.frozen
    assert lora.saved_bytes > 0 and lora.step_time_over_lora is not None and lora.step_time_over_lora > 0
    assert not ready.service.host.adapters  # nothing stays behind


def test_saved_bytes_count_each_storage_once_and_not_what_is_given() -> None:
    weight = torch.ones(8, 8, requires_grad=True)
    x = torch.ones(4, 8, requires_grad=True)
    with Saved([weight]) as saved:
        (x @ weight).pow(2).sum() + (x @ weight).sum()
    assert saved.bytes == 2 * 4 * 8 * 4  # x, and the product that is squared
    assert seconds(lambda: None) >= 0


# -- the report --------------------------------------------------------------------------------------------------


def test_a_best_rate_at_the_end_of_its_grid_is_told() -> None:
    assert edge_note([1.0, 2.0, 3.0], 3.0) is not None and edge_note([1.0, 2.0, 3.0], 2.0) is None
    assert "smallest" in str(edge_note([1.0, 2.0], 1.0)) and edge_note([1.0], 1.0) is None


def test_forty_methods_one_of_which_diverged_can_be_drawn() -> None:
    costs = Costs(100, 0, 0.1, 10, 10, None)
    losses = [1.0 + i / 40 for i in range(39)] + [1e9]
    rows = tuple(
        Row(
            f"m{i}", "lora", {}, {}, 0.1, {0: loss}, {0: None}, costs,
            (Rate(0.1, {1: loss}, loss, None, None), Rate(1.0, {1: 1e12}, None, None, 1)), (loss,), (),
        )
        for i, loss in enumerate(losses)
    )  # fmt: skip
    found = Comparison({}, Base(4.0, None, 1000), rows, (), {"answered": 0}, (), {}, {})
    assert len(comparison_plot(found)) > 10_000
    assert math.isclose(rows[0].loss, 1.0) and rows[0].spread is None and rows[0].right is None
