"""Slices of several runs' training requests in one batch, and what each of them gets, whatever the others sent.

In: `commands.Train` and the scheduler's slices. Out: for each slice nothing yet, the request's reply, or its error. A
batch that raises, or in which a number is not finite, is computed again slice by slice, so that only its cause suffers.
Refuses to know queues and tenants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch

from lorica.core.errors import DataError
from lorica.engine import commands
from lorica.engine.checks import check_tokens
from lorica.engine.engine import Engine, Item, Result
from lorica.engine.intake import Intake, take_in
from lorica.engine.runs import Run, Runs
from lorica.engine.scheduler import Pick, slices
from lorica.training.losses import Loss, make_loss


@dataclass(slots=True, eq=False)
class Request:
    """A training request on its way: its data, and the results of those that were computed."""

    command: commands.Train
    loss: Loss
    intakes: list[Intake]
    results: dict[int, Result] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One slice of a request."""

    request: Request
    indices: tuple[int, ...]
    cost: int
    first: bool = False
    last: bool = False

    @property
    def command(self) -> commands.Train:
        return self.request.command


Outcome = commands.Trained | Exception | None


class Joint:
    """Computes slices together. `most` is the longest sequence that the model was made for; `recomputed` counts batches
    that were computed again.
    """

    def __init__(self, engine: Engine, runs: Runs, *, most: int | None) -> None:
        self.engine = engine
        self.runs = runs
        self.most = most
        self.recomputed = 0
        self._requests: dict[int, Request] = {}
        self._ill: set[str] = set()  # runs whose last numbers were not finite; they are computed alone

    def prepare(self, command: commands.Train) -> list[Part]:
        """Check a request and cut it into slices, a function of the request alone. Raises DataError, ConfigError."""
        loss = make_loss(command.loss, command.config)
        if not command.datums:
            raise DataError("The request has no data; give at least one datum.")
        names = [f"Datum {i}" for i in range(len(command.datums))]
        intakes = [take_in(message, loss, name) for message, name in zip(command.datums, names, strict=True)]
        data = [intake.datum for intake in intakes]
        check_tokens(self.engine.host.backbone, [datum.tokens for datum in data], names)
        check_tokens(self.engine.host.backbone, [datum.targets for datum in data], [f"{n} as target" for n in names])
        for name, datum in zip(names, data, strict=True):
            if self.most is not None and len(datum) > self.most:
                raise DataError(f"{name} has {len(datum):,} tokens; this model takes at most {self.most:,}.")
        request = Request(msgspec.structs.replace(command, datums=[]), loss, intakes)
        lengths = [len(datum) for datum in data]
        found = slices(lengths, self.engine.token_budget)
        self._requests[command.id] = request
        return [Part(request, part, sum(lengths[i] for i in part)) for part in found]

    def part(self, pick: Pick) -> Part:
        """The slice that the scheduler picked."""
        assert pick.indices is not None
        return Part(self._requests[pick.id], pick.indices, pick.cost, pick.first, pick.last)

    def forget(self, id: int) -> None:
        """A request is over."""
        self._requests.pop(id, None)

    def close(self, run: str) -> None:
        """A run is closed."""
        self._ill.discard(run)

    # -- computing -----------------------------------------------------------------------------------------------

    def compute(self, parts: Sequence[Part]) -> list[tuple[Part, Outcome]]:
        """Slices of different runs. An error is of the slice's request, all of whose effect is undone."""
        outcomes: dict[Part, Outcome] = {}
        ready: list[tuple[Part, Run]] = []
        names = {part.command.run for part in parts}
        for part in parts:
            try:
                run = self.runs.get(part.command.run, keep=names)
                if part.first and part.command.backward:
                    run.mark = None if part.last else run.remember()
                ready.append((part, run))
            except Exception as error:
                outcomes[part] = self._over(part, error)
        for backward in (True, False):
            chosen = [(part, run) for part, run in ready if part.command.backward is backward]
            well = [pair for pair in chosen if pair[1].name not in self._ill]
            for group in [well, *([pair] for pair in chosen if pair not in well)]:
                self._group(group, backward, outcomes)
        return [(part, outcomes[part]) for part in parts]

    def _group(self, group: list[tuple[Part, Run]], backward: bool, outcomes: dict[Part, Outcome]) -> None:
        if len(group) > 1:
            marks = [run.remember() for _, run in group] if backward else []
            try:
                results = self._call(group, backward)
                fine = [self._finite(run, own, backward) for (_, run), own in zip(group, results, strict=True)]
            except Exception:
                fine = [False]  # each is told its own error below
            if not all(fine):
                self.recomputed += 1
                for (_, run), mark in zip(group, marks, strict=False):
                    run.restore(mark)
                for pair in group:
                    self._group([pair], backward, outcomes)
                return
        elif group:
            part, run = group[0]
            try:
                results = self._call(group, backward)
                fine = [self._finite(run, results[0], backward)]
            except Exception as error:
                if run.mark is not None and backward:
                    run.restore(run.mark)
                run.mark = None
                outcomes[part] = self._over(part, error)
                return
        else:
            return
        for (part, run), own, well in zip(group, results, fine, strict=True):
            (self._ill.discard if well else self._ill.add)(run.name)
            outcomes[part] = self._done(part, run, own, backward)

    def _call(self, group: list[tuple[Part, Run]], backward: bool) -> list[list[Result]]:
        items = []
        for part, run in group:
            adapter, _ = run.live()
            items += [Item(part.request.intakes[i].datum, adapter, part.request.loss) for i in part.indices]
        run_all = self.engine.forward_backward if backward else self.engine.forward
        results = iter(run_all(items))
        return [[next(results) for _ in part.indices] for part, _ in group]

    def _finite(self, run: Run, results: Sequence[Result], backward: bool) -> bool:
        fine = all(math.isfinite(r.loss) and bool(np.isfinite(r.logprobs).all()) for r in results)
        return fine and (not backward or bool(torch.isfinite(run.live()[0].grad.sum())))

    def _done(self, part: Part, run: Run, results: list[Result], backward: bool) -> Outcome:
        if backward:
            run.changed()
            run.accumulated = True
        request = part.request
        request.results |= dict(zip(part.indices, results, strict=True))
        if not part.last:
            return None
        run.mark = None
        ordered = [request.results[i] for i in range(len(request.intakes))]
        outputs = [
            {"logprobs": intake.output(result.logprobs)}
            for intake, result in zip(request.intakes, ordered, strict=True)
        ]
        self.forget(part.command.id)
        return commands.Trained(part.command.id, outputs, {"loss:sum": sum(result.loss for result in ordered)})

    def _over(self, part: Part, error: Exception) -> Exception:
        self.forget(part.command.id)
        return error
