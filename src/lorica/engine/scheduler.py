"""Which work comes next: strict order within a run, equal shares of tokens between tenants.

In: requests with their cost in tokens, cut into slices. Out: rounds, each a set of slices of different runs that fit
one micro-batch. Tenants take turns by deficit round robin; what is small goes first, within bounds. The order depends
on what was added and on nothing else. Refuses to know tensors, commands and clocks.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lorica.core.errors import DataError

JUMPS = 4
"""How many small requests of one tenant may overtake its run whose turn it is."""
OWED = 4
"""How many budgets a tenant can be owed, because rounds had no room for its slices."""


@dataclass(frozen=True, slots=True)
class Pick:
    """One slice of request `id`: indices of its datums, or None for a request that has none. `first` and `last` of its
    slices.
    """

    id: int
    run: str
    indices: tuple[int, ...] | None
    cost: int
    first: bool
    last: bool


@dataclass(frozen=True, slots=True)
class Ahead:
    """What was added before a request and is not finished."""

    requests: int
    tokens: int
    tenants: int

    def __str__(self) -> str:
        if not self.requests:
            return "nothing ahead"
        requests, tenants = _count(self.requests, "request"), _count(self.tenants, "tenant")
        return f"{requests}, {self.tokens:,} tokens of {tenants} ahead"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' if number != 1 else ''}"


def slices(lengths: Sequence[int], budget: int) -> list[tuple[int, ...]]:
    """Datums cut into runs of at most `budget` tokens, a function of their lengths alone. Raises DataError."""
    found: list[list[int]] = []
    room = -1
    for index, length in enumerate(lengths):
        if length > budget:
            raise DataError(f"Datum {index} has {length:,} tokens; this server computes at most {budget:,} at once.")
        if length > room:
            found.append([])
            room = budget
        found[-1].append(index)
        room -= length
    return [tuple(indices) for indices in found]


@dataclass(slots=True, eq=False)
class _Request:
    """A queued request and the slices that are left of it."""

    id: int
    tenant: str
    left: deque[tuple[tuple[int, ...] | None, int]]
    started: bool = False

    @property
    def cost(self) -> int:
        return sum(cost for _, cost in self.left)


@dataclass(slots=True)
class _Tenant:
    """The runs of one tenant that have work, whose turn it is first; tokens it may still take; overtakings."""

    runs: OrderedDict[str, deque[_Request]] = field(default_factory=OrderedDict)
    credit: int = 0
    jumps: int = 0


class Scheduler:
    """Queues of requests, one for each run.

    Args:
        budget: most tokens of a round; no slice may be larger.
        runs: most runs of a round.
        quantum: tokens that a tenant may take at each of its turns; a request that costs no more is small.
        alone: one slice with datums in each round, so that nobody's numbers depend on company.
    """

    def __init__(self, budget: int, *, runs: int = 64, quantum: int | None = None, alone: bool = False) -> None:
        self.budget = budget
        self.runs = runs
        self.quantum = quantum or max(1, budget // 8)
        self.alone = alone
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        self._requests: OrderedDict[int, _Request] = OrderedDict()
        self._run_of: dict[int, str] = {}
        self._passed: dict[str, None] = {}
        self._overtaken = False

    # -- queues --------------------------------------------------------------------------------------------------

    def add(self, id: int, run: str, tenant: str, parts: Sequence[tuple[Sequence[int] | None, int]]) -> None:
        """Queue a request behind the others of its run. `parts`: datum indices (or None) and cost of each slice."""
        if not parts or any(not 0 <= cost <= self.budget for _, cost in parts):
            raise ValueError("a request needs slices, and each must fit a round")
        left = deque((None if indices is None else tuple(indices), cost) for indices, cost in parts)
        request = _Request(id, tenant, left)
        own = self._tenants.setdefault(tenant, _Tenant())
        own.runs.setdefault(run, deque()).append(request)
        self._requests[id], self._run_of[id] = request, run

    def drop(self, id: int) -> bool:
        """Forget a request that no round has begun; false for one that is unknown or begun."""
        request = self._requests.get(id)
        if request is None or request.started:
            return False
        self._remove(id)
        return True

    def fail(self, id: int) -> None:
        """Forget the rest of a request that failed in one of its slices."""
        if id in self._requests:
            self._remove(id)

    def _remove(self, id: int) -> None:
        request, run = self._requests.pop(id), self._run_of.pop(id)
        own = self._tenants[request.tenant]
        own.runs[run].remove(request)
        self._tidy(request.tenant, run)

    def _tidy(self, tenant: str, run: str) -> None:
        own = self._tenants[tenant]
        if not own.runs[run]:
            del own.runs[run]
        if not own.runs:  # who has nothing queued saves nothing up
            del self._tenants[tenant]
            self._passed.pop(tenant, None)

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def tokens(self) -> int:
        """Tokens that are queued."""
        return sum(request.cost for request in self._requests.values())

    def ahead(self, id: int) -> Ahead:
        """What stands before a request."""
        before = []
        for other, request in self._requests.items():
            if other == id:
                break
            before.append(request)
        return Ahead(len(before), sum(r.cost for r in before), len({r.tenant for r in before}))

    # -- rounds --------------------------------------------------------------------------------------------------

    def next_round(self) -> list[Pick]:
        """Slices of different runs, together within the budget; empty when nothing is queued."""
        round_ = _Round(self.budget, self.runs)
        # those that the last round had no room for come before small requests in every other round
        self._overtaken = bool(self._passed) and not self._overtaken
        for part in (self._owed, self._small) if self._overtaken is False else (self._small, self._owed):
            part(round_)
        waiting = True
        while waiting and self._open(round_):
            waiting = False
            for tenant in list(self._tenants):
                waiting |= self._turn(tenant, round_)
        return round_.picks

    def _open(self, round_: _Round) -> bool:
        full = self.alone and any(pick.indices is not None for pick in round_.picks)
        return bool(self._tenants) and round_.room > 0 and len(round_.picks) < self.runs and not full

    def _owed(self, round_: _Round) -> None:
        """Tenants that the last round had no room for go on, who is owed most first."""
        passed, self._passed = self._passed, {}
        for tenant in sorted(passed, key=lambda name: -self._tenants[name].credit):
            self._spend(tenant, round_)

    def _small(self, round_: _Round) -> None:
        """Small requests of every tenant that is not in debt, up to half of the budget."""
        for tenant in list(self._tenants):
            own = self._tenants[tenant]
            run = self._choice(own, round_, small=True)
            if run is None or own.credit < 0 or round_.room <= self.budget // 2 or not self._open(round_):
                continue
            self._take(tenant, run, round_)

    def _turn(self, tenant: str, round_: _Round) -> bool:
        """One visit of the round robin. Whether the tenant waits for more credit in this round."""
        own = self._tenants.get(tenant)
        if own is None or not self._open(round_) or next(self._heads(own, round_), None) is None:
            return False
        own.credit = min(own.credit + self.quantum, OWED * self.budget)
        self._tenants.move_to_end(tenant)
        return self._spend(tenant, round_)

    def _spend(self, tenant: str, round_: _Round) -> bool:
        """Slices of one tenant as far as its credit and the round's room go. Whether it is credit that ended it."""
        while (own := self._tenants.get(tenant)) is not None and (run := self._choice(own, round_)) is not None:
            cost = own.runs[run][0].left[0][1]
            if cost > own.credit:
                return True
            if cost > round_.room or not self._open(round_):
                self._passed.setdefault(tenant)
                own.runs.move_to_end(run, last=False)
                return False
            self._take(tenant, run, round_)
        return False

    def _choice(self, own: _Tenant, round_: _Round, *, small: bool = False) -> str | None:
        """The run whose turn it is, unless a small request may overtake it; with `small`, only that of one."""
        turn = next(self._heads(own, round_), None)
        quick = next(self._heads(own, round_, small=True), None)
        if quick is None or (quick != turn and own.jumps >= JUMPS):
            return None if small else turn
        return quick

    def _heads(self, own: _Tenant, round_: _Round, *, small: bool = False) -> Iterator[str]:
        for run, queue in own.runs.items():
            if run not in round_.busy and (not small or (not queue[0].started and queue[0].cost <= self.quantum)):
                yield run

    def _take(self, tenant: str, run: str, round_: _Round) -> None:
        own = self._tenants[tenant]
        own.jumps = 0 if run == next(self._heads(own, round_)) else own.jumps + 1
        request = own.runs[run][0]
        indices, cost = request.left.popleft()
        round_.add(Pick(request.id, run, indices, cost, not request.started, not request.left))
        request.started = True
        own.credit -= cost
        own.runs.move_to_end(run)
        if not request.left:
            self._remove(request.id)


class _Round:
    """A round in the making."""

    def __init__(self, budget: int, runs: int) -> None:
        self.room = budget
        self.picks: list[Pick] = []
        self.busy: set[str] = set()

    def add(self, pick: Pick) -> None:
        self.picks.append(pick)
        self.busy.add(pick.run)
        self.room -= pick.cost
