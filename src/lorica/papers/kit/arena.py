"""Several adapters trained side by side: one base, the same batches, every method and learning rate in one joint pass.

In: an arena (a base with a task) and entries (method, optimiser, what names the row). Out: a row of measurements for
each entry. Refuses to know which task it is, and papers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lorica.adapters.adapter import Adapter
from lorica.engine.host import Host, TargetSpec
from lorica.methods.base import Method
from lorica.papers.kit.table import Row
from lorica.training.optimizer import AdamWConfig

COLUMNS: Mapping[str, str] = {
    "parameters": "trained parameters",
    "share": "trained parameters over the base's",
    "train loss": "mean training loss of the last tenth of the steps",
    "validation loss": "what the learning rate is chosen by",
    "validation accuracy": "share of right answers; what the learning rate is chosen by",
    "test loss": "loss on rows that nothing was chosen by",
    "test accuracy": "share of right answers on rows that nothing was chosen by",
    "exact match": "share of test answers that equal the expected text, greedily decoded",
}
"""What `race` measures, where a task has it; a paper takes it into its `columns`."""
OPTIMIZER = AdamWConfig(clip=None, schedule="cosine", warmup=0.05)
"""The optimiser of every entry unless it says otherwise: no decay, no clipping, cosine."""


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One adapter in a race. `key` names its row; `targets` None is the method's default."""

    key: Row
    method: Method
    optimizer: AdamWConfig = OPTIMIZER
    targets: TargetSpec = None


class Arena(Protocol):
    """A frozen base, a task, and adapters that train on it. Batches are the same for all adapters."""

    @property
    def adapters(self) -> Sequence[Adapter]:
        """Those that entered last, in their order."""

    @property
    def host(self) -> Host:
        """The base with its adapters."""

    def enter(self, entries: Sequence[Entry], steps: int, seed: int) -> None:
        """Make one adapter for each entry, with its optimiser."""

    def step(self, rng: torch.Generator) -> list[float]:
        """One joint step on a batch that `rng` draws; each adapter's loss before it."""

    @property
    def norms(self) -> Sequence[float]:
        """The norm of each adapter's gradient in the last step."""

    def score(self, part: str) -> list[dict[str, float]]:
        """For each adapter `{part} loss`, and what else the task measures."""

    def untrained(self, part: str) -> dict[str, float]:
        """The base's own scores, without any adapter."""

    def base_parameters(self) -> int:
        """Parameters of the frozen base."""


Watch = Callable[[int, Sequence[float]], Any]
"""`watch(step, losses)`: the losses of all entries at a step (0 first), before its update."""


def rates(keys: Row, method: Method, lrs: Sequence[float], optimizer: AdamWConfig = OPTIMIZER) -> list[Entry]:
    """One entry for each learning rate, named by the keys and `lr`."""
    return [Entry({**keys, "lr": lr}, method, optimizer.replace(lr=lr)) for lr in lrs]


def race(
    arena: Arena,
    entries: Sequence[Entry],
    *,
    steps: int,
    seed: int,
    say: Callable[[str], None],
    parts: Sequence[str] = ("validation", "test"),
    watch: Watch | None = None,
) -> list[Row]:
    """Train all entries together for `steps` steps, then measure. Row i is entry i's: its key, `parameters`, `share`,
    `train loss`, and the scores of the parts. `watch(step, losses)` sees every step's losses, before its update.
    """
    arena.enter(entries, steps, seed)
    rng = torch.Generator().manual_seed(seed)
    losses: list[list[float]] = []
    began = told = time.monotonic()
    for done in range(steps):
        losses.append(arena.step(rng))
        if watch is not None:
            watch(done, losses[-1])
        now = time.monotonic()
        if now - told > 10 and done + 1 < steps:
            left = (now - began) / (done + 1) * (steps - done - 1)
            finite = [loss for loss in losses[-1] if math.isfinite(loss)]
            best = f"best loss {min(finite):.3f}" if finite else "no finite loss"
            say(f"seed {seed}: step {done + 1} of {steps}, {len(entries)} adapters, {best}, {left:.0f} s left")
            told = now
    last = losses[-max(1, steps // 10) :]
    scores: list[dict[str, float]] = [{} for _ in entries]
    for part in parts:
        for own, found in zip(scores, arena.score(part), strict=True):
            own.update(found)
    rows: list[Row] = []
    base = arena.base_parameters()
    for number, (entry, adapter) in enumerate(zip(entries, arena.adapters, strict=True)):
        count = adapter.layout.trainable_count()
        trained = sum(step[number] for step in last) / len(last)
        rows.append({**entry.key, "parameters": count, "share": count / base, "train loss": trained, **scores[number]})
    return rows
