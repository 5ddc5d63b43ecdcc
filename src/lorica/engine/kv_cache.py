"""The key-value cache of rows that are decoded together: lanes of rows of about one length, under a budget.

In: keys and values of prompts, with the most positions that each row will have. Out: attention over all lanes, in the
order of the step's rows. What was promised to a row is never taken by another: memory cannot run out while rows grow.
Refuses to know adapters, models and sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorica.engine.kv_lane import Kept, Lane, Place
from lorica.engine.packed import Prefix

GROWTH = 256
"""Slots that are reserved beyond the prompts at first; afterwards the number doubles."""
SHORT = 512
"""Rows of at most so many positions share a lane; longer ones share it with rows of up to four times the length."""


class Budget:
    """Positions that all caches together may have memory for; None is no limit.

    Attributes: `kept` are positions that somebody else holds, and `evict` frees some of those: it is told how many.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.caches: list[KVCache] = []
        self.kept = 0
        self.evict: Callable[[int], None] = lambda positions: None

    @property
    def allocated(self) -> int:
        """Positions that there is memory for."""
        return self.kept + sum(lane.places * lane.capacity for cache in self.caches for lane in cache.lanes.values())

    @property
    def reserved(self) -> int:
        """Positions that were promised."""
        return self.kept + sum(cache.reserved for cache in self.caches)

    def allows(self, more: int) -> bool:
        """Whether so many positions can be promised on top; what is kept beside rows makes room."""
        if self.limit is None:
            return True
        over = self.reserved + more - self.limit
        if 0 < over <= self.kept:
            self.evict(over)
        return self.reserved + more <= self.limit

    def grant(self, lane: Lane, wanted: tuple[int, int], least: tuple[int, int]) -> tuple[int, int]:
        """Places and slots that a lane may have: what it wants where that fits, else no less than `least`."""
        if self.limit is None:
            return wanted
        for trim in (False, True):
            if trim:
                for cache in self.caches:
                    cache.trim(but=lane)
            room = self.limit - (self.allocated - lane.places * lane.capacity)
            for places, slots in (wanted, (least[0], wanted[1]), least):
                if places * slots <= room:
                    return places, slots
        raise AssertionError("more was promised than the budget holds")


class Filling:
    """Keys and values of a packed pass, row by row."""

    def __init__(self, prefixes: Sequence[int]) -> None:
        self.rows = [Kept(0, prefix) for prefix in prefixes]

    def fill(
        self, module: nn.Module, k_1GNK: Tensor, v_1GNK: Tensor, lengths: Sequence[int], prefixes: Sequence[Prefix]
    ) -> None:
        start = 0
        for row, length, prefix in zip(self.rows, lengths, prefixes, strict=True):
            span = slice(start, start + length)
            k_GTK, v_GTK = k_1GNK[0, :, span], v_1GNK[0, :, span]
            if prefix is not None:
                k_PGK, v_PGK = prefix
                k_GTK = torch.cat([k_PGK.transpose(0, 1).to(k_GTK.dtype), k_GTK], dim=1)
                v_GTK = torch.cat([v_PGK.transpose(0, 1).to(v_GTK.dtype), v_GTK], dim=1)
            row.layers[module] = k_GTK, v_GTK
            row.total = row.prefix + length
            start += length


