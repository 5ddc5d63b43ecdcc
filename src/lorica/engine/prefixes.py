"""Keys and values of what was read before, for prompts that begin with it: the last turns of a chat.

In: tokens of a stack with their keys and values. Out: those of the longest beginning of a prompt. The oldest go when
room is needed, and what an adapter that has changed since computed is never found. Refuses to know requests and rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorica.engine.kv_cache import Budget
from lorica.engine.kv_lane import Kept
from lorica.engine.route import Stack
from lorica.engine.updates import stamp

SHORTEST = 16
"""Fewer common tokens are sooner read again with other prompts."""
MOST = 64
"""Entries; each is compared with a prompt."""


@dataclass(slots=True, eq=False)
class _Entry:
    stack: Stack
    stamps: tuple[tuple[int, int], ...]
    tokens: NDArray[np.int64]
    kept: Kept


class Prefixes:
    """Keys and values of at most `limit` positions, taken from a budget that rows may claim back."""

    def __init__(self, budget: Budget, limit: int) -> None:
        self.budget, self.limit = budget, limit
        self._entries: list[_Entry] = []  # the oldest first
        budget.evict = self.evict

    @property
    def bytes(self) -> int:
        parts = (part for entry in self._entries for pair in entry.kept.layers.values() for part in pair)
        return sum(part.numel() * part.element_size() for part in parts)

    def find(self, stack: Stack, tokens: Sequence[int]) -> tuple[Kept, int] | None:
        """What is kept of the beginning of these tokens, the last one left out, and how many of them that are."""
        wanted, best, count = np.asarray(tokens[:-1], dtype=np.int64), None, SHORTEST - 1
        for entry in self._live(stack):
            common = _common(entry.tokens, wanted)
            if common > count:
                best, count = entry, common
        if best is None:
            return None
        self._entries.remove(best)
        self._entries.append(best)
        return best.kept.first(best.kept.total - len(best.tokens) + count), count

    def keep(self, stack: Stack, tokens: Sequence[int], kept: Kept) -> None:
        """Keep a copy, where there is room."""
        own = np.asarray(tokens, dtype=np.int64)
        if len(own) < SHORTEST or kept.total > self.limit:
            return
        for entry in self._live(stack):
            common = _common(entry.tokens, own)
            if common == len(own):
                return
            if common == len(entry.tokens):  # a longer one says all that it says
                self._drop(entry)
        self.evict(self.budget.kept + kept.total - self.limit)
        most = self.budget.limit
        if most is not None and max(self.budget.reserved, self.budget.allocated) + kept.total > most:
            return
        if len(self._entries) >= MOST:
            self._drop(self._entries[0])
        self._entries.append(_Entry(stack, tuple(map(stamp, stack)), own, kept.copy()))
        self.budget.kept += kept.total

    def evict(self, positions: int) -> None:
        """Free at least so many positions, the oldest first."""
        goal = self.budget.kept - positions
        while self._entries and self.budget.kept > goal:
            self._drop(self._entries[0])

    def forget(self, stack: Stack) -> None:
        """Drop all that these adapters had a part in."""
        for entry in [entry for entry in self._entries if not set(stack).isdisjoint(entry.stack)]:
            self._drop(entry)

    def _live(self, stack: Stack) -> list[_Entry]:
        own = [entry for entry in self._entries if entry.stack == stack]
        now = tuple(map(stamp, stack))
        for entry in [entry for entry in own if entry.stamps != now]:
            self._drop(entry)
            own.remove(entry)
        return own

    def _drop(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        self.budget.kept -= entry.kept.total


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Tokens that two rows begin with alike."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
