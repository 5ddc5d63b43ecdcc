"""The cache under any traffic: attention is that over each row's own keys, and no budget is ever exceeded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.engine.kv_cache import Budget, KVCache
from lorica.engine.kv_lane import Kept
from lorica.engine.replay import GRAPHS
from tests.engine.tape import Tape

HEADS, GROUPS, DIM = 4, 2, 8
MODULE = torch.nn.Identity()


def drawn(rng, *shape):
    return torch.randn(shape, generator=rng)


def kept_of(k, v, prefix=0):
    return Kept(k.shape[1], prefix, {MODULE: (k, v)})


def reference(q_HK, k_GTK, v_GTK, window, prefix):
    own = torch.arange(k_GTK.shape[1])
    seen = (own < prefix) | (own > k_GTK.shape[1] - 1 - window)
    k, v = (x.repeat_interleave(HEADS // GROUPS, 0)[:, seen] for x in (k_GTK, v_GTK))
    weights = (torch.einsum("hk,htk->ht", q_HK, k) * DIM**-0.5).softmax(-1)
    return torch.einsum("ht,htk->hk", weights, v)


class Traffic:
    """Rows that come, grow and go, with all their keys kept beside."""

    def __init__(self, budget, window):
        self.rng = torch.Generator().manual_seed(0)
        self.cache, self.window = KVCache(torch.device("cpu"), budget), window
        self.rows = []  # [place, k, v, need, prefix]

    def come(self, total, more, prefix):
        need, prefix = total + more, min(prefix, total)
        if not self.cache.claim(need):
            return
        k, v = drawn(self.rng, GROUPS, total, DIM), drawn(self.rng, GROUPS, total, DIM)
        (place,) = self.cache.put([(kept_of(k, v, prefix), need)])
        self.rows.append([place, k, v, need, prefix])

    def go(self, at):
        self.cache.drop(self.rows.pop(at)[0])

    def restart(self, at):
        row = self.rows[at]
        total = max(1, row[1].shape[1] // 2)
        if row[4] <= total:
            row[0].lane.restart(row[0], total)
            row[1], row[2] = row[1][:, :total], row[2][:, :total]

    def step(self):
        for row in [row for row in self.rows if row[1].shape[1] == row[3]]:
            self.go(self.rows.index(row))
        if not self.rows:
            return
        # a row without a place among them, as of one that is finished
        self.cache.order([row[0] for row in self.rows[::-1]] + [None])
        self.cache.advance()
        n = len(self.rows) + 1
        q, k, v = (drawn(self.rng, n, heads, 1, DIM) for heads in (HEADS, GROUPS, GROUPS))
        positions = self.cache.positions()[:, 0].tolist()
        found = self.cache.attend(MODULE, q, k, v, sliding_window=self.window)
        for i, row in enumerate(self.rows[::-1]):
            row[1], row[2] = torch.cat([row[1], k[i]], 1), torch.cat([row[2], v[i]], 1)
            assert positions[i] == row[1].shape[1] - 1
            wanted = reference(q[i, :, 0], row[1], row[2], self.window, row[4])
            torch.testing.assert_close(found[i, 0], wanted, atol=1e-5, rtol=1e-5)


EVENTS = st.one_of(
    st.tuples(st.just("come"), st.integers(1, 40), st.integers(0, 40), st.integers(0, 3)),
    st.tuples(st.sampled_from(["go", "restart"]), st.integers(0, 7)),
    st.tuples(st.just("step"), st.integers(1, 12)),
)


@settings(deadline=None, max_examples=100)
@given(
    events=st.lists(EVENTS, max_size=25),
    limit=st.one_of(st.none(), st.integers(80, 400)),
    window=st.sampled_from([5, 1000]),
    sizes=st.sampled_from([(256, 512), (3, 16), (1, 8)]),
    steady=st.booleans(),
)
def test_rows_attend_to_their_own_keys_whoever_comes_and_goes(events, limit, window, sizes, steady):
    with pytest.MonkeyPatch.context() as patch:
        if steady:
            patch.setitem(GRAPHS, "cpu", Tape)
        patch.setattr("lorica.engine.kv_cache.GROWTH", sizes[0])
        patch.setattr("lorica.engine.kv_cache.SHORT", sizes[1])
        budget = Budget(limit)
        traffic = Traffic(budget, window)
        for what, *given_ in events:
            if what == "come":
                traffic.come(*given_)
            elif what == "step":
                for _ in range(given_[0]):
                    traffic.step()
                    assert limit is None or budget.allocated <= limit
            elif traffic.rows:
                getattr(traffic, what)(given_[0] % len(traffic.rows))
            assert limit is None or max(budget.allocated, budget.reserved) <= limit


def test_two_caches_of_one_budget_leave_each_other_what_was_promised():
    budget = Budget(100)
    one, other = Traffic(budget, 1000), Traffic(budget, 1000)
    one.come(10, 40, 0)
    other.come(10, 40, 0)
    one.come(1, 0, 0)
    assert [len(one.rows), len(other.rows)] == [1, 1]
    for _ in range(60):
        one.step()
        other.step()
        assert budget.allocated <= 100
    one.cache.close()
    assert budget.reserved == 0


def test_memory_is_not_taken_anew_at_each_step_nor_for_each_row():
    traffic, places = Traffic(None, 1000), set()
    for _ in range(40):
        traffic.come(4, 12, 0)
        traffic.step()
        for lane in traffic.cache.lanes.values():
            places.add(lane._layers[MODULE][0].data_ptr())
    assert len(places) <= 6


def test_several_tokens_at_once_are_those_one_by_one():
    rng = torch.Generator().manual_seed(1)
    k, v = drawn(rng, GROUPS, 9, DIM), drawn(rng, GROUPS, 9, DIM)
    q = drawn(rng, 1, HEADS, 6, DIM)
    for window, cap in ((1000, None), (4, None), (4, 2.0)):
        found = []
        for parts in ([6], [1] * 6):
            cache = KVCache(torch.device("cpu"))
            cache.claim(40)
            places = cache.put([(kept_of(k[:, :3], v[:, :3], prefix=2), 40)])
            cache.order(places)
            outs, at = [], 0
            for tokens in parts:
                places[0].lane.advance(tokens)
                span = slice(at, at + tokens)
                own = (k[None, :, 3:][:, :, span], v[None, :, 3:][:, :, span])
                outs.append(
                    cache.attend(MODULE, q[:, :, span], *own, sliding_window=window, softcap=cap, s_aux=torch.ones(4))
                )
                at += tokens
            found.append(torch.cat(outs, 1))
        torch.testing.assert_close(found[0], found[1])
