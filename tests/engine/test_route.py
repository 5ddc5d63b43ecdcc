"""Segments of any batch cover it once, in order, each with its row's stack."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorica.core.errors import RouteError
from lorica.engine.route import Route, Segment, Stack, subset


class Named(SimpleNamespace):
    """Stands where an adapter stands; a route only compares, counts and groups them."""

    __hash__ = object.__hash__  # type: ignore[assignment]


NAMED: list[Any] = [Named(name=name, forwards=0, held=False) for name in "abc"]
stacks = st.lists(st.lists(st.sampled_from(NAMED), max_size=2, unique_by=id).map(tuple), min_size=1, max_size=7)


def expand(segments: list[Segment]) -> list[Stack]:
    """The stack of every position."""
    assert all(s.start < s.stop for s in segments)
    assert all(a.stop == b.start for a, b in itertools.pairwise(segments))
    assert all(a.stack != b.stack for a, b in itertools.pairwise(segments)), "neighbours are joined"
    return [s.stack for s in segments for _ in range(s.stop - s.start)]


@given(stacks, st.integers(1, 5))
def test_rows_of_equal_length_share_the_leading_axis_evenly(rows: list[Stack], tokens: int) -> None:
    segments = Route(rows).segments(len(rows) * tokens)
    assert expand(segments) == [stack for stack in rows for _ in range(tokens)]


@given(st.data(), stacks, st.integers(1, 4))
def test_packed_rows_take_their_own_lengths_at_any_multiple(data: st.DataObject, rows: list[Stack], times: int) -> None:
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=len(rows), max_size=len(rows)).filter(sum))
    segments = Route(rows, lengths=lengths).segments(times * sum(lengths))
    assert expand(segments) == [s for s, n in zip(rows, lengths, strict=True) for _ in range(times * n)]


@given(stacks, st.integers(1, 40))
def test_a_uniform_route_serves_any_batch(rows: list[Stack], leading: int) -> None:
    route = Route(rows[:1], uniform=True)
    assert expand(route.segments(leading)) == [rows[0]] * leading
    assert route.stacks_for(leading) == (rows[0],) * leading


@given(st.data(), stacks, st.integers(1, 4))
def test_a_subset_keeps_the_stack_of_every_chosen_position(data: st.DataObject, rows: list[Stack], tokens: int) -> None:
    leading = len(rows) * tokens
    chosen = sorted(data.draw(st.sets(st.integers(0, leading - 1))))
    segments = Route(rows).segments(leading)
    found = subset(segments, torch.tensor(chosen, dtype=torch.long))
    everywhere = expand(segments)
    assert expand(found) == [everywhere[i] for i in chosen]


@given(stacks)
def test_the_adapters_present_are_each_named_once_in_order(rows: list[Stack]) -> None:
    found = Route(rows).adapters()
    seen: list[Any] = []
    for stack in rows:
        seen += [a for a in stack if a not in seen]
    assert found == seen


def test_training_counts_each_adapter_present_once_a_pass() -> None:
    one, two = Named(name="a", forwards=0, held=False), Named(name="b", forwards=5, held=False)
    route = Route([(one,), (), (one, two)])  # type: ignore[arg-type]
    assert dict(route.begin(training=True).counts) == {one: 1, two: 6}
    assert dict(route.begin(training=True).counts) == {one: 2, two: 7}
    assert not route.begin(training=False).counts
    assert (one.forwards, two.forwards) == (2, 7)


@pytest.mark.parametrize(
    ("route", "leading", "words"),
    [
        (Route([(), (), ()]), 4, "saw 4 positions, which 3 routed rows do not divide"),
        (Route([(), ()], lengths=[2, 3]), 7, "saw 7 positions where the packed rows hold 5 tokens"),
        (Route([(), ()], lengths=[2, 3]), 4, "saw 4 positions"),
    ],
)
def test_a_leading_axis_that_does_not_fit_is_refused(route: Route, leading: int, words: str) -> None:
    with pytest.raises(RouteError, match=words):
        route.segments(leading)


def test_lengths_must_be_as_many_as_rows() -> None:
    with pytest.raises(RouteError, match="2 packed rows and 3 rows are routed"):
        Route([(), (), ()], lengths=[1, 2])


def test_a_batch_of_another_size_is_refused() -> None:
    with pytest.raises(RouteError, match="The batch has 2 rows and 3 rows are routed"):
        Route([(), (), ()]).stacks_for(2)