class KVCache:
    """Rows with places, in lanes; what `hub.cache` is while a pass runs.

    Attributes: `filling` collects a packed pass; `lanes` are known by the size of their rows.
    """

    def __init__(self, device: torch.device, budget: Budget | None = None) -> None:
        self.device = device
        self.budget = budget or Budget()
        self.budget.caches.append(self)
        self.lanes: dict[int, Lane] = {}
        self.filling: Filling | None = None
        self._claims: dict[int, list[int]] = {}
        self._order: list[Place | None] = []
        self._maps: list[tuple[Lane, Tensor | None]] | None = None
        self._places: Tensor | None = None

    # -- promises --------------------------------------------------------------------------------------------------

    @property
    def reserved(self) -> int:
        return sum(self._promised(size) for size in self.lanes.keys() | self._claims.keys())

    def _promised(self, size: int, *more: int) -> int:
        needs = [*self._needs(size), *self._claims.get(size, ()), *more]
        return len(needs) * max(needs, default=0)

    def _needs(self, size: int) -> list[int]:
        return [row.need for row in self.lanes[size].rows] if size in self.lanes else []

    def claim(self, need: int, rows: int = 1) -> bool:
        """Promise rows of so many positions, where the budget allows."""
        size = _size(need)
        more = self._promised(size, *[need] * rows) - self._promised(size)
        if not self.budget.allows(more):
            return False
        self._claims.setdefault(size, []).extend([need] * rows)
        return True

    def release(self, need: int) -> None:
        """Take back a promise that was not used."""
        self._claims[_size(need)].remove(need)

    # -- rows ------------------------------------------------------------------------------------------------------

    def put(self, rows: Sequence[tuple[Kept, int]]) -> list[Place]:
        """New rows with the most positions that each will have, which were promised. Returns their places."""
        for size in dict.fromkeys(_size(need) for _, need in rows):
            own = [(kept, need) for kept, need in rows if _size(need) == size]
            self._make_room(size, max(kept.total for kept, _ in own), len(own))
        places = []
        for kept, need in rows:
            self.release(need)
            places.append(self.lanes[_size(need)].put(kept, need))
        self._maps = None
        return places

    def _make_room(self, size: int, total: int, more: int) -> None:
        lane = self.lanes.setdefault(size, Lane(self.device))
        count, slot = len(lane.rows) + more, max(lane.slot if lane.rows else 0, total - 1)
        if count <= lane.places and slot < lane.capacity:
            lane.arrange(lane.places, lane.capacity, slot)
            return
        span = max(lane.span, total)
        most = max([*self._needs(size), *self._claims.get(size, ())])
        wanted = min(most + most // 4, max(lane.capacity, span + GROWTH))
        # one row more at a time would copy all of them each time
        places = count if not lane.places else max(count, lane.places, min(2 * lane.places, count + 8))
        places, capacity = self.budget.grant(lane, (places, wanted), (count, most))
        lane.arrange(places, capacity, span - 1)

    def restart(self, place: Place, total: int) -> None:
        """A row goes on behind its first `total` positions: another draw of the same prompt."""
        place.lane.restart(place, total)

    def drop(self, place: Place) -> None:
        """Forget a row."""
        place.lane.drop(place)
        self._order = [None if other is place else other for other in self._order]
        self._maps = None

    def close(self) -> None:
        """Give everything back."""
        self.budget.caches.remove(self)
        self.lanes.clear()

    def trim(self, *, but: Lane) -> None:
        """Give back what was not promised to rows."""
        for lane in self.lanes.values():
            if lane is but:
                continue
            if not lane.rows:
                lane.empty()
                continue
            most = max(row.need for row in lane.rows)
            if len(lane.rows) < lane.places or most < lane.capacity:
                lane.arrange(len(lane.rows), min(lane.capacity, most), lane.span - 1)

    # -- passes ----------------------------------------------------------------------------------------------------

    def order(self, places: Sequence[Place | None]) -> None:
        """Who the rows of the steps to come are; a row without a place is computed by nobody."""
        self._order = list(places)
        self._maps = None

    def advance(self) -> None:
        """Every row goes on to its next position."""
        for lane in self.lanes.values():
            if not lane.rows:
                continue
            if lane.slot + 1 >= lane.capacity:
                self._prolong(lane)
            lane.advance()

    def _prolong(self, lane: Lane) -> None:
        span, most = lane.span, max(row.need for row in lane.rows)
        wanted = min(most + most // 4, 2 * lane.capacity)
        places, capacity = lane.places, lane.capacity
        # to move all rows to the front costs a copy, so it must not happen every few steps
        if capacity - span < max(1, min(GROWTH, span // 4)) and wanted > capacity:
            places, capacity = self.budget.grant(lane, (places, wanted), (len(lane.rows), most))
        lane.arrange(places, capacity, span - 1)

    def positions(self) -> Tensor:
        """The position [rows, 1] of the token that the present step feeds."""
        positions_R = torch.zeros(len(self._order), dtype=torch.long, device=self.device)
        for lane, index in self._lanes():
            if index is None:
                return lane.positions()[:, None]
            positions_R[index] = lane.positions()
        return positions_R[:, None]

    def steady(self) -> Lane | None:
        """The lane that holds the step's rows in their order, where its steps are the same operations; None else."""
        lanes = self._lanes()
        lane = lanes[0][0] if len(lanes) == 1 and lanes[0][1] is None else None
        return lane if lane is not None and lane.steady else None

    def alone(self) -> tuple[Lane, Tensor] | None:
        """The lane that holds all of the step's rows, and the place of each row in it, below zero for a row without
        one; None where there are several lanes.
        """
        lanes = self._lanes()
        if len(lanes) != 1:
            return None
        if self._places is None:
            self._places = torch.tensor([-1 if place is None else place.index for place in self._order])
        return lanes[0][0], self._places

    def _lanes(self) -> list[tuple[Lane, Tensor | None]]:
        """Lanes with the step's rows that are in them, in the order of the lane; None where those are all, in order."""
        if self._maps is None:
            self._maps, self._places = [], None
            for lane in self.lanes.values():
                found: list[int] = [-1] * len(lane.rows)
                for row, place in enumerate(self._order):
                    if place is not None and place.lane is lane:
                        found[place.index] = row
                if not found:
                    continue
                assert -1 not in found, "a row of the cache is not in this step"
                whole = found == list(range(len(self._order)))
                self._maps.append((lane, None if whole else torch.tensor(found, device=self.device)))
        return self._maps

    def fill(
        self, module: nn.Module, k_1GNK: Tensor, v_1GNK: Tensor, lengths: Sequence[int], prefixes: Sequence[Prefix]
    ) -> None:
        """Keep the keys and values of a packed pass, each row behind its prefix."""
        assert self.filling is not None
        self.filling.fill(module, k_1GNK, v_1GNK, lengths, prefixes)

    def attend(self, module: nn.Module, q_RHTK: Tensor, k_RGTK: Tensor, v_RGTK: Tensor, **settings: Any) -> Tensor:
        """Attention of the newest tokens of each row over all that the row has kept. Returns [R, T, H, K]."""
        lanes = self._lanes()
        if len(lanes) == 1 and lanes[0][1] is None:
            return lanes[0][0].attend(module, q_RHTK, k_RGTK, v_RGTK, **settings)
        y_RTHK: Tensor | None = None
        for lane, index in lanes:
            own = (q_RHTK[index], k_RGTK[index], v_RGTK[index])
            y = lane.attend(module, *own, **settings)
            if y_RTHK is None:
                y_RTHK = y.new_zeros(q_RHTK.shape[0], *y.shape[1:])
            y_RTHK[index] = y
        assert y_RTHK is not None
        return y_RTHK


def _size(need: int) -> int:
    """Which rows share a lane: 0 for short ones, else the power of four."""
    return 0 if need <= SHORT else ((need - 1) // SHORT).bit_length() + 1 >> 1
