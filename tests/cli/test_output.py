"""Text and JSON of results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.cli.output import duration, size, table, wants_colour
from lorica.core.jsonable import plain

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(Path("a/b")),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(VALUES)
def test_any_result_becomes_strict_json(value: Any) -> None:
    json.loads(json.dumps(plain(value), allow_nan=False))


def test_numbers_that_are_not_finite_are_null() -> None:
    assert plain({"a": math.nan, "b": [math.inf], "c": {3, 1}}) == {"a": None, "b": [None], "c": [1, 3]}


def test_columns_are_aligned_and_numbers_stand_to_the_right() -> None:
    text = table(("name", "count"), [("a", 1000), ("long name", 2)])
    assert text.split("\n") == ["name       count", "a          1,000", "long name      2"]


@given(st.floats(0, 1e15))
def test_sizes_keep_three_figures_before_the_unit(count: float) -> None:
    number, unit = size(count).split()
    assert float(number) <= 1000
    assert unit in ("B", "kB", "MB", "GB", "TB")
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(number) * scale == pytest.approx(count, rel=0.1, abs=0.5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.21, "4.2 s"), (59.96, "60.0 s"), (123, "2 min 03 s"), (3599.6, "1 h 00 min"), (3900, "1 h 05 min")],
)
def test_durations_read_like_speech(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Terminal:
    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals_without_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal: IO[str] = Terminal()  # type: ignore[assignment]
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert wants_colour(terminal)
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_colour(terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(terminal)
