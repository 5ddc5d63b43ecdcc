"""`lorica compare`: flags, tables, one JSON document, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .conftest import Run

SHORT = ("--steps", 2, "--batch-size", 2, "dtype=float32", "halvings=1", "answer_rows=2", "timing_pairs=1")


def test_a_table_is_printed_and_files_are_written(run: Run, rows: Path, small: str) -> None:
    result = run(
        "compare", "--model", small, "--methods", "lora:rank=2:lr=0.01,bias", "--data", rows, "--out", "out", *SHORT
    )
    assert result.exit_code == 0, result.stderr
    for said in ("method", "(base)", "lora:rank=2:lr=0.01", "Not compared: bias.", "validation rows", "Done in"):
        assert said in result.stdout
    assert "steps 1 to 1 of 2: 1 candidates" in result.stderr and "held out of the training file" in result.stderr
    assert {path.name for path in Path("out").iterdir()} == {"results.json", "table.md", "plot.png"}


def test_flags_are_fields_and_json_is_one_document(ask: Callable[..., Any], rows: Path, small: str) -> None:
    found = ask(
        "compare", "--methods", "lora:rank=2,ia3:targets=k_proj", "--data", rows, "--validation", rows, "--test", rows,
        "--lr-grid", "1e-3,1e-2", "--seeds", "3,4", "--targets", "q_proj,v_proj", "--together", 3, "--model", small,
        "optimizer.schedule=linear", *SHORT,
    )  # fmt: skip
    config = found["config"]
    assert config["lr_grid"] == [0.001, 0.01] and config["seeds"] == [3, 4] and config["together"] == 3
    assert config["targets"]["include"] == ["q_proj", "v_proj"] and config["optimizer"]["schedule"] == "linear"
    assert {row["label"] for row in found["rows"]} == {"lora:rank=2", "ia3:targets=k_proj"}
    assert all(set(row["losses"]) == {"3", "4"} for row in found["rows"])
    assert json.dumps(found["base"]["loss"]) and found["rows_of"]["answered"] == 2


def test_what_is_wrong_is_one_sentence(refuse: Callable[..., dict[str, Any]], run: Run, rows: Path) -> None:
    assert "Did you mean 'lora'" in refuse("compare", "--methods", "lorra", "--data", rows)["message"]
    assert "named twice" in refuse("compare", "--methods", "lora,lora", "--data", rows)["message"]
    assert "tunes optimizer.lr" in refuse("compare", "--methods", "lora", "--data", rows, "optimizer.lr=1")["message"]
    for args in ((), ("--methods", "lora"), ("--methods", "lora", "--data", rows, "dora")):
        assert run("compare", *args).exit_code == 2, args
    assert run("compare", "--methods", "lora", "--data", rows, "--save-adapters").exit_code == 2
