"""Which adapters act on which rows of the present batch.

In: one stack of adapters for each row, and how rows lie in the token axis. Out: segments `[start, stop)` of a flattened
leading axis. Refuses to know sites, updates and modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.core.errors import RouteError

Stack = tuple[Adapter, ...]
"""The adapters of one row, innermost first. Empty for a base row."""
Numbers = tuple[int, ...]
"""Of one row: for each adapter of its stack, how many rows of that adapter come before it."""


def numbered(stacks: Iterable[Stack]) -> list[Numbers]:
    """The numbers of rows: an adapter counts its own rows, so that they do not depend on who shares the batch."""
    seen: dict[Adapter, int] = {}
    found = []
    for stack in stacks:
        found.append(tuple(seen.get(adapter, 0) for adapter in stack))
        for adapter in stack:
            seen[adapter] = seen.get(adapter, 0) + 1
    return found


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive positions of the flattened leading axis that share a stack; `rows`: length and numbers of each."""

    start: int
    stop: int
    stack: Stack
    rows: tuple[tuple[int, Numbers], ...]


class Route:
    """The routing of one batch.

    Args:
        stacks: one per row, or a single one that serves a batch of any size when `uniform`.
        lengths: tokens of each row when rows are packed end to end into one sequence; None for `[rows, ...]` tensors.
        uniform: the single stack serves every row.
        counts: while training, the number of the present call of each adapter; dropout masks are a function of it.
        numbers: of each row, where the batch is a part of what one call computes; else they are counted here.
    """

    def __init__(
        self,
        stacks: Sequence[Stack],
        *,
        lengths: Sequence[int] | None = None,
        uniform: bool = False,
        counts: Mapping[Adapter, int] | None = None,
        numbers: Sequence[Numbers] | None = None,
    ) -> None:
        if lengths is not None and len(lengths) != len(stacks):
            raise RouteError(f"The batch has {len(lengths)} packed rows and {len(stacks)} rows are routed.")
        self.stacks: tuple[Stack, ...] = tuple(stacks)
        self.lengths = None if lengths is None else tuple(lengths)
        self.uniform = uniform
        self.counts = counts
        self.numbers = tuple(numbered(stacks) if numbers is None else numbers)
        self._adapters = list(dict.fromkeys(adapter for stack in self.stacks for adapter in stack))
        self._segments: dict[int, list[Segment]] = {}
        self._touched: dict[str, bool] = {}

    def begin(self, training: bool) -> Route:
        """The route of one forward pass. In training, every adapter present that is not held counts it, unless the call
        is counted.
        """
        if self.counts is not None:
            return self
        counts: dict[Adapter, int] = {}
        for adapter in self._adapters if training else []:
            if not adapter.held:
                adapter.forwards += 1
                counts[adapter] = adapter.forwards
        return self.with_lengths(self.lengths, counts)

    def with_lengths(self, lengths: Sequence[int] | None, counts: Mapping[Adapter, int] | None = None) -> Route:
        """The same rows in other lengths."""
        counts = self.counts if counts is None else counts
        return Route(self.stacks, lengths=lengths, uniform=self.uniform, counts=counts, numbers=self.numbers)

    def adapters(self) -> list[Adapter]:
        """Every adapter present, once, in order of first appearance."""
        return self._adapters

    def touches(self, site: str) -> bool:
        """Whether some adapter present acts at a site."""
        if site not in self._touched:
            self._touched[site] = any(site in adapter.layout.sites for adapter in self._adapters)
        return self._touched[site]

    def stacks_for(self, rows: int) -> tuple[Stack, ...]:
        """One stack for each of `rows` rows. Raises RouteError when the batch has another number of rows."""
        if self.uniform:
            return self.stacks * rows
        if rows != len(self.stacks):
            raise RouteError(
                f"The batch has {rows} rows and {len(self.stacks)} rows are routed; "
                "name one adapter (or None) for each row."
            )
        return self.stacks

    def row_segments(self, rows: int) -> list[Segment]:
        """One segment for each of `rows` rows, for sites that see whole rows."""
        stacks = self.stacks_for(rows)
        numbers = numbered(stacks) if self.uniform else self.numbers
        return [Segment(i, i + 1, stack, ((1, numbers[i]),)) for i, stack in enumerate(stacks)]

    def segments(self, leading: int) -> list[Segment]:
        """Segments of a leading axis of `leading` positions, neighbours of equal stack joined."""
        if leading not in self._segments:
            self._segments[leading] = _join(self._spans(leading))
        return self._segments[leading]

    def _spans(self, leading: int) -> list[Segment]:
        if self.uniform:
            return [Segment(0, leading, self.stacks[0], ((leading, self.numbers[0]),))]
        rows = len(self.stacks)
        if self.lengths is not None:
            times, rest = divmod(leading, sum(self.lengths))
            if rest or not times:
                raise RouteError(
                    f"A site saw {leading} positions where the packed rows hold {sum(self.lengths)} tokens."
                )
            lengths: Sequence[int] = [times * length for length in self.lengths]  # norms over heads see every head
        else:
            if leading % rows:
                raise RouteError(f"A site saw {leading} positions, which {rows} routed rows do not divide.")
            lengths = [leading // rows] * rows
        spans, start = [], 0
        for length, stack, numbers in zip(lengths, self.stacks, self.numbers, strict=True):
            spans.append(Segment(start, start + length, stack, ((length, numbers),)))
            start += length
        return spans


def _join(spans: Iterable[Segment]) -> list[Segment]:
    joined: list[Segment] = []
    for span in spans:
        if span.start == span.stop:
            continue
        if joined and joined[-1].stack == span.stack:
            joined[-1] = Segment(joined[-1].start, span.stop, span.stack, joined[-1].rows + span.rows)
        else:
            joined.append(span)
    return joined


def subset(segments: Sequence[Segment], index_N: Tensor) -> list[Segment]:
    """The segments of `x[index]` for an ascending index (the tokens that reach one expert)."""
    rows = [(segment.stack, length, numbers) for segment in segments for length, numbers in segment.rows]
    edges = torch.tensor([length for _, length, _ in rows], device=index_N.device).cumsum(0)
    spans, start = [], 0
    for (stack, _, numbers), stop in zip(rows, torch.searchsorted(index_N, edges).tolist(), strict=True):
        spans.append(Segment(start, stop, stack, ((stop - start, numbers),)))
        start = stop
    return _join(spans)
