"""The executor: what each position does at a site, windows of packed batches, and each adapter lowered once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorica.adapters.adapter import Adapter
from lorica.engine.equation import Dropout
from lorica.engine.executor import Work
from lorica.engine.host import Host
from lorica.engine.route import Route
from lorica.methods import make_method
from tests.tiny import tiny

SITE = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def host() -> Host:
    made = Host(tiny("llama", dtype=torch.float64))
    made.add("a", make_method("lora", rank=2, dropout=0.5), "q_proj", seed=1)
    made.add("b", make_method("dora", rank=3), "q_proj", seed=2)
    made.add("elsewhere", make_method("lora", rank=2), "v_proj", seed=3)
    return made


def ranks(work: list[Work], positions: int) -> list[int]:
    """The rank of the update of every position, 0 where only the base acts."""
    found = [0] * positions
    for item in work:
        found[item.start : item.stop] = [item.linear(0).factors[0].rank] * (item.stop - item.start)
    return found


def test_base_positions_and_adapters_that_act_elsewhere_make_no_work(host: Host) -> None:
    site = host.backbone.sites[SITE]
    with host.rows(["elsewhere", "a", None, "b"]):
        work = host.executor.work(site, 8)
    assert [(w.start, w.stop, len(w.updates)) for w in work] == [(2, 4, 1), (6, 8, 1)]
    with host.disabled():
        assert host.executor.work(site, 8) == []


def test_an_adapter_present_in_many_rows_is_lowered_once(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    count: dict[str, int] = {}
    update = Adapter.update

    def counted(self: Adapter, *args: object) -> object:
        count[self.name] = count.get(self.name, 0) + 1
        return update(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Adapter, "update", counted)
    with host.rows(["a", "b", "a", None, "a", ["a", "b"]]):
        work = host.executor.work(host.backbone.sites[SITE], 6)
    assert count == {"a": 1, "b": 1}
    assert len({id(w.updates[0]) for w in work}) == 2


def test_every_row_of_an_adapter_has_a_mask_of_its_own(host: Host) -> None:
    host.train()
    try:
        with host.rows(["a", "b", "a", "a"]):
            host.begin()
            work = host.executor.work(host.backbone.sites[SITE], 8)
    finally:
        host.eval()
    drops = [w.dropouts[0] for w in work]
    rows = [[] if d is None else [(m.length, m.first, m.stop) for m in d.rows] for d in drops]
    assert rows == [[(2, 0, 2)], [], [(2, 0, 2), (2, 0, 2)]]
    assert len({m.seed for d in drops if d is not None for m in d.rows}) == 3, "each row has a mask of its own"


def test_the_masks_of_an_adapter_do_not_depend_on_who_shares_the_batch(host: Host) -> None:
    def masks(names: list[str | None]) -> list[int]:
        host.adapter("a").forwards = 0
        host.train()
        try:
            with host.rows(names):
                host.begin()
                work = host.executor.work(host.backbone.sites[SITE], 2 * len(names))
        finally:
            host.eval()
        return [m.seed for w in work for d in w.dropouts if d is not None for m in d.rows]

    assert masks(["a", "a"]) == masks(["b", "a", None, "b", "a"])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_a_window_sees_the_work_of_its_own_positions(host: Host, lengths: list[int], data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(["a", "b", None]), min_size=len(lengths), max_size=len(lengths)))
    total = sum(lengths)
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    route = Route([host._stack(name) for name in names], lengths=lengths)
    site, executor = host.backbone.sites[SITE], host.executor
    with executor.replay(route):
        whole = executor.work(site, total)
    with executor.replay(route, (start, stop)):
        part = executor.work(site, stop - start)
    assert ranks(part, stop - start) == ranks(whole, total)[start:stop]


def test_a_window_keeps_the_rows_of_a_mask(host: Host) -> None:
    route = Route([host._stack("a")], lengths=[6], counts={host.adapter("a"): 1})
    site, executor = host.backbone.sites[SITE], host.executor
    with executor.replay(route):
        (whole,) = executor.work(site, 6)
    with executor.replay(route, (2, 5)):
        (part,) = executor.work(site, 3)
    ones = torch.ones(6, 4)
    drop, cut = whole.dropouts[0], part.dropouts[0]
    assert isinstance(drop, Dropout) and isinstance(cut, Dropout)
    assert torch.equal(cut(ones[:3]), drop(ones)[2:5])


def test_replay_restores_what_was_there_even_after_an_exception(host: Host) -> None:
    executor = host.executor
    before = executor.route, executor.window, executor.recomputing
    with pytest.raises(KeyError), executor.replay(Route([()]), (0, 1)):
        raise KeyError
    assert (executor.route, executor.window, executor.recomputing) == before
