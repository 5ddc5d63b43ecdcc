"""Results that are kept by their settings."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lorica.core.errors import FormatError
from lorica.recipes.ledger import Ledger


def never() -> float:
    raise AssertionError("it is known")


def test_a_value_is_computed_once_and_known_to_the_next_ledger(tmp_path: Path) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    ledger = Ledger(path)
    assert ledger.value({"b": [1, 2], "a": 0.1}, lambda: 0.25) == 0.25
    assert ledger.value({"a": 0.1, "b": [1, 2]}, never) == 0.25
    again = Ledger(path)
    assert again.value({"a": 0.1, "b": (1, 2)}, never) == 0.25
    assert (again.reused, again.computed, len(again)) == (1, 0, 1)
    assert again.value({"a": 0.2, "b": [1, 2]}, lambda: 1) == 1
    assert Ledger().value({"a": 0.1, "b": [1, 2]}, lambda: 3.0) == 3.0


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_a_value_that_is_not_finite_is_the_worst(tmp_path: Path, value: float) -> None:
    path = tmp_path / "runs.jsonl"
    assert Ledger(path).value({"lr": 9}, lambda: value) == -math.inf
    assert "null" in path.read_text()
    assert Ledger(path).value({"lr": 9}, never) == -math.inf


def test_a_line_that_a_kill_cut_short_is_dropped_and_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    ledger = Ledger(path)
    ledger.value({"n": 1}, lambda: 1.0)
    ledger.value({"n": 2}, lambda: 2.0)
    path.write_text(path.read_text()[:-7])
    again = Ledger(path)
    assert again.value({"n": 1}, never) == 1.0
    assert again.value({"n": 2}, lambda: 5.0) == 5.0
    assert [Ledger(path).value({"n": n}, never) for n in (1, 2)] == [1.0, 5.0]


def test_a_failed_computation_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    with pytest.raises(AssertionError):
        Ledger(path).value({"n": 1}, never)
    assert Ledger(path).value({"n": 1}, lambda: 2.0) == 2.0


@pytest.mark.parametrize("text", ["{]\n", '{"value": 1}\n', "[1]\n", '{"settings": {}, "value": "much"}\n'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(text)
    with pytest.raises(FormatError, match="Line 1 of .*runs.jsonl"):
        Ledger(path)
