"""Which learning rate suits each method: successive halving in joint batches, then the winners with other seeds.

In: what a comparison starts from. Out: each method's candidates, the one that won, its runs by seed and their answers.
The rate with the best validation loss wins; nothing is chosen by the test part. Refuses to know reports.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorica.core.errors import FormatError
from lorica.data.example import Example
from lorica.engine.host import RowSpec
from lorica.recipes.compare.config import Entry
from lorica.recipes.compare.ready import Ready
from lorica.recipes.compare.train import Candidate, Field
from lorica.recipes.quickstart import answers

Tuned = dict[Entry, tuple[list[Candidate], Candidate | None]]


def tune(ready: Ready, field: Field) -> Tuned:
    """All candidates of all methods, rung by rung. Returns each method's candidates and the one that won."""
    config, seed = ready.config, ready.config.seeds[0]
    batches, rungs = ready.order(seed), config.rungs()
    groups = {
        entry: [Candidate(entry.label, entry.method, ready.targets(entry), rate, seed) for rate in config.rates(entry)]
        for entry in ready.costs
    }
    start = 0
    for stop in rungs:
        live = [c for group in groups.values() for c in group if c.running]
        ready.observer.stage(
            f"steps {start + 1} to {stop} of {config.steps}: {len(live)} candidates", len(live) * (stop - start)
        )
        _advance(ready, field, live, batches[start:stop], last=stop == config.steps)
        if stop < config.steps:
            _halve(field, groups.values(), stop)
        start = stop
    tuned = {entry: (group, _best(group)) for entry, group in groups.items()}
    for group, best in tuned.values():
        for candidate in group:
            if candidate is not best:
                field.close(candidate)
    return tuned


def _advance(
    ready: Ready, field: Field, candidates: Sequence[Candidate], batches: Sequence[list[Example]], *, last: bool
) -> None:
    """Train these on these batches, then measure them on the validation part, after the last step on the test too."""

    def work(here: list[Candidate]) -> None:
        for batch in batches:
            field.train(here, [batch])
            ready.observer.advance(len(here))
        left = [c for c in here if c.dropped is None]
        for candidate, loss in field.measure(left, ready.parts.validation).items():
            candidate.validation[len(candidate.losses)] = loss
        if last:
            for candidate, loss in field.measure([c for c in left if c.dropped is None], ready.parts.test).items():
                candidate.test = loss

    field.visit(candidates, work)


def _halve(field: Field, groups: Iterable[Sequence[Candidate]], step: int) -> None:
    """Give up the worse half of each method's live rates; of an odd number the greater half stays."""
    for group in groups:
        ranked = sorted((c for c in group if c.running), key=lambda c: c.validation[step])
        for candidate in ranked[(len(ranked) + 1) // 2 :]:
            candidate.beaten = step
            field.close(candidate)


def _best(group: Sequence[Candidate]) -> Candidate | None:
    done = [c for c in group if c.test is not None]
    return min(done, key=lambda c: c.validation[len(c.losses)], default=None)


Runs = dict[Entry, dict[int, tuple[Candidate, int | None]]]


def finals(ready: Ready, field: Field, winners: dict[Entry, Candidate]) -> Runs:
    """The winners with every other seed, and what each answers. A run that fails is left out of its method's."""
    config, runs = ready.config, {entry: {best.seed: best} for entry, best in winners.items()}
    for seed in config.seeds[1:]:
        again = {e: Candidate(e.label, best.method, best.targets, best.lr, seed) for e, best in winners.items()}
        ready.observer.stage(f"seed {seed}: {len(again)} methods", len(again) * config.steps)
        _advance(ready, field, list(again.values()), ready.order(seed), last=True)
        for entry, candidate in again.items():
            runs[entry][seed] = candidate
    right: dict[Candidate, int | None] = {}
    finished = [c for by_seed in runs.values() for c in by_seed.values() if c.test is not None]
    ready.observer.stage("answering test questions", len(finished))

    def ask(here: list[Candidate]) -> None:
        for candidate in here:
            right[candidate] = right_answers(ready, candidate.live().adapter)
            ready.observer.advance(1)

    field.visit(finished, ask)
    return {entry: {s: (c, right.get(c)) for s, c in by_seed.items()} for entry, by_seed in runs.items()}


def right_answers(ready: Ready, adapter: RowSpec) -> int | None:
    """How many questions the model answers right; None without questions, and where its numbers are no numbers."""
    asked = ready.parts.questions
    if not asked:
        return None
    try:
        given = answers(ready.service.sampling_client(adapter), ready.renderer, asked)
    except FormatError:
        return None
    return sum(q.expected == answer for q, answer in zip(asked, given, strict=True))
