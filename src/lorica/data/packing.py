"""Examples to batches: which examples go together, in what order, and as one run of tokens without padding.

In: examples, sequences. Out: groups of indices (`pack`, `Sampler`) and `Packed` arrays (`end_to_end`) in which every
sequence keeps its own positions and its own length, so that an attention kernel can keep them apart.
Refuses to know tensors, models and devices.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorica.core.errors import ConfigError, DataError, ResumeError
from lorica.data.example import Example

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Several sequences end to end: `tokens` and `positions` [N] int64; positions begin at 0 in each sequence.
    `lengths` [S].
    """

    tokens: Ints
    positions: Ints
    lengths: Ints

    @property
    def cu_seqlens(self) -> Ints:
        """Where sequences begin and end: [S + 1], from 0 to N."""
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.lengths)])


def end_to_end(rows: Sequence[Sequence[int] | Ints]) -> Packed:
    """Lay sequences of token ids end to end. Raises DataError when there is none, or one is empty."""
    if not rows or not all(len(row) for row in rows):
        raise DataError("A batch needs at least one sequence, and every sequence at least one token.")
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return Packed(
        tokens=np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]),
        positions=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        lengths=lengths,
    )


def pack(examples: Sequence[Example], token_budget: int, order: Sequence[int] | None = None) -> list[list[int]]:
    """Group example indices into batches of at most `token_budget` input tokens, each index once.

    Best fit in the given order: an example joins the fullest batch that still has room, else it opens one. The same
    input gives the same groups. Raises DataError for an example that exceeds the budget by itself.
    """
    if token_budget < 1:
        raise ConfigError(f"token_budget is {token_budget}; it must be at least 1.")
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), ascending
    for index in range(len(examples)) if order is None else order:
        need = len(examples[index]) - 1
        if need > token_budget:
            raise DataError(
                f"{examples[index].where} has {need} input tokens, more than a batch may hold ({token_budget}).",
                hint="Raise token_budget or lower max_length.",
            )
        at = bisect.bisect_left(room, (need, -1))
        left, group = room.pop(at) if at < len(room) else (token_budget, len(groups))
        if group == len(groups):
            groups.append([])
        groups[group].append(index)
        if left > need:
            bisect.insort(room, (left - need, group))
    return groups


class Sampler:
    """An endless, repeatable stream of batches: each epoch is a new order of all examples, a function of (seed, epoch).

    Args:
        examples: what to draw from.
        batch_size: examples in a batch; the last batch of an epoch may be smaller.
        token_budget: alternatively, the most input tokens in a batch.
        shuffle: without it every epoch keeps the order of the file.

    `state()` after any batch, given to `load_state` of a new sampler over the same examples, continues the stream
    exactly. Raises ConfigError unless exactly one of `batch_size` and `token_budget` is given, and DataError without
    examples.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int | None = None,
        token_budget: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if (batch_size is None) == (token_budget is None):
            raise ConfigError("A sampler needs either batch_size or token_budget, and not both.")
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1.")
        if not examples:
            raise DataError("There are no examples to draw batches from.")
        self._examples = examples
        self._settings: dict[str, int | bool | None] = {
            "seed": seed,
            "examples": len(examples),
            "batch_size": batch_size,
            "token_budget": token_budget,
            "shuffle": shuffle,
        }
        self.epoch = 0
        self.batch = 0
        self._cached: tuple[int, list[list[int]]] = (0, self._plan(0))

    def batches(self, epoch: int) -> list[list[int]]:
        """Every batch of one epoch, as indices of examples."""
        if self._cached[0] != epoch:
            self._cached = (epoch, self._plan(epoch))
        return self._cached[1]

    def _plan(self, epoch: int) -> list[list[int]]:
        order = list(range(len(self._examples)))
        if self._settings["shuffle"]:
            # A text seed goes through SHA-512, so neighbouring seeds and epochs give unrelated orders.
            random.Random(f"{self._settings['seed']}/{epoch}").shuffle(order)
        size, budget = self._settings["batch_size"], self._settings["token_budget"]
        if budget is not None:
            return pack(self._examples, budget, order)
        return [order[start : start + size] for start in range(0, len(order), size)] if size else []

    def steps(self, epochs: int) -> int:
        """The number of batches in the first `epochs` epochs."""
        if self._settings["batch_size"] is not None:
            return epochs * len(self.batches(self.epoch))
        return sum(len(self._plan(epoch)) for epoch in range(epochs))

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        """The next batch, as indices of examples. The stream has no end: count steps or epochs outside."""
        plan = self.batches(self.epoch)
        found = plan[self.batch]
        self.batch += 1
        if self.batch == len(plan):
            self.epoch, self.batch = self.epoch + 1, 0
        return found

    def state(self) -> dict[str, Any]:
        """Where the stream stands: plain values, fit for JSON."""
        return {"epoch": self.epoch, "batch": self.batch, **self._settings}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` stood. Raises ResumeError when it belongs to other data or settings."""
        for name, mine in self._settings.items():
            if name not in state or state[name] != mine:
                saved = state.get(name)
                raise ResumeError(
                    f"The saved data position has {name} = {saved!r}, but this run has {name} = {mine!r}."
                )
        epoch, batch = state.get("epoch", -1), state.get("batch", -1)
        whole = isinstance(epoch, int) and isinstance(batch, int) and epoch >= 0
        if not whole or not 0 <= batch < len(self.batches(epoch)):
            raise ResumeError(f"The saved data position (epoch {epoch!r}, batch {batch!r}) lies outside the data.")
        self.epoch, self.batch = epoch, batch
