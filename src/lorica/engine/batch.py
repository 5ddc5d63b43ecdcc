"""Rows that are decoded together: some tokens of each at every step, whoever came and went since the last.

In: jobs whose prompts were read. Out: events. Linear maps run over all rows at once, attention lane by lane; what
depends on who is there is made again only when that changes. Refuses to know who waits, and budgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorica.core.errors import LoricaError
from lorica.engine.abilities import FAILURES, close, probe_row
from lorica.engine.decode import Step, head_maps, step_of
from lorica.engine.groups import standing_in
from lorica.engine.jobs import Job, Row, add, take
from lorica.engine.kv_cache import Budget, KVCache
from lorica.engine.kv_lane import Kept
from lorica.engine.prefixes import Prefixes
from lorica.engine.prompts import Prompt, feed, head, read, read_on
from lorica.engine.replay import Replays
from lorica.engine.requests import Event
from lorica.engine.route import Route, Stack
from lorica.engine.trunk import Trunk
from lorica.engine.updates import Updates

THIN = 0.75
"""The batch is made smaller once no more than this share of its rows is unfinished."""
AT_ONCE = 32
"""Most first tokens that are drawn from logits that exist at the same time."""
LONGEST, AT_A_STEP = 8, 128
"""Most tokens that a step samples of a row, and of all rows: those who come, train or cancel wait for its end."""
STEPS, READS_ON = "steps", "reads on"


def steps(trunk: Trunk) -> bool:
    """Whether a token fed behind kept keys gives what it gives in a packed pass; asked once for the frozen weights.

    Raises MethodError for a backbone that cannot run packed passes at all.
    """
    if not trunk.packs():
        return False
    kept = trunk.backbone.kept
    if STEPS not in kept:
        row = probe_row(trunk.backbone)
        kept[STEPS] = kept[READS_ON] = False
        try:
            with trunk.modes(training=False), torch.no_grad():
                wanted = trunk.alone(row)[2:]
                kept[STEPS] = close(_forced(trunk, row), wanted)
                prompt = read(trunk, [Prompt(row[:2], ())], keep=True)[0].kept
                assert prompt is not None
                kept[READS_ON] = kept[STEPS] and close(read_on(trunk, prompt, row[2:], ())[0], wanted)
        except (LoricaError, *FAILURES):
            pass
    return bool(kept[STEPS])


def reads_on(trunk: Trunk) -> bool:
    """Whether several tokens may be fed behind kept keys at once."""
    return steps(trunk) and bool(trunk.backbone.kept[READS_ON])


def _forced(trunk: Trunk, row: Sequence[int]) -> Tensor:
    """Hidden states of a row of the base behind its first two tokens, fed one by one."""
    first = read(trunk, [Prompt(row[:2], ())], keep=True)[0].kept
    assert first is not None
    cache, executor = KVCache(trunk.backbone.device), trunk.host.executor
    cache.claim(len(row))
    cache.order(cache.put([(first, len(row))]))
    found = []
    step = step_of(executor, [()], Updates())
    with trunk.host.rows([()]), standing_in(step.forwards):
        trunk.host.begin()
        for token in row[2:]:
            cache.advance()
            found.append(feed(trunk, cache, trunk.tensor([[token]]), cache.positions(), step.walk)[:, 0])
    return torch.cat(found)


class Batch:
    """Rows that are decoded together. `prefixes` is told what finished rows leave behind."""

    def __init__(self, trunk: Trunk, updates: Updates, budget: Budget, prefixes: Prefixes | None) -> None:
        self.trunk, self.host, self.updates = trunk, trunk.host, updates
        self.prefixes = prefixes
        self.cache = KVCache(trunk.backbone.device, budget)
        self._replays = Replays(trunk.backbone.device)
        self._rows: list[Row] = []  # of the steps, in their order; the dead among them until the batch is thin
        self._passing: list[Row] = []
        self._stale = False
        self._stride = 1
        self._stacks: list[Stack] = []
        self._step, self._route = Step([]), Route([])

    @property
    def live(self) -> int:
        return sum(not row.dead for row in (*self._rows, *self._passing))

    # -- coming ----------------------------------------------------------------------------------------------------

    def seat(self, arrivals: Sequence[tuple[Job, Kept | None, int]], events: list[Event]) -> None:
        """Up to so many rows of each job, with their first tokens; keys of a prompt, where rows go on behind them.
        Places were claimed.
        """
        seated: list[tuple[Row, Kept]] = []
        seats = {job: count for job, _, count in arrivals}
        kept = {job: own for job, own, _ in arrivals}
        while rows := self._draws(seats):
            self._begin(rows, events)
            for row in rows:
                if row.done and not row.job.over:
                    row.job.close_row(row, events)
                elif not row.job.over:
                    seats[row.job] -= 1
                    own = kept[row.job]
                    if own is None:
                        self._passing.append(row)
                    else:
                        seated.append((row, own))
        for job, own in kept.items():
            for _ in range(seats[job] if own is not None and job.goes_on else 0):
                self.cache.release(job.need)
        for row, _ in seated:
            if row.job.over:  # another draw of it failed
                self.cache.release(row.job.need)
        self._place([(row, own) for row, own in seated if not row.job.over])

    def _draws(self, seats: dict[Job, int]) -> list[Row]:
        rows: list[Row] = []
        for job, count in seats.items():
            if not job.over:
                rows += [job.next_row() for _ in range(min(count, job.pending, AT_ONCE - len(rows)))]
        return rows

    def _place(self, seated: list[tuple[Row, Kept]]) -> None:
        self._vacate()
        if not seated:
            return
        self._stride = 1  # where one comes, others do
        rank: dict[Stack, int] = {}
        # neighbours of one stack share its product
        seated.sort(key=lambda pair: rank.setdefault(pair[0].job.request.stack, len(rank)))
        left: dict[Stack, list[int]] = {}
        for index, row in enumerate(self._rows):
            if row.dead:
                left.setdefault(row.job.request.stack, []).append(index)
        for (row, _), place in zip(seated, self.cache.put([(own, r.job.need) for r, own in seated]), strict=True):
            row.place = place
            if left.get(row.job.request.stack):  # then nothing changes for the linear sites
                self._rows[left[row.job.request.stack].pop()] = row
            else:
                self._rows.append(row)
                self._stale = True
        self.cache.order([row.place for row in self._rows])

    def more(self, job: Job, count: int, events: list[Event]) -> None:
        """So many further rows of a job that has rows, from whose keys they are copied. Places were claimed."""
        source = next((row.place for row in job.rows if row.place is not None), None)
        kept = None if source is None else source.lane.kept(source, job.total).copy()
        self.seat([(job, kept, count)], events)

    def _begin(self, rows: Sequence[Row], events: list[Event]) -> None:
        """The first token of each row, from what its prompt's pass gave."""
        try:
            hidden_RD = torch.stack([row.job.read.hidden_D for row in rows if row.job.read is not None])
            stacks = [row.job.request.stack for row in rows]
            outside = head_maps(self.host.executor, stacks, self.updates)
            with self.host.rows(stacks), standing_in(outside):
                self.host.begin()
                logits_RV = head(self.trunk, hidden_RD)
            take(rows, logits_RV, events, self.host.executor.kernels(logits_RV.dtype))
        except Exception as error:
            for row in rows:
                row.job.fail(error, events)

    # -- steps -----------------------------------------------------------------------------------------------------

    def step(self, events: list[Event]) -> None:
        """The next token of every row, or some more where nobody waits for each. An error fails all rows that it may
        have come from.
        """
        for rows, work in ((self._rows, self._decode), (self._passing, self._recompute)):
            if all(row.dead for row in rows):
                continue
            try:
                work(events)
            except Exception as error:
                for row in rows:
                    if not row.dead:
                        row.job.fail(error, events)
        self.settle(events)

    def _decode(self, events: list[Event]) -> None:
        self._compose()
        self.cache.advance()
        ids_R = self.trunk.tensor([row.tokens[-1] for row in self._rows])
        if not self._sample(ids_R, events):
            self._walk(ids_R[:, None], events)

    def _sample(self, ids_R: Tensor, events: list[Event]) -> bool:
        """Tokens of every row in one call, behind these. False where there is none, or somebody asks for more."""
        sampler, live = self._step.sampler, [row for row in self._rows if not row.dead]
        room = sampler.room(self.cache) if sampler is not None and all(row.job.plain for row in live) else 0
        if sampler is None or not room:
            return False
        heard = any(row.job.request.tells for row in live)
        most = min(room, self._stride, AT_A_STEP // len(self._rows), *(row.left for row in live))
        count = 1 if heard else max(1, most)
        self._stride = min(2 * self._stride, LONGEST)
        heats = [0.0 if row.dead else row.job.request.params.temperature for row in self._rows]
        drawing = list(zip(self._rows, heats, strict=True))
        uniform = [[row.rng() if heat else 0.0 for row, heat in drawing] for _ in range(count)]
        tokens_CR, logprobs_CR = sampler.sample(self.cache, ids_R, heats, uniform)
        for tokens, logprobs in zip(tokens_CR.tolist(), logprobs_CR.tolist(), strict=True):
            add(self._rows, tokens, logprobs, events)
        return True

    def _walk(self, ids_R1: Tensor, events: list[Event]) -> None:
        lane = self.cache.steady()
        graphs = self.host.executor.graphs and self._step.walk is not None
        key = None if lane is None or not graphs else (self._step, lane, lane.version)
        (logits_RV,) = self._replays.run(key, {"ids": ids_R1}, self._logits)
        self._take(self._rows, logits_RV, events)

    def _logits(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        cache = self.cache
        with self.host.routed(self._route), standing_in(self._step.forwards):
            self.host.begin()
            hidden_RD = feed(self.trunk, cache, inputs["ids"], cache.positions(), self._step.walk)[:, 0]
            return [head(self.trunk, hidden_RD)]

    def _recompute(self, events: list[Event]) -> None:
        """For rows that cannot go on behind kept keys: a pass over each of them."""
        rows = self._passing = [row for row in self._passing if not row.dead]
        found = []
        for row in rows:
            request = row.job.request
            tokens = [*request.prompt, *row.tokens]
            found.append(read(self.trunk, [Prompt(tokens, request.stack)], keep=False)[0].hidden_D)
        with self.host.rows([row.job.request.stack for row in rows]):
            self.host.begin()
            logits_RV = head(self.trunk, torch.stack(found))
        self._take(rows, logits_RV, events)

    def _take(self, rows: Sequence[Row], logits_RV: Tensor, events: list[Event]) -> None:
        live = [i for i, row in enumerate(rows) if not row.dead]
        if len(live) < len(rows):
            logits_RV = logits_RV[torch.tensor(live, device=logits_RV.device)]
        take([rows[i] for i in live], logits_RV, events, self.host.executor.kernels(logits_RV.dtype))

    def _compose(self) -> None:
        """The order of the rows, and what of the linear sites depends on who they are."""
        live = [row for row in self._rows if not row.dead]
        if not self._stale and len(live) > THIN * len(self._rows):
            return
        at = {row: (0, 0) if row.place is None else (row.place.lane.capacity, row.place.index) for row in live}
        first: dict[Stack, tuple[int, int]] = {}
        for row in live:
            stack = row.job.request.stack
            first[stack] = min(first.get(stack, at[row]), at[row])
        # near the order of the cache, where a step's keys then need no other one
        live.sort(key=lambda row: (first[row.job.request.stack], at[row]))
        stacks = [row.job.request.stack for row in live]
        if stacks != self._stacks:
            self._step = Step([])  # frees the old factors before there are new ones
            self._replays.clear()
            self._step = step_of(self.host.executor, stacks, self.updates)
            self._route = Route(stacks, counts={})  # nothing is trained, so no pass is counted
        self._rows, self._stacks, self._stale = live, stacks, False
        self.cache.order([row.place for row in live])

    # -- going -----------------------------------------------------------------------------------------------------

    def settle(self, events: list[Event]) -> None:
        """Let go of rows that are done, or whose job is over; draws that wait take the place of those of their job."""
        while done := [row for row in (*self._rows, *self._passing) if row.done and row in row.job.rows]:
            fresh = []
            for row in done:
                if row.job.over:
                    row.job.rows.remove(row)
                    continue
                self._remember(row)
                following = row.job.next_row() if row.job.pending else None
                row.job.close_row(row, events)
                if following is not None:
                    self._replace(row, following)
                    fresh.append(following)
            if fresh:
                self._begin(fresh, events)
            for row in fresh:
                if row.place is not None and not row.dead:
                    row.place.lane.restart(row.place, row.job.total)
        self._vacate()
        self._passing = [row for row in self._passing if not row.dead]
        if not any(row.place for row in self._rows):
            self._rows, self._stacks, self._step, self._route = [], [], Step([]), Route([])
            self._replays.clear()

    def _vacate(self) -> None:
        gone = [row for row in self._rows if row.dead and row.place is not None]
        # the last first: those behind it are gone by then, and none of them is moved into its place
        for place in sorted((row.place for row in gone if row.place is not None), key=lambda own: -own.index):
            self.cache.drop(place)
        for row in gone:
            row.place = None

    def _replace(self, row: Row, following: Row) -> None:
        for rows in (self._rows, self._passing):
            if row in rows:
                rows[rows.index(row)] = following
        following.place, row.place = row.place, None

    def _remember(self, row: Row) -> None:
        if self.prefixes is not None and row.place is not None and row.index == 0 and len(row.tokens) > 1:
            fed = [*row.job.request.prompt, *row.tokens[:-1]]
            kept = row.place.lane.kept(row.place, row.job.total + len(row.tokens) - 1)
            self.prefixes.keep(row.job.request.stack, fed, kept)
