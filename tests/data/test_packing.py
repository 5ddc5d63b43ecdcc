from __future__ import annotations

import json
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.core.errors import ConfigError, DataError, ResumeError
from lorica.data.example import Example
from lorica.data.packing import Sampler, end_to_end, pack


@st.composite
def made(draw: st.DrawFn) -> Example:
    count = draw(st.integers(2, 9))
    tokens = draw(st.lists(st.integers(0, 99), min_size=count, max_size=count))
    weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=count - 1, max_size=count - 1))
    return Example(tuple(tokens), (0.0, *weights))


batches = st.lists(made(), min_size=1, max_size=10)


@given(examples=batches)
def test_an_example_asks_each_token_for_the_next_one(examples: list[Example]) -> None:
    for example in examples:
        datum = example.datum()
        assert datum.tokens.tolist() == list(example.tokens[:-1])
        assert datum.targets.tolist() == list(example.tokens[1:])
        assert datum.inputs["weights"].tolist() == list(example.weights[1:])
        assert datum.crow is None and datum.where == example.where


def test_packed_arrays_have_the_types_that_tensors_are_made_of() -> None:
    packed = end_to_end([[1, 2, 3]])
    assert {a.dtype for a in (packed.tokens, packed.positions, packed.lengths)} == {np.dtype(np.int64)}


@given(rows=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=10))
def test_rows_lie_end_to_end_whole(rows: list[list[int]]) -> None:
    packed = end_to_end(rows)
    assert packed.tokens.tolist() == list(chain.from_iterable(rows))
    assert packed.positions.tolist() == [i for row in rows for i in range(len(row))]
    assert packed.lengths.tolist() == [len(row) for row in rows]
    assert packed.cu_seqlens.tolist() == [0, *np.cumsum([len(row) for row in rows]).tolist()]


@pytest.mark.parametrize("rows", [[], [[1, 2], []]])
def test_batches_that_cannot_be_laid_out_are_refused(rows: list[list[int]]) -> None:
    with pytest.raises(DataError, match="at least one"):
        end_to_end(rows)


def test_an_example_of_one_token_predicts_nothing() -> None:
    with pytest.raises(DataError, match="x, line 4 has 1 tokens; at least two"):
        Example((1,), (0,), "x, line 4").datum()


@given(examples=batches, budget=st.integers(8, 30), data=st.data())
def test_packing_takes_each_example_once_within_the_budget(
    examples: list[Example], budget: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(examples))))
    groups = pack(examples, budget, order)
    assert sorted(chain.from_iterable(groups)) == list(range(len(examples)))
    assert all(sum(len(examples[i]) - 1 for i in group) <= budget for group in groups)
    assert pack(examples, budget, order) == groups
    # Any two batches together exceed the budget only if the later one was needed: its opener fitted nowhere before.
    for later, group in enumerate(groups):
        opener = len(examples[group[0]]) - 1
        for earlier in groups[:later]:
            before = [i for i in earlier if order.index(i) < order.index(group[0])]
            assert sum(len(examples[i]) - 1 for i in before) + opener > budget


def test_packing_prefers_the_fullest_batch_that_has_room() -> None:
    rows = [Example.whole(range(n + 1)) for n in (5, 7, 3, 5)]
    assert pack(rows, 10) == [[0, 3], [1, 2]]


def test_an_example_beyond_the_budget_is_named() -> None:
    with pytest.raises(DataError, match=r"x, line 9 has 3 input tokens, more than a batch may hold \(2\)"):
        pack([Example((1, 2, 3, 4), (0, 1, 1, 1), "x, line 9")], 2)
    with pytest.raises(ConfigError, match="token_budget is 0"):
        pack([], 0)


def settings(draw: st.DrawFn) -> dict[str, Any]:
    return draw(
        st.fixed_dictionaries({"seed": st.integers(0, 5), "shuffle": st.booleans()}).flatmap(
            lambda base: st.one_of(
                st.integers(1, 5).map(lambda n: {**base, "batch_size": n}),
                st.integers(8, 20).map(lambda n: {**base, "token_budget": n}),
            )
        )
    )


options = st.composite(settings)()


@given(examples=batches, options=options, before=st.integers(0, 25))
def test_a_resumed_stream_equals_the_uninterrupted_one(
    examples: list[Example], options: dict[str, Any], before: int
) -> None:
    whole = list(islice(Sampler(examples, **options), before + 10))
    first = Sampler(examples, **options)
    assert list(islice(first, before)) == whole[:before]
    second = Sampler(examples, **options)
    second.load_state(json.loads(json.dumps(first.state())))
    assert list(islice(second, 10)) == whole[before:]


@given(examples=batches, options=options)
def test_each_epoch_visits_every_example_once(examples: list[Example], options: dict[str, Any]) -> None:
    sampler = Sampler(examples, **options)
    for epoch in range(3):
        seen: list[int] = []
        while sampler.epoch == epoch:
            seen += next(sampler)
        assert sorted(seen) == list(range(len(examples)))
    fresh = Sampler(examples, **options)
    assert fresh.steps(3) == sum(len(fresh.batches(epoch)) for epoch in range(3))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    rows = [Example((i, i), (0, 1)) for i in range(50)]

    def epochs(seed: int) -> list[list[list[int]]]:
        return [Sampler(rows, batch_size=50, seed=seed).batches(epoch) for epoch in range(2)]

    assert epochs(1) == epochs(1)
    assert len({str(order) for order in (*epochs(1), *epochs(2))}) == 4
    assert Sampler(rows, batch_size=50, shuffle=False).batches(7) == [list(range(50))]


def test_the_order_of_a_seed_never_changes() -> None:
    # Written down so that a run saved by one version of Lorica or Python continues the same under the next.
    rows = [Example((i, i), (0, 1)) for i in range(8)]
    assert Sampler(rows, batch_size=8, seed=3).batches(1) == [[4, 2, 7, 3, 5, 0, 1, 6]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 9}, "has seed = 9, but this run has seed = 0"),
        ({"examples": 4}, "has examples = 4, but this run has examples = 5"),
        ({"batch_size": None}, "has batch_size = None, but this run has batch_size = 2"),
        ({"epoch": -1}, "lies outside the data"),
        ({"batch": 3}, "lies outside the data"),
        ({"batch": "1"}, "lies outside the data"),
    ],
)
def test_a_position_in_other_data_is_refused(change: dict[str, Any], said: str) -> None:
    sampler = Sampler([Example((i, i), (0, 1)) for i in range(5)], batch_size=2)
    with pytest.raises(ResumeError, match=said):
        sampler.load_state({**sampler.state(), **change})
    with pytest.raises(ResumeError, match="seed = None"):
        sampler.load_state({})


def test_a_sampler_needs_one_way_to_size_its_batches() -> None:
    rows = [Example((1, 2), (0, 1))]
    with pytest.raises(ConfigError, match="either batch_size or token_budget"):
        Sampler(rows)
    with pytest.raises(ConfigError, match="either batch_size or token_budget"):
        Sampler(rows, batch_size=1, token_budget=1)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        Sampler(rows, batch_size=0)
    with pytest.raises(DataError, match="no examples"):
        Sampler([], batch_size=1)
