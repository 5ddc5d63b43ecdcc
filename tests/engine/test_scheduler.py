"""The scheduler: order within a run, nothing lost, nothing starved, equal shares."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.core.errors import DataError
from lorica.engine.scheduler import Pick, Scheduler, slices

BUDGET = 64

requests = st.lists(
    st.tuples(
        st.integers(0, 3),  # tenant
        st.integers(0, 3),  # its run
        st.lists(st.integers(0, BUDGET), min_size=1, max_size=4),  # costs
    ),
    max_size=40,
)


def fill(scheduler: Scheduler, wanted: list[tuple[int, int, list[int]]], start: int = 0) -> None:
    for id, (tenant, run, costs) in enumerate(wanted, start):
        scheduler.add(id, f"{tenant}/{run}", str(tenant), [((i,), cost) for i, cost in enumerate(costs)])


def drain(scheduler: Scheduler) -> list[list[Pick]]:
    rounds = []
    while len(scheduler):
        rounds.append(scheduler.next_round())
        assert rounds[-1], "a round with work is never empty"
    assert scheduler.next_round() == []
    return rounds


@given(requests, st.integers(1, 8), st.booleans())
def test_nothing_is_lost_runs_keep_their_order_and_rounds_their_bounds(
    wanted: list[tuple[int, int, list[int]]], runs: int, alone: bool
) -> None:
    scheduler = Scheduler(BUDGET, runs=runs, alone=alone)
    fill(scheduler, wanted)
    rounds = drain(scheduler)
    for picks in rounds:
        assert sum(pick.cost for pick in picks) <= BUDGET
        assert len({pick.run for pick in picks}) == len(picks) <= (1 if alone else runs)
    by_run: dict[str, list[tuple[int, int]]] = {}
    for pick in (pick for picks in rounds for pick in picks):
        assert pick.indices is not None
        by_run.setdefault(pick.run, []).append((pick.id, pick.indices[0]))
        costs = wanted[pick.id][2]
        assert (pick.first, pick.last) == (pick.indices[0] == 0, pick.indices[0] == len(costs) - 1)
    expected: dict[str, list[tuple[int, int]]] = {}
    for id, (tenant, run, costs) in enumerate(wanted):
        expected.setdefault(f"{tenant}/{run}", []).extend((id, i) for i in range(len(costs)))
    assert by_run == expected


def shares(costs: list[int], rounds: int) -> list[int]:
    """Tokens that tenants get who always have slices of these costs, and enough runs to fill every round alone."""
    scheduler = Scheduler(BUDGET)
    served: Counter[int] = Counter()
    for tenant, cost in enumerate(costs):
        for run in range(BUDGET // cost + 1):
            scheduler.add(1000 * tenant + run, f"{tenant}/{run}", str(tenant), [((0,), cost)] * (rounds + 1))
    for _ in range(rounds):
        for pick in scheduler.next_round():
            served[pick.id // 1000] += pick.cost
    return [served[tenant] for tenant in range(len(costs))]


@given(st.lists(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), min_size=2, max_size=6))
def test_tenants_that_always_have_work_get_equal_shares(costs: list[int]) -> None:
    found = shares(costs, 40)
    assert sum(found) == 40 * BUDGET
    assert max(found) - min(found) <= max(costs) + BUDGET, found


@given(st.lists(st.integers(1, BUDGET), min_size=2, max_size=6))
def test_only_room_that_others_have_no_use_for_makes_shares_unequal(costs: list[int]) -> None:
    found = shares(costs, 60)
    assert min(found) >= 60 * BUDGET // (2 * len(costs)) - 2 * BUDGET, found


@pytest.mark.parametrize("cost", [BUDGET, BUDGET * 7 // 10, BUDGET // 2 + 1])
@pytest.mark.parametrize("company", [1, 5])
def test_a_large_request_is_not_starved_by_a_flood_of_small_ones(cost: int, company: int) -> None:
    scheduler = Scheduler(BUDGET)
    scheduler.add(0, "large", "large", [((0,), cost)])
    last = 0
    for number in range(100):
        for other in range(company):
            for run in range(20):
                last += 1
                scheduler.add(last, f"{other}/{run}", str(other), [((0,), 4)])
        if any(pick.id == 0 for pick in scheduler.next_round()):
            assert number <= 4 * (company + 1)
            return
    pytest.fail("the large request never came")


def test_a_large_request_is_not_starved_by_small_ones_of_its_own_tenant() -> None:
    scheduler = Scheduler(BUDGET)
    scheduler.add(0, "large", "t", [((0,), BUDGET)])
    for number in range(1, 60):
        for run in range(20):
            scheduler.add(100 * number + run, f"{run}", "t", [((0,), 4)])
        if any(pick.id == 0 for pick in scheduler.next_round()):
            assert number <= 8
            return
    pytest.fail("the large request never came")


def test_a_small_request_does_not_wait_behind_a_ring_of_large_ones() -> None:
    scheduler = Scheduler(BUDGET)
    for tenant in range(50):
        scheduler.add(tenant, str(tenant), str(tenant), [((i,), BUDGET) for i in range(10)])
    for _ in range(3):
        scheduler.next_round()
    scheduler.add(99, "small", "small", [(None, 2)])
    rounds = [[pick.id for pick in scheduler.next_round()] for _ in range(3)]
    assert 99 in {id for ids in rounds[:2] for id in ids}


def test_a_request_can_be_dropped_until_it_begins_and_failed_afterwards() -> None:
    scheduler = Scheduler(BUDGET)
    scheduler.add(1, "a", "t", [((0,), BUDGET), ((1,), BUDGET)])
    scheduler.add(2, "a", "t", [((0,), BUDGET)])
    scheduler.add(3, "a", "t", [((0,), BUDGET)])
    assert scheduler.drop(2)
    assert not scheduler.drop(2)
    assert [pick.id for pick in scheduler.next_round()] == [1]
    assert not scheduler.drop(1)
    scheduler.fail(1)
    assert [pick.id for pick in scheduler.next_round()] == [3]
    assert len(scheduler) == 0


def test_position_and_reason_are_told() -> None:
    scheduler = Scheduler(20_000)
    scheduler.add(1, "a", "x", [((0,), 5000), ((1,), 5000)])
    scheduler.add(2, "a", "x", [((0,), 1000)])
    scheduler.add(3, "b", "y", [((0,), 1000)])
    scheduler.add(4, "c", "z", [((0,), 7)])
    assert str(scheduler.ahead(1)) == "nothing ahead"
    assert str(scheduler.ahead(2)) == "1 request, 10,000 tokens of 1 tenant ahead"
    assert str(scheduler.ahead(4)) == "3 requests, 12,000 tokens of 2 tenants ahead"
    assert scheduler.tokens == 12_007


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(50, 200))
def test_slices_hold_every_datum_once_in_order_and_are_within_the_budget(lengths: list[int], budget: int) -> None:
    found = slices(lengths, budget)
    assert [index for part in found for index in part] == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in part) <= budget for part in found)
    assert len(found) <= 1 + 2 * sum(lengths) // budget


def test_a_datum_that_no_slice_can_hold_is_refused() -> None:
    with pytest.raises(DataError, match="Datum 1 has 2,001 tokens; this server computes at most 2,000 at once"):
        slices([5, 2001], 2000)
