"""Many candidates trained in the same batches: one joint call for each step, whoever drops out, however few fit.

In: candidates (a method with one learning rate), batches of one order. Out: losses in the candidates. A candidate whose
numbers are not finite, or whose method fails, is dropped with the reason; the others are as if it had not been there.
Refuses to know how candidates are chosen and shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorica.adapters.adapter import Adapter
from lorica.client.local import Loss, Service, TrainingClient
from lorica.core.errors import LoricaError
from lorica.core.storage import storage
from lorica.data.example import Example
from lorica.engine.engine import Item
from lorica.engine.host import TargetSpec
from lorica.methods import Method
from lorica.training.optimizer import AdamWConfig

FAILURES = (LoricaError, RuntimeError, ArithmeticError)
"""What a method raises that cannot be trained here, or whose numbers left the range of its decompositions."""


@dataclass(eq=False)
class Candidate:
    """A method with one learning rate and one seed, and what became of it.

    `losses` are the training means of each step, `validation` the held-out means by steps done. `dropped` says why it
    could not go on, `beaten` after which step other rates were better. `client` is None while it is not in memory.
    """

    label: str
    method: Method
    targets: TargetSpec
    lr: float
    seed: int
    losses: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)
    test: float | None = None
    dropped: str | None = None
    beaten: int | None = None
    client: TrainingClient | None = None

    @property
    def name(self) -> str:
        return f"{self.label} lr={self.lr:g} seed={self.seed}"

    @property
    def running(self) -> bool:
        """Whether it was neither dropped nor beaten."""
        return self.dropped is None and self.beaten is None

    def live(self) -> TrainingClient:
        assert self.client is not None
        return self.client


def why(error: Exception) -> str:
    """An error as a sentence of a report."""
    if isinstance(error, LoricaError):
        return error.message
    said = (str(error) or "it said nothing").splitlines()[0].rstrip(".")
    return f"It failed with {type(error).__name__}: {said}."


class Field:
    """Candidates on one service, at most `together` of them in memory; others wait as files in `folder`."""

    def __init__(self, service: Service, optimizer: AdamWConfig, steps: int, *, together: int, folder: Path) -> None:
        self.service = service
        self.optimizer = optimizer
        self.steps = steps
        self.together = together
        self.folder = folder
        self._here: list[Candidate] = []
        self._files: dict[Candidate, Path] = {}

    # -- who is in memory ----------------------------------------------------------------------------------------

    def visit(self, candidates: Sequence[Candidate], work: Callable[[list[Candidate]], None]) -> None:
        """Do something with all candidates that are running, as many at a time as may be in memory."""
        left = [c for c in candidates if c.running]
        for start in range(0, len(left), self.together):
            group = left[start : start + self.together]
            work(self.bring(group))
            for candidate in group:
                if not candidate.running:
                    self.close(candidate)

    def bring(self, group: Sequence[Candidate]) -> list[Candidate]:
        """Have these in memory, if need be instead of others; a new one is made. Returns those that could be had."""
        others = [c for c in self._here if c not in group]
        for candidate in others[: max(0, len(others) + len(group) - self.together)]:
            self._park(candidate)
        for candidate in group:
            if candidate.client is None:
                try:
                    (self._load if candidate in self._files else self.open)(candidate)
                except FAILURES as error:
                    candidate.dropped = why(error)
        return [c for c in group if c.dropped is None]

    def open(self, candidate: Candidate) -> None:
        """Give a new candidate its adapter. Raises what its method raises when it does not fit."""
        candidate.client = self.service.training_client(
            candidate.method,
            candidate.targets,
            name=candidate.name,
            seed=candidate.seed,
            optimizer=self.optimizer.replace(lr=candidate.lr),
            steps=self.steps,
        )
        self._here.append(candidate)

    def close(self, candidate: Candidate) -> None:
        """Forget its tensors, in memory and on disk."""
        self._leave(candidate)
        file = self._files.pop(candidate, None)
        if file is not None:
            file.unlink(missing_ok=True)

    def _leave(self, candidate: Candidate) -> None:
        if candidate.client is not None:
            self.service.host.delete(candidate.client.adapter.name)
            self._here.remove(candidate)
            candidate.client = None

    def _park(self, candidate: Candidate) -> None:
        client = candidate.live()
        path = self._files.setdefault(candidate, self.folder / f"{id(candidate)}.pt")
        with storage(path, RuntimeError):  # torch.save reports a failed write as a RuntimeError
            torch.save({"client": client.state(), "frozen": client.adapter.frozen}, path)
        self._leave(candidate)

    def _load(self, candidate: Candidate) -> None:
        host = self.service.host
        saved: dict[str, Any] = torch.load(self._files[candidate], map_location="cpu", weights_only=True)
        layout = host.layout(candidate.method, candidate.targets)
        adapter = Adapter(candidate.name, layout, seed=candidate.seed, base=host.backbone.fingerprint())
        adapter.to(device=host.backbone.device)
        for site, owned in saved["frozen"].items():
            for param, value in owned.items():
                adapter.set(site, param, value)
        optimizer = self.optimizer.replace(lr=candidate.lr)
        candidate.client = TrainingClient(self.service, host.put(adapter), optimizer, self.steps)
        self._here.append(candidate)
        saved["client"]["rng"] = torch.get_rng_state()  # masks come from the adapter's seed, not from torch's state
        candidate.client.load_state(saved["client"])

    # -- training and measuring ----------------------------------------------------------------------------------

    def train(self, candidates: Sequence[Candidate], batches: Sequence[Sequence[Example]]) -> None:
        """One step on each batch for all of these, which are in memory."""
        for batch in batches:
            live = [c for c in candidates if c.dropped is None]
            if not live:
                return
            for candidate, loss in zip(live, self._gradients(live, batch), strict=True):
                if loss is not None:
                    candidate.losses.append(loss.mean)
                    self._step(candidate)

    def _gradients(self, live: Sequence[Candidate], batch: Sequence[Example]) -> list[Loss | None]:
        """The joint pass; where it fails or a number is not finite, every candidate by itself, to find out whose."""
        before = [c.live().adapter.forwards for c in live]
        try:
            losses = self.service.forward_backward([(c.live(), batch) for c in live])
            if all(_finite(c, loss) for c, loss in zip(live, losses, strict=True)):
                return list(losses)
            problems = ["Its loss or gradient is not finite"] * len(live)
        except FAILURES as error:
            problems = [why(error)] * len(live)
        for candidate, count in zip(live, before, strict=True):
            _forget(candidate.live())
            candidate.live().adapter.forwards = count
        if len(live) > 1:
            return [loss for candidate in live for loss in self._gradients([candidate], batch)]
        live[0].dropped = f"{problems[0].rstrip('.')} (step {len(live[0].losses) + 1})."
        return [None]

    def _step(self, candidate: Candidate) -> None:
        try:
            norm = candidate.live().optim_step().grad_norm
        except FAILURES as error:
            candidate.dropped = f"{why(error).rstrip('.')} (step {len(candidate.losses)})."
            return
        if not math.isfinite(norm):
            candidate.dropped = f"Its gradient is not finite (step {len(candidate.losses)})."

    def measure(self, candidates: Sequence[Candidate], examples: Sequence[Example]) -> dict[Candidate, float]:
        """The mean held-out loss of each candidate that has one; the others are dropped."""
        found: dict[Candidate, float] = {}
        for candidate, loss in zip(candidates, self._means(candidates, examples), strict=True):
            if isinstance(loss, str):
                candidate.dropped = f"{loss.rstrip('.')} (after step {len(candidate.losses)})."
            else:
                found[candidate] = loss
        return found

    def _means(self, live: Sequence[Candidate], examples: Sequence[Example]) -> list[float | str]:
        if not live:
            return []
        try:
            items = [Item(example, c.live().adapter) for c in live for example in examples]
            results = iter(self.service.engine.forward(items))
            means = [mean(examples, [next(results).loss for _ in examples]) for _ in live]
            if all(map(math.isfinite, means)):
                return list(means)
            problem = "Its held-out loss is not finite"
        except FAILURES as error:
            problem = why(error)
        return [problem] if len(live) == 1 else [found for c in live for found in self._means([c], examples)]


def mean(examples: Sequence[Example], losses: Sequence[float]) -> float:
    """Nats for each unit of loss weight."""
    return sum(losses) / sum(abs(weight) for example in examples for weight in example.weights)


def _finite(candidate: Candidate, loss: Loss) -> bool:
    return math.isfinite(loss.total) and bool(torch.isfinite(candidate.live().adapter.collect_grad().sum()))


def _forget(client: TrainingClient) -> None:
    """Drop a gradient, as if its pass had not been."""
    client.adapter.zero_grad()
    client.weight, client.waiting = 0.0, False
