"""Rules of merging as pure functions: published tables, identities, invariances. float64 throughout."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorica.adapters.merging import all_mergings, make_merging
from lorica.adapters.merging.base import SiteChanges
from lorica.adapters.merging.change import Change, join
from lorica.adapters.merging.dare import dare, dropped, site_rng
from lorica.adapters.merging.knots import align
from lorica.adapters.merging.magnitude_prune import magnitude_prune
from lorica.adapters.merging.robustmerge import coefficients, robustmerge
from lorica.adapters.merging.selection import Selection
from lorica.adapters.merging.svd import truncate
from lorica.adapters.merging.tensors import keep_from, keep_largest, threshold_for, whole
from lorica.adapters.merging.ties import Survey, ties
from lorica.core.errors import ConfigError
from lorica.core.site import Site
from tests.methods.one import matrix, same

SITE = Site("fc", "linear", (7, 5), bias=True)
ALL = sorted(all_mergings())


def rows(*values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def change(rank: int = 3, seed: int = 0, scale: float = 2.0, bias: bool = False) -> Change:
    bias_O = matrix(7, seed=seed + 50) if bias else None
    return Change.of_factors((7, 5), matrix(rank, 5, seed=seed), matrix(7, rank, seed=seed + 25), scale, bias_O)


def dense(seed: int = 0) -> Change:
    return Change.of_dense((7, 5), matrix(7, 5, seed=seed))


def merge(name: str, changes: list[Change], weights: list[float] | None = None, **parameters: object) -> Change:
    rule = make_merging(name, **parameters)
    shares = weights or [1.0] * len(changes)
    survey = rule.survey([SiteChanges(SITE, tuple(changes), tuple(shares))])
    return rule.merge(SITE, changes, shares, survey)


def neutral(name: str) -> dict[str, object]:
    """The parameters with which a rule leaves a single parent as it is."""
    fields = all_mergings()[name].model_fields
    return {key: 1.0 for key in ("density", "keep", "scale") if key in fields}


# -- TIES: the table of both published versions -----------------------------------------------------------------------

TAUS = [vector(3, -1, 2, 0.1), vector(-2, -4, 1, 0.2), vector(1, 2, -0.5, -3)]
ONES = [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("settings_", "wanted"),
    [
        ({"elect": "total"}, (3, -4, 2, -3)),
        ({"elect": "frequency"}, (3, 2, 2, -3)),
        ({"elect": "majority", "trim": "threshold"}, (2, -2.5, 1.5, -3)),
    ],
)
def test_ties_has_the_numbers_of_both_published_versions(settings_: dict[str, str], wanted: tuple[float, ...]) -> None:
    same(ties(TAUS, ONES, 0.5, **settings_), vector(*wanted))


def test_magnitude_pruning_has_its_number() -> None:
    same(magnitude_prune(TAUS, ONES, 0.5), vector(1, -2, 2, -3))


def test_ties_of_equal_vectors_is_the_trimmed_vector() -> None:
    tau = matrix(20)
    for count in (1, 2, 5):
        same(ties([tau] * count, [1.0] * count, 0.3), keep_largest(tau, 0.3))


@pytest.mark.parametrize("elect", ["total", "majority"])
def test_ties_of_a_vector_and_its_negative_keeps_the_positive_entries(elect: str) -> None:
    tau = matrix(20)
    same(ties([tau, -tau], [1.0, 1.0], 0.5, elect=elect), keep_largest(tau, 0.5).abs())


def test_ties_divides_by_the_count_that_agrees_and_not_by_their_weights() -> None:
    same(ties([vector(2.0), vector(4.0), vector(-1.0)], [3.0, 1.0, 9.0], 1.0), vector((3 * 2 + 4) / 2))


def test_signs_are_elected_before_weighting() -> None:
    same(ties([vector(1.0), vector(-2.0)], [100.0, 1.0], 1.0), vector(-2.0))


def test_with_the_majority_a_zero_takes_the_sign_of_the_whole() -> None:
    taus = [vector(1, -5, -1, -1), vector(-1, -1, -1, -1)]
    same(ties(taus, [1.0, 1.0], 1.0, elect="majority"), vector(-1, -3, -1, -1))
    same(ties(taus, [1.0, 1.0], 1.0, elect="total"), vector(1, -3, -1, -1))
    same(ties(taus, [1.0, 1.0], 1.0, elect="majority", survey=Survey((0.0, 0.0), 1)), vector(1, -3, -1, -1))


def test_over_the_whole_model_one_threshold_serves_all_sites() -> None:
    large, small = Change.of_dense((7, 5), 10 + matrix(7, 5).abs()), Change.of_dense((7, 5), matrix(7, 5, seed=1))
    rule = make_merging("ties", density=0.5, scope="global")
    items = [SiteChanges(SITE, (large,), (1.0,)), SiteChanges(SITE, (small,), (1.0,))]
    survey = rule.survey(items)
    same(rule.merge(SITE, [large], [1.0], survey).matrix(), large.matrix())
    assert not rule.merge(SITE, [small], [1.0], survey).matrix().any()


@pytest.mark.parametrize("trim", ["count", "threshold"])
@pytest.mark.parametrize("density", [0.1, 0.37, 0.5, 1.0])
def test_on_one_tensor_both_scopes_give_the_same(trim: str, density: float) -> None:
    changes = [dense(seed) for seed in (1, 2, 3)]
    both = [merge("ties", changes, density=density, trim=trim, scope=scope) for scope in ("tensor", "global")]
    same(both[0].matrix(), both[1].matrix())


# -- trimming and selection -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "count", "wanted"), [(0.29, 100, 29), (0.3, 10, 3), (1 - 0.9, 10, 1), (0.25, 10, 2)])
def test_a_share_that_is_whole_but_for_rounding_is_whole(share: float, count: int, wanted: int) -> None:
    assert whole(share, count) == wanted


def test_a_threshold_keeps_one_more_than_the_share() -> None:
    numbers = torch.arange(1.0, 11.0, dtype=torch.float64)
    assert int(keep_from(numbers, threshold_for(numbers, 0.2)).count_nonzero()) == 3
    assert int(keep_largest(numbers, 0.2).count_nonzero()) == 2
    assert int(keep_from(numbers, threshold_for(numbers, 1.0)).count_nonzero()) == 10


@given(st.lists(st.floats(0, 1e6, width=64), min_size=1, max_size=60), st.data())
@settings(max_examples=60, deadline=None)
def test_the_selection_over_runs_is_the_kth_smallest(numbers: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(numbers)))
    runs = torch.tensor(numbers, dtype=torch.float64).split(7)
    found = Selection(k)
    for _ in range(5):
        for run in runs:
            found.add(run)
        found.settle()
    assert found.value == sorted(numbers)[k - 1]


def test_the_selection_settles_all_bits_where_the_candidates_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorica.adapters.merging.selection.LIMIT", 0)
    numbers = matrix(500).abs()
    found, readings = Selection(123), 0
    while found.value is None:
        readings += 1
        found.add(numbers)
        found.settle()
    assert found.value == float(numbers.kthvalue(123).values) and readings == 4


# -- DARE -------------------------------------------------------------------------------------------------------------


def test_dropping_keeps_the_expectation_and_has_its_variance() -> None:
    kept = dropped(torch.full((400_000,), 2.0, dtype=torch.float64), 0.1, torch.Generator().manual_seed(0))
    assert float(kept.mean()) == pytest.approx(2, abs=0.05)
    assert float(kept.var()) == pytest.approx(36, rel=0.03)
    assert set(kept.unique().tolist()) == {0.0, 20.0}


def test_dare_that_drops_nothing_is_the_sum_and_draws_depend_on_seed_and_site_alone() -> None:
    changes = [change(seed=1), change(seed=2)]
    same(merge("dare", changes, density=1.0).matrix(), changes[0].matrix() + changes[1].matrix())
    one, again, other = (merge("dare", changes, density=0.5, seed=s).matrix() for s in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)
    more = merge("dare", [*changes, change(seed=9)], [1.0, 1.0, 0.0], density=0.5, seed=3).matrix()
    same(more, one)  # a further parent draws after those before it


def test_dare_over_many_seeds_has_the_sum_for_its_mean() -> None:
    taus = [matrix(6, seed=1), matrix(6, seed=2)]
    draws = [dare(taus, [1.0, -0.5], 0.5, site_rng(seed, "fc", "weight")) for seed in range(3000)]
    same(torch.stack(draws).mean(0), taus[0] - 0.5 * taus[1], 0.12)


# -- factors ----------------------------------------------------------------------------------------------------------


def test_cat_and_svd_at_full_rank_are_the_sum_and_linear_is_not() -> None:
    changes, weights = [change(2, 1), change(2, 2, 0.5)], [0.7, -0.4]
    total = 0.7 * changes[0].matrix() - 0.4 * changes[1].matrix()
    same(merge("cat", changes, weights).matrix(), total)
    same(merge("task_arithmetic", changes, weights).matrix(), total)
    same(merge("svd", changes, weights, rank=4).matrix(), total)
    assert merge("cat", changes, weights).rank == 4
    off = merge("linear", changes, weights).matrix() - total
    assert float(off.norm() / total.norm()) > 0.3


def test_linear_with_weight_minus_one_is_the_negative_and_the_sign_is_on_a_alone() -> None:
    one = change()
    found = merge("linear", [one], [-1.0])
    same(found.matrix(), -one.matrix())
    A_RI, B_OR = found.factors()
    same(A_RI, -math.sqrt(2) * one.factors()[0])
    same(B_OR, math.sqrt(2) * one.factors()[1])


def test_the_scale_of_an_adapter_is_counted_once() -> None:
    for name in ALL:
        same(merge(name, [change(scale=2.0)], **neutral(name)).matrix(), change(scale=2.0).matrix(), 1e-10)


def test_factor_composition_has_cross_terms_and_the_sum_of_changes_has_none() -> None:
    units = [Change.of_factors((2, 2), rows(e), rows(e).T) for e in ((1.0, 0.0), (0.0, 1.0))]
    site = Site("fc", "linear", (2, 2))
    soup = make_merging("soup").merge(site, units, [0.5, 0.5]).matrix()
    same(soup, rows((0.25, 0.25), (0.25, 0.25)))
    same(make_merging("task_arithmetic").merge(site, units, [0.5, 0.5]).matrix(), rows((0.5, 0), (0, 0.5)))
    one = change(seed=4)
    same(merge("soup", [one], [-0.7]).matrix(), 0.49 * one.matrix())
    same(merge("soup", [one, one, one], [0.5, 0.2, 0.1]).matrix(), 0.64 * one.matrix())


def test_the_soup_is_linear_with_squared_weights_where_they_are_positive() -> None:
    changes = [change(seed=1), change(seed=2)]
    same(merge("soup", changes, [0.5, 0.3]).matrix(), merge("linear", changes, [0.25, 0.09]).matrix())


def test_rules_on_factors_and_on_weights_differ() -> None:
    changes = [change(seed=1), change(seed=2)]
    for name, parameters in (("ties", {}), ("magnitude_prune", {}), ("dare", {"seed": 1})):
        both = [merge(name, changes, density=0.5, on=on, **parameters) for on in ("weights", "factors")]
        assert both[1].factored and both[1].rank == 3 and not both[0].factored
        assert float((both[0].matrix() - both[1].matrix()).abs().max()) > 0.1


def test_a_truncation_is_the_nearest_of_its_rank_and_its_signs_are_those_of_the_change() -> None:
    total = join([change(2, 1), change(2, 2)])
    A_RI, B_OR = truncate(total, 2)
    U, S, V = torch.linalg.svd(total.matrix())
    same(B_OR @ A_RI, (U[:, :2] * S[:2]) @ V[:2], 1e-10)
    again = truncate(Change.of_dense((7, 5), total.matrix()), 2)
    same(again[0], A_RI, 1e-9)
    clamped = truncate(total, 2, clamp=0.9)
    bound = float(torch.quantile(torch.cat([B_OR.reshape(-1), A_RI.reshape(-1)]), 0.9))
    same(clamped[0], A_RI.clamp(-bound, bound))
    with pytest.raises(ConfigError, match="quantile below zero"):
        truncate(total, 2, clamp=0.01)


# -- KnOTS ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [[change(2, 1), change(3, 2, 0.5)], [change(4, 1), change(4, 2)], [dense(1), change(2, 2)], [change(1, 1)]],
    ids=["low rank", "more ranks than columns", "dense", "one"],
)
def test_knots_pieces_give_the_changes_back_and_their_sum_is_task_arithmetic(changes: list[Change]) -> None:
    U_OM, pieces = align(changes)
    same(U_OM.T @ U_OM, torch.eye(U_OM.shape[1], dtype=torch.float64), 1e-10)
    for own, piece in zip(changes, pieces, strict=True):
        same(U_OM @ piece, own.matrix(), 1e-9)
    weights = [0.5, -2.0][: len(changes)]
    summed = merge("knots", changes, weights, then="sum", scale=1.0)
    same(summed.matrix(), merge("task_arithmetic", changes, weights).matrix(), 1e-9)
    assert summed.factored and summed.rank <= sum(own.rank for own in changes)


def test_knots_with_ties_is_ties_in_the_shared_basis() -> None:
    changes = [change(2, 1), change(2, 2)]
    U_OM, pieces = align(changes)
    wanted = 0.6 * U_OM @ ties(pieces, [1.0, 1.0], 0.2)
    same(merge("knots", changes).matrix(), wanted, 1e-10)


# -- RobustMerge: the table -------------------------------------------------------------------------------------------

A1, A2 = rows((4, 1, 0.5, 0.25, 0.25), (0.1, 3, 0.2, 0.3, 0.4)), rows((1, 2, 3, 0.5, 0.1), (0.2, 0.1, 5, 0.3, 0.4))
B1, B2 = rows((1, 2), (3, -4), (0.5, 0.1)), rows((-2, 1), (0.3, 6), (0.2, 0.4))


@pytest.mark.parametrize(
    ("keep", "c", "A", "B"),
    [
        (
            0.2,
            rows((1.33333, 1.33333), (1.32, 1.32)),
            rows((8, 6, 6, 0, 0), (0, 6, 10, 0, 0)),
            rows((-1.98995, 3.00503), (3.01508, 1.94975), (0, 0)),
        ),
        (
            0.4,
            rows((1.17647, 1.17647), (1.2, 1.2)),
            rows((10, 6, 7, 1, 0), (0, 6, 10, 0, 0.8)),
            rows((-1.0297, 2.9901), (2.9703, 2.09901), (0, 0.40396)),
        ),
    ],
)
def test_robustmerge_has_the_numbers_of_the_published_code(keep: float, c: Tensor, A: Tensor, B: Tensor) -> None:
    own = [coefficients(a, keep_from(a, threshold_for(a, keep))) for a in (A1, A2)]
    same(torch.stack(own), c, 1e-5)
    found = robustmerge([(A1, B1), (A2, B2)], keep)
    same(found[0], A)
    same(found[1], B, 1e-5)


def test_robustmerge_of_one_is_four_times_the_pruned_product_and_of_three_equal_ones_three_times_that() -> None:
    pruned = [keep_from(t, threshold_for(t, 0.2)) for t in (A1, B1)]
    A_RI, B_OR = robustmerge([(A1, B1)])
    same(B_OR @ A_RI, 4 * pruned[1] @ pruned[0])
    A3_RI, B3_OR = robustmerge([(A1, B1)] * 3)
    same(B3_OR @ A3_RI, 12 * pruned[1] @ pruned[0])


def test_robustmerge_coefficients_bear_the_size_of_a_and_ranks_and_tasks_may_be_permuted() -> None:
    kept = keep_from(A1, threshold_for(A1, 0.4))
    same(coefficients(-7 * A1, -7 * kept), coefficients(A1, kept))
    pairs, order = [(matrix(5, 8, seed=s), matrix(6, 5, seed=s + 9)) for s in (1, 2, 3)], [3, 0, 4, 1, 2]
    wanted = robustmerge(pairs, 0.3)
    same(wanted[1] @ wanted[0], (lambda A, B: B @ A)(*robustmerge(pairs[::-1], 0.3)))
    turned = robustmerge([(A[order], B[:, order]) for A, B in pairs], 0.3)
    same(turned[0], wanted[0][order])
    same(turned[1], wanted[1][:, order])


def test_robustmerge_bears_rows_that_pruning_takes_whole() -> None:
    A = rows((5, 6, 7, 8), (0.1, 0.1, 0.1, 0.1), (0, 0, 0, 0))
    kept = keep_from(A, threshold_for(A, 1 / 6))
    assert not kept[1:].any()
    c_R = coefficients(A, kept)
    assert torch.isfinite(c_R).all() and float(c_R.max()) == pytest.approx(26 / 21)
    for found in robustmerge([(A, matrix(4, 3)), (matrix(3, 4), matrix(4, 3))], 1 / 6):
        assert torch.isfinite(found).all()
    assert torch.equal(coefficients(A[2:], kept[2:]), torch.ones(1, dtype=torch.float64))
