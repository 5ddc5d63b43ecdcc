"""Rows over seeds become means and spreads, and nothing that is wrong with them passes in silence."""

from __future__ import annotations

import math

import pytest

from lorica.core.errors import MethodError
from lorica.papers.kit.judging import above, average, quality
from lorica.papers.kit.page import cells, number, shown
from lorica.papers.kit.table import Cell, Table

KEYS, COLUMNS = ("method", "lr"), ("test loss", "test accuracy", "steps")


def table(*seeds):
    return Table.of(seeds, KEYS, COLUMNS)


def row(method, lr, loss, **more):
    return {"method": method, "lr": lr, "test loss": loss, **more}


def test_a_cell_has_the_mean_and_the_sample_deviation_of_its_seeds():
    cell = table([row("a", 1e-3, 1.0)], [row("a", 1e-3, 2.0)], [row("a", 1e-3, 6.0)]).cell("test loss", method="a")
    assert cell.values == (1.0, 2.0, 6.0) and cell.mean == 3.0
    assert cell.spread == pytest.approx(7**0.5) and cell.error == pytest.approx((7 / 3) ** 0.5)


def test_one_seed_has_no_spread():
    assert table([row("a", 1, 2.0)]).cell("test loss", method="a").spread == 0.0


def test_a_value_that_is_not_finite_makes_the_mean_not_finite():
    assert Cell((1.0, math.inf)).mean == math.inf and math.isnan(Cell((math.nan, math.inf)).mean)
    assert math.isnan(Cell((1.0, math.inf)).spread)


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ([[]], "gave no rows"),
        ([[row("a", 1, 1.0)], [row("b", 1, 1.0)]], "different rows or columns"),
        ([[row("a", 1, 1.0)], [row("a", 1, 1.0, steps=3)]], "different rows or columns"),
        ([[row("a", 1, 1.0), row("a", 1, 2.0)]], "same key"),
        ([[{"method": "a", "test lose": 1.0}]], "'test lose', which is not declared. Did you mean 'test loss'"),
        ([[{"method": "a", "test loss": "low"}]], "holds the text 'low'"),
    ],
)
def test_rows_that_do_not_fit_are_refused(seeds, said):
    with pytest.raises(MethodError, match=said):
        table(*seeds)


def test_seeds_may_give_their_rows_in_different_order():
    found = table([row("a", 1, 1.0), row("b", 1, 2.0)], [row("b", 1, 4.0), row("a", 1, 3.0)])
    assert found.cell("test loss", method="b").values == (2.0, 4.0)


def test_tuning_takes_the_best_mean_of_each_key_and_never_one_that_diverged():
    found = table(
        [row("a", 1, 3.0), row("a", 2, 1.0), row("b", 1, 2.0), row("b", 2, math.nan), {"method": "c", "test loss": 5.0}]
    ).tuned("test loss", over="lr")
    assert [(line.key["method"], line.key.get("lr")) for line in found] == [("a", 2), ("b", 1), ("c", None)]


def test_tuning_keeps_a_line_where_every_rate_diverged():
    found = table([row("a", 1, math.nan), row("a", 2, math.inf)]).tuned("test loss", over="lr")
    assert [line.key["lr"] for line in found] == [1]


def test_a_key_that_names_no_line_or_several_is_an_error():
    found = table([row("a", 1, 1.0), row("a", 2, 1.0)])
    with pytest.raises(MethodError, match="2 lines with method=a"):
        found.line(method="a")
    with pytest.raises(MethodError, match="0 lines"):
        found.line(method="z")
    with pytest.raises(MethodError, match="no column 'test los'"):
        found.cell("test los", method="a", lr=1)


def test_a_series_is_a_curve_with_its_spread():
    found = table([row("a", 1, 1.0), row("a", 2, 3.0)], [row("a", 1, 3.0), row("a", 2, 3.0)])
    series = found.series("curve", "lr", "test loss", method="a")
    assert series.x == (1.0, 2.0) and series.y == (2.0, 3.0) and series.spread == (pytest.approx(2**0.5), 0.0)


def test_quality_is_accuracy_then_exact_match_then_loss():
    assert quality(table([row("a", 1, 1.0, **{"test accuracy": 0.5})])).column == "test accuracy"
    measure = quality(table([row("a", 1, 1.0), row("b", 1, 3.0)]))
    assert (measure.column, measure.largest) == ("test loss", False)
    assert measure.gain(table([row("a", 1, 1.0), row("b", 1, 3.0)]), {"method": "a"}, {"method": "b"}).values == (2.0,)


def test_a_difference_counts_where_a_one_sided_t_test_says_so():
    assert above(Cell((1.0, 1.1, 0.9))) is True and above(Cell((1.0,))) is None
    assert above(Cell((-1.0, -1.1, -0.9))) is False
    assert above(Cell((1.0, -0.9, 0.2))) is None
    assert above(Cell((0.0, 1.0, 2.0))) is None  # 1.73 standard errors; three seeds need 2.92
    assert above(Cell((0.5, 0.5))) is True and above(Cell((0.5, 0.5)), 1.0) is False
    assert above(Cell((math.nan, 1.0))) is None
    assert average([Cell((1.0, 2.0)), Cell((3.0, 6.0))]).values == (2.0, 4.0)


@pytest.mark.parametrize(
    ("values", "printed"),
    [
        ((0.961, 0.985), "0.973 ± 0.017"),
        ((1234.0, 1334.0), "1,284 ± 71"),
        ((4096.0, 4096.0), "4,096"),
        ((0.25,), "0.25"),
        ((math.nan, math.nan), "diverged"),
        ((math.inf, 3.0), "never in 1 of 2"),
        ((1e-9, 3e-9), "2e-09 ± 1e-09"),
    ],
)
def test_means_are_printed_to_two_digits_of_their_spread(values, printed):
    assert number(Cell(values)) == printed


def test_keys_come_in_the_declared_order_and_absent_cells_are_blank():
    headers, rows = cells(Table.of([[{"lr": 0.01, "method": "a", "steps": 3}, {"method": "b"}]], KEYS, COLUMNS))
    assert headers == ["method", "lr", "steps"] and rows == [["a", "0.01", "3"], ["b", "", ""]]
    assert shown(True) == "yes" and shown(1e-5) == "1e-05"
