from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.core.errors import ConfigError, DataError
from lorica.data.example import Example, truncate

weights = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=12).filter(any)
examples = st.builds(lambda w: Example(tuple(range(len(w) + 1)), (0.0, *w)), weights)


@given(rows=st.lists(examples, min_size=1, max_size=8), limit=st.integers(2, 14))
def test_every_token_that_truncation_takes_is_in_the_report(rows: list[Example], limit: int) -> None:
    if not any(any(row.weights[:limit]) for row in rows):
        with pytest.raises(
            DataError, match=f"Cut to {limit} tokens, none of the {len(rows)} rows keeps a trained token"
        ):
            truncate(rows, limit)
        return
    kept, report = truncate(rows, limit)
    assert sum(map(len, rows)) - sum(map(len, kept)) == report.tokens_lost
    assert len(rows) - len(kept) == len(report.dropped)
    assert sorted((*report.rows, *report.dropped)) == [i for i, row in enumerate(rows) if len(row) > limit]
    assert report.count == len(report.rows) + len(report.dropped)
    survivors = [row for i, row in enumerate(rows) if i not in report.dropped]
    assert [row.tokens[:limit] for row in survivors] == [row.tokens for row in kept]
    assert [row.weights[:limit] for row in survivors] == [row.weights for row in kept]
    assert all(row.trained and len(row) <= limit for row in kept)


def test_the_report_says_what_was_cut_and_dropped() -> None:
    rows = [Example((1, 2, 3, 4), (0, 1, 1, 1)), Example((1, 2, 3, 4), (0, 0, 0, 1)), Example((1, 2), (0, 1))]
    _, report = truncate(rows, 3)
    assert report.sentence() == (
        "2 of 3 rows longer than 3 tokens: 5 tokens cut off, 1 of these rows dropped because no trained token is left."
    )
    assert truncate(rows, 4)[1].sentence() == "No row is longer than 4 tokens; nothing is truncated."


@pytest.mark.parametrize("limit", [1, 0, -3])
def test_a_limit_that_leaves_nothing_to_predict_is_refused(limit: int) -> None:
    with pytest.raises(ConfigError, match=f"max_length is {limit}"):
        truncate([Example((1, 2), (0, 1))], limit)


@pytest.mark.parametrize(
    ("tokens", "given_weights", "said"),
    [
        ((1, 2), (0.0,), "line 3 has 2 tokens and 1 loss weights"),
        ((1, 2), (0.0, math.nan), "line 3 has a loss weight that is not a finite number"),
        ((1, 2), (0.0, math.inf), "line 3 has a loss weight that is not a finite number"),
        ((1, 2), (1.0, 1.0), "line 3 has a loss weight on its first token"),
    ],
)
def test_weights_that_mean_nothing_are_refused(
    tokens: tuple[int, ...], given_weights: tuple[float, ...], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        Example(tokens, given_weights, "line 3")


def test_the_place_of_an_example_does_not_make_it_another_one() -> None:
    assert Example((1, 2), (0.0, 1.0), "a") == Example((1, 2), (0.0, 1.0), "b")
