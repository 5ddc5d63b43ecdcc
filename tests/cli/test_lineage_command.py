"""`lorica lineage`, and the three ways to go on with an adapter: continue it, stack on it, merge it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lorica.adapters.lineage import Data, sha256_of
from lorica.adapters.parents import note_training
from lorica.engine.host import Host
from lorica.methods import make_method
from lorica.models import load
from lorica.recipes.graph_layout import place

from .conftest import Run

Ask = Callable[..., Any]
Refuse = Callable[..., dict[str, Any]]
RECIPE = {"name": "sft", "steps": 3}


def train(run: Run, rows: Path, out: str, *more: Any) -> Path:
    result = run("train", "--data", rows, "--out", out, "--steps", 1, "--batch-size", 4, *more)
    assert result.exit_code == 0, result.stderr
    return Path(result.stdout.strip())


@pytest.fixture
def family(tmp_path: Path, small: str) -> dict[str, Path]:
    """An adapter, one that continues it, and one that stands on it; made without training."""
    host = Host(load(small))
    note_training(host.add("first", make_method("lora", rank=2)), host.backbone, RECIPE, Data("rows.jsonl", "ab12", 16))
    host.save("first/adapter", "first")
    host.continue_from("first/adapter", "further").flat.add_(1e-3)
    note_training(host.adapter("further"), host.backbone, RECIPE)
    host.save("further/adapter", "further")
    host.add("second", make_method("ia3"), on="first")
    host.save("second/adapter", "second")
    return {name: Path(name, "adapter") for name in ("first", "further", "second")}


def edges(found: Any) -> set[tuple[str, str, str]]:
    paths = {node["key"]: str(Path(node["path"]).relative_to(Path.cwd())) for node in found["nodes"]}
    return {(paths[e["child"]], e["relation"], paths[e["parent"]]) for e in found["edges"]}


def test_the_three_ways_make_three_relations_and_one_graph(run: Run, ask: Ask, rows: Path, small: str) -> None:
    base = ("--model", small)
    first = train(run, rows, "first", *base, "method.rank=2")
    train(run, rows, "further", *base, "--continue", first)
    second = train(run, rows, "second", *base, "--stack-on", first, "--method", "ia3")
    assert run("merge", first, second, "--out", "merged").exit_code == 0
    train(run, rows, "third", "--model", "merged", "method.rank=2")
    found = ask("lineage", ".")
    assert edges(found) == {
        ("further/adapter", "continued-from", "first/adapter"),
        ("second/adapter", "stacked-on", "first/adapter"),
        ("merged", "merged-from", "first/adapter"),
        ("merged", "merged-from", "second/adapter"),
        ("third/adapter", "base", "merged"),
    }
    assert [Path(root).parts[-2] for root in found["roots"]] == ["further", "third"]
    assert found["problems"] == []
    shutil.rmtree("merged")  # what was folded in is known without it
    assert edges(ask("lineage", "third")) == {
        ("third/adapter", "trained-from", "first/adapter"),
        ("third/adapter", "trained-from", "second/adapter"),
        ("second/adapter", "stacked-on", "first/adapter"),
    }


def test_the_tree_names_hash_method_base_data_and_recipe(run: Run, family: dict[str, Path]) -> None:
    result = run("lineage", family["further"])
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["further/adapter", sha256_of(family["further"])[:8], "lora,", "rank", "2"]
    assert lines[1].startswith("│  on ")
    assert lines[2] == "│  trained by sft, 3 steps"
    assert lines[3] == f"└─ continued-from  first/adapter  {sha256_of(family['first'])[:8]}  lora, rank 2"
    assert lines[-1] == "      data rows.jsonl (16 rows, ab12)"


def test_a_parent_that_moved_is_found_by_its_hash_where_it_is_looked_for(
    run: Run, ask: Ask, family: dict[str, Path]
) -> None:
    Path("archive").mkdir()
    shutil.move("first/adapter", "archive/old")
    result = run("lineage", family["second"])
    assert "MISSING" in result.stdout
    assert "is not there" in result.stderr
    for args in (("second", "archive"), ("second", "--search", "archive")):
        found = ask("lineage", *args)
        assert found["problems"] == []
        assert ("second/adapter", "stacked-on", "archive/old") in edges(found)
        assert {node["status"] for node in found["nodes"]} == {"here", "moved"}


def test_a_parent_that_changed_since_is_said_and_not_followed(run: Run, ask: Ask, family: dict[str, Path]) -> None:
    shutil.rmtree("first/adapter")
    shutil.copytree("further/adapter", "first/adapter")
    result = run("lineage", family["second"])
    assert "CHANGED" in result.stdout
    assert "has changed since: its hash differs" in result.stderr
    found = ask("lineage", family["second"])
    assert [node["status"] for node in found["nodes"]] == ["here", "changed"]
    assert len(found["problems"]) == 1


def test_a_folder_written_over_by_its_own_descendant_is_no_circle(ask: Ask, family: dict[str, Path]) -> None:
    shutil.copytree("first/adapter", "copy")
    shutil.rmtree("first/adapter")
    shutil.copytree("further/adapter", "first/adapter")  # it continues what lay here
    found = ask("lineage", "first/adapter", "--search", "copy")
    assert edges(found) == {("first/adapter", "continued-from", "copy")}


def test_pictures_and_graphviz(run: Run, family: dict[str, Path]) -> None:
    for name, start in (("graph.png", b"\x89PNG"), ("graph.svg", b"<?xml")):
        assert run("lineage", ".", "--out", name).exit_code == 0
        assert Path(name).read_bytes().startswith(start)
    text = run("lineage", ".", "--dot").stdout
    assert text.startswith("digraph lineage {")
    assert text.count(" -> ") == 2
    assert 'label="stacked-on", style=dashed' in text


def test_wrong_usage_and_places_without_adapters(run: Run, refuse: Refuse, tmp_path: Path) -> None:
    assert run("lineage").exit_code == 2
    assert run("lineage", ".", "--json", "--dot").exit_code == 2
    assert run("lineage", ".", "--out", "graph.gif").exit_code == 2
    assert "holds no adapter" in refuse("lineage", ".")["message"]
    assert "is not there" in refuse("lineage", "nowhere")["message"]


def test_a_stack_is_sampled_as_it_was_trained_and_a_part_of_it_is_said(
    run: Run, family: dict[str, Path], small: str
) -> None:
    ask_for = ("--model", small, "--prompt", "wake me at 3", "--max-tokens", 4)
    whole = run("sample", "--adapter", family["first"], "--adapter", family["second"], *ask_for)
    assert whole.exit_code == 0
    assert "warning" not in whole.stderr
    part = run("sample", "--adapter", family["second"], *ask_for)
    assert part.exit_code == 0
    assert "was trained on top of" in part.stderr


def test_a_run_says_how_it_begins_and_which_options_open_it(
    run: Run, rows: Path, family: dict[str, Path], small: str
) -> None:
    args = ("train", "--model", small, "--data", rows, "--steps", 1, "--batch-size", 4)
    continued = run(*args, "--out", "out", "--continue", family["first"])
    assert "optimiser and schedule begin anew" in continued.stderr
    stacked = run(*args, "--out", "again", "--stack-on", family["first"])
    assert "It is stacked on first/adapter, frozen in every pass." in stacked.stderr
    assert "--adapter first/adapter --adapter again/adapter" in stacked.stderr


def test_a_setting_that_differs_from_the_continued_adapters_is_refused(
    refuse: Refuse, rows: Path, family: dict[str, Path], small: str
) -> None:
    args = ("train", "--model", small, "--data", rows, "--continue", family["first"])
    assert "method.name is 'dora'" in refuse(*args, "--method", "dora")["message"]
    assert "method.rank is 16" in refuse(*args, "method.rank=16")["message"]
    assert "The targets leave out" in refuse(*args, "targets.layers=0")["message"]


def test_a_single_layer_may_be_named(ask: Ask, rows: Path) -> None:
    found = ask("train", "--data", rows, "targets.layers=3", "--dry-run")
    assert found["config"]["targets"]["layers"] == "3"
    assert found["trained"]["sites"] == 7


def test_lines_of_a_picture_go_around_boxes_and_boxes_do_not_overlap() -> None:
    rows = {"a": 3, "b": 2, "c": 1, "d": 0, "e": 0}
    pairs = [("a", "b"), ("b", "c"), ("c", "d"), ("a", "d"), ("a", "c"), ("b", "e")]
    placed = place(rows, pairs)
    for row in range(4):
        here = sorted(placed.columns[key] for key in rows if rows[key] == row)
        assert all(right - left >= 0.999 for left, right in pairwise(here))
    for line in placed.lines:
        assert [row for _, row in line] == list(range(line[0][1], line[-1][1] - 1, -1))
        for column, row in line[1:-1]:
            assert all(abs(column - placed.columns[key]) > 0.7 for key in rows if rows[key] == row)
