"""An open batch of samples: requests enter and leave at any step, with mixed adapters and settings.

In: requests; turns, which somebody else's loop calls. Out: events: tokens as they come, results, failures. A turn reads
waiting prompts in one packed pass of bounded length and makes one decoding step for all rows, of a few tokens where
nobody waits for each. What a request needs is promised before it starts, so none can exhaust memory; what does not fit
now waits, in order. Refuses to know text, users, files and threads.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from lorica.core.errors import ConfigError, DataError, RouteError
from lorica.engine.batch import Batch, reads_on, steps
from lorica.engine.checks import check_tokens
from lorica.engine.host import Host
from lorica.engine.jobs import Job
from lorica.engine.kv_cache import Budget
from lorica.engine.kv_lane import Kept
from lorica.engine.prefixes import Prefixes
from lorica.engine.prompts import Prompt, Read, read, read_on
from lorica.engine.requests import Event, Failed, Finished, StreamRequest
from lorica.engine.trunk import Trunk
from lorica.engine.updates import Updates
from lorica.models.positions import context, uniform_positions

PROMPT_BUDGET = 8192
"""Most prompt tokens of one packed pass; a longer prompt runs alone."""


class Stream:
    """Samples on a host.

    Args:
        host: the adapters and their backbone, which must be a causal language model. Between turns it may run others'
            batches and train other adapters.
        slots: most rows that are decoded at once.
        kv_budget: most positions whose keys and values there is memory for; None is no limit.
        together: rows of all requests share passes. Without, each request has passes of its own, and its numbers do not
            depend on who else is there, bit for bit.
        prefixes: most positions, out of the budget, that are kept of earlier prompts; by default a quarter of the
            budget, none without a budget or with `together` off.

    Raises: MethodError for a backbone that cannot be sampled from.
    """

    def __init__(
        self,
        host: Host,
        *,
        slots: int = 32,
        kv_budget: int | None = None,
        together: bool = True,
        prefixes: int | None = None,
    ) -> None:
        if slots < 1 or (kv_budget is not None and kv_budget < 1):
            raise ConfigError(f"A stream needs at least one slot and one position, not {slots} and {kv_budget}.")
        self.host, self.slots, self.together = host, slots, together
        self.trunk = Trunk(host)
        self._steps, self._packs = steps(self.trunk), self.trunk.packs()
        self.budget = Budget(kv_budget)
        self._updates = Updates()
        limit = (kv_budget or 0) // 4 if prefixes is None else prefixes
        reusing = together and limit > 0 and reads_on(self.trunk)
        self._prefixes = Prefixes(self.budget, limit) if reusing else None
        self._jobs: dict[Hashable, Job] = {}
        self._waiting: list[Job] = []  # whose prompt was not read, or some of whose draws have no row
        self._batches: dict[Job | None, Batch] = {}
        self._inside = False
        self._removals = host.removals

    # -- requests --------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        return not self._jobs

    @property
    def waiting(self) -> int:
        """Requests whose prompt was not read yet."""
        return sum(job.read is None for job in self._waiting)

    @property
    def live(self) -> int:
        """Rows that are being sampled."""
        return sum(batch.live for batch in self._batches.values())

    @property
    def positions(self) -> int:
        """Positions that there is memory for now; at most the budget."""
        return self.budget.allocated

    @property
    def bytes(self) -> int:
        """Memory of all kept keys and values."""
        own = sum(lane.bytes for cache in self.budget.caches for lane in cache.lanes.values())
        return own + (0 if self._prefixes is None else self._prefixes.bytes)

    @torch.no_grad()
    def add(self, request: StreamRequest) -> None:
        """Let a request wait for its turn.

        Raises: DataError for an empty prompt, an id outside the vocabulary, positions beyond the model's or the whole
        budget's, numbers below zero and a key that is in use; RouteError for an adapter that is not resident.
        """
        name = request.name
        if request.key in self._jobs:
            raise DataError(f"There is a request with key {request.key!r} already; every request needs one of its own.")
        if not len(request.prompt):
            raise DataError(f"{name} is empty; a model needs at least one token to go on from.")
        if request.num_samples < 1 or min(request.topk_prompt, request.topk_sample) < 0:
            raise DataError(
                f"{name} asks for {request.num_samples} samples, topk_prompt {request.topk_prompt} and topk_sample "
                f"{request.topk_sample}; at least one sample and no number below zero is right."
            )
        check_tokens(self.host.backbone, [request.prompt], [name])
        stack = self.host.stacks([request.stack])[0]
        soft, prefix = self.trunk.virtual([stack])[0]
        job = Job(request, soft + prefix + len(request.prompt), prefix, False)
        self._measure(job)
        limit = uniform_positions(self.host.model)
        job.stepwise = self._steps and (limit is None or job.need <= limit)
        job.pending = request.num_samples if request.params.max_tokens else 0
        self._jobs[request.key] = job
        self._waiting.append(job)

    def _measure(self, job: Job) -> None:
        """Raises DataError where a job's positions do not fit into the model or the budget."""
        request, most, budget = job.request, context(self.host.model), self.budget.limit
        asked = request.params.max_tokens
        virtual = job.total - len(request.prompt)
        told = f"{request.name} has {len(request.prompt)} tokens{f' and {virtual} virtual tokens' if virtual else ''}"
        told += f", and {asked} are to be sampled: {job.need} positions" if asked else f": {job.need} positions"
        for limit, whose in ((most, "this model has"), (budget, "the cache of this server has room for")):
            if limit is None or job.need <= limit or (whose != "this model has" and not job.goes_on):
                continue
            fits = job.total <= limit and asked
            raise DataError(
                f"{told}, but {whose} {limit}.",
                hint=f"Shorten the prompt, or set max_tokens to at most {limit - job.total + 1}."
                if fits
                else "Shorten the prompt.",
            )

    def cancel(self, key: Hashable) -> bool:
        """Forget a request, which gets no further event. Returns whether it was there."""
        job = self._jobs.get(key)
        if job is None:
            return False
        job.over = True
        self._close([job], [])
        return True

    def forget(self, *adapters: object) -> None:
        """Let go of all that is kept of adapters without requests: they are leaving the host."""
        gone = [adapter for adapter in self._updates.known() if adapter in adapters]
        self._updates.forget(gone)
        if self._prefixes is not None:
            self._prefixes.forget(tuple(gone))

    # -- turns -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def turn(self, max_prompt_tokens: int = PROMPT_BUDGET) -> list[Event]:
        """Read waiting prompts of at most so many tokens together (a longer one alone; none at 0), seat their rows, and
        sample one token of every row: some more where no request `tells`.
        """
        events: list[Event] = []
        with self.serving():
            self._expel(events)
            self._admit(max_prompt_tokens, events)
            for batch in self._batches.values():
                batch.step(events)
        self._close([self._jobs[e.key] for e in events if isinstance(e, Finished | Failed)], events)
        return events

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, the model is in eval mode and updates are lowered once. Turns enter it; a loop of turns that nothing
        interrupts is faster inside.
        """
        if self._inside:
            yield
            return
        executor = self.host.executor
        with ExitStack() as inside:
            inside.enter_context(self.trunk.modes(training=False))
            before, executor.memo, self._inside = executor.memo, self._updates.memo, True
            try:
                yield
            finally:
                executor.memo, self._inside = before, False

    def _expel(self, events: list[Event]) -> None:
        """Fail requests whose adapters have left the host."""
        if self._removals == self.host.removals:
            return
        self._removals = self.host.removals
        for job in self._jobs.values():
            try:
                self.host.stacks([job.request.stack])
            except RouteError as error:
                job.fail(error, events)
        self._waiting = [job for job in self._waiting if not job.over]
        for batch in self._batches.values():
            batch.settle(events)

    def _close(self, jobs: list[Job], events: list[Event]) -> None:
        """Forget jobs that are over."""
        for job in jobs:
            del self._jobs[job.request.key]
        if not jobs:
            return
        self._waiting = [job for job in self._waiting if not job.over]
        for owner, batch in list(self._batches.items()):
            batch.settle(events)
            if owner is not None and owner.over:
                batch.cache.close()
                del self._batches[owner]
        self._updates.tidy(frozenset(a for job in self._jobs.values() if job.read for a in job.request.stack))

    # -- admission -------------------------------------------------------------------------------------------------

    def _admit(self, room: int, events: list[Event]) -> None:
        """Seat draws that wait, then read prompts, in order; what needs no row may pass what waits for one."""
        chosen: list[tuple[Job, int]] = []
        hits: dict[Job, tuple[Kept, int]] = {}
        free, blocked = self.slots - self.live, False
        for job in self._waiting:
            rows = 0
            if job.goes_on:
                if not blocked and (rows := self._claim(job, free)):
                    free -= rows
                elif job.read is None:
                    blocked = True
                    continue
                blocked = blocked or rows < job.pending
            if job.read is not None:
                if rows:
                    self._batch(job).more(job, rows, events)
                continue
            hit = self._known(job)
            cost = job.total - (hit[1] if hit else 0)
            if room <= 0 or (chosen and cost > room):
                for _ in range(rows if job.stepwise else 0):
                    self._batch(job).cache.release(job.need)
                break
            chosen.append((job, rows or job.pending))
            room -= cost
            if hit:
                hits[job] = hit
        self._updates.use(adapter for job, _ in chosen for adapter in job.request.stack)
        for group in self._passes(chosen, hits):
            self._read(group, hits, events)
        self._waiting = [job for job in self._waiting if not job.over and (job.read is None or job.pending)]

    def _claim(self, job: Job, free: int) -> int:
        """Promise rows to a job, as many as there is room for; for one that is alone all that it will ever have."""
        most = min(job.pending, self.slots)
        if not self.together:
            limit = self.budget.limit
            most = most if limit is None or not job.stepwise else min(most, limit // job.need)
            if job.read is not None or free < most:  # its other draws take the places of its own first ones
                return 0
            return most if not job.stepwise or self._batch(job).cache.claim(job.need, most) else 0
        most = min(most, free)
        if not job.stepwise:
            return most
        cache, rows = self._batch(job).cache, 0
        while rows < most and cache.claim(job.need):
            rows += 1
        return rows

    def _batch(self, job: Job) -> Batch:
        owner = None if self.together else job
        if owner not in self._batches:
            self._batches[owner] = Batch(self.trunk, self._updates, self.budget, self._prefixes)
        return self._batches[owner]

    def _known(self, job: Job) -> tuple[Kept, int] | None:
        if self._prefixes is None or not job.stepwise or job.request.scores_prompt:
            return None
        return self._prefixes.find(job.request.stack, job.request.prompt)

    def _passes(self, chosen: list[tuple[Job, int]], hits: dict[Job, tuple[Kept, int]]) -> list[list[tuple[Job, int]]]:
        """Jobs whose prompts share a pass: all that can."""
        shared: list[tuple[Job, int]] = []
        alone: list[list[tuple[Job, int]]] = []
        for job, rows in chosen:
            # rotations that depend on the longest row of a pass must not be another row's
            if self.together and self._packs and job not in hits and (job.stepwise or not self._steps):
                shared.append((job, rows))
            else:
                alone.append([(job, rows)])
        rank: dict[object, int] = {}
        shared.sort(key=lambda pair: rank.setdefault(pair[0].request.stack, len(rank)))
        return [shared, *alone] if shared else alone

    def _read(self, group: list[tuple[Job, int]], hits: dict[Job, tuple[Kept, int]], events: list[Event]) -> None:
        """Read the prompts of a group and seat the rows. Whatever fails for several is tried again one by one."""
        try:
            if len(group) == 1 and group[0][0] in hits:
                found = [self._read_behind(group[0][0], *hits[group[0][0]])]
            else:
                asked = [
                    Prompt(r.prompt, r.stack, job.prefix, r.prompt_logprobs, r.topk_prompt)
                    for job, r in ((job, job.request) for job, _ in group)
                ]
                found = read(
                    self.trunk, asked, keep=any(job.goes_on and job.stepwise for job, _ in group), updates=self._updates
                )
        except Exception as error:
            if len(group) > 1:
                for pair in group:
                    self._read([pair], hits, events)
                return
            job, rows = group[0]
            job.fail(error, events)
            self._release(job, rows)
            return
        arrivals = []
        for (job, rows), own in zip(group, found, strict=True):
            going = job.goes_on and job.stepwise
            job.start(own if own.kept is None else Read(own.hidden_D, None, own.logprobs, own.topk), events)
            if job.over:
                self._release(job, rows)
            elif going and self._prefixes is not None and own.kept is not None:
                self._prefixes.keep(job.request.stack, job.request.prompt, own.kept)
            if not job.over:
                arrivals.append((job, own.kept if going else None, rows))
        for owner in {self._batch(job) for job, _, _ in arrivals}:
            owner.seat([entry for entry in arrivals if self._batch(entry[0]) is owner], events)

    def _release(self, job: Job, rows: int) -> None:
        for _ in range(rows if job.goes_on and job.stepwise else 0):
            self._batch(job).cache.release(job.need)

    def _read_behind(self, job: Job, kept: Kept, count: int) -> Read:
        hidden_TD, longer = read_on(self.trunk, kept, job.request.prompt[count:], job.request.stack)
        job.cached = count
        return Read(hidden_TD[-1].clone(), longer)
