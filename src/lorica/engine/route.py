"""Which adapters act on which rows of the present batch.

In: one stack of adapters for each row, and how rows lie in the token axis. Out: segments `[start, stop)` of a flattened
leading axis. Refuses to know sites, updates and modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.core.errors import RouteError

Stack = tuple[Adapter, ...]
"""The adapters of one row, innermost first. Empty for a base row."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive positions of the flattened leading axis that share a stack."""

    start: int
    stop: int
    stack: Stack


class Route:
    """The routing of one batch.

    Args:
        stacks: one per row, or a single one that serves a batch of any size when `uniform`.
        lengths: tokens of each row when rows are packed end to end into one sequence; None for `[rows, ...]` tensors.
        uniform: the single stack serves every row.
        counts: while training, the forward count of each adapter, of which its dropout masks are a function.
    """

    def __init__(
        self,
        stacks: Sequence[Stack],
        *,
        lengths: Sequence[int] | None = None,
        uniform: bool = False,
        counts: Mapping[Adapter, int] | None = None,
    ) -> None:
        if lengths is not None and len(lengths) != len(stacks):
            raise RouteError(f"The batch has {len(lengths)} packed rows and {len(stacks)} rows are routed.")
        self.stacks: tuple[Stack, ...] = tuple(stacks)
        self.lengths = None if lengths is None else tuple(lengths)
        self.uniform = uniform
        self.counts: Mapping[Adapter, int] = counts or {}
        self._segments: dict[int, list[Segment]] = {}

    def begin(self, training: bool) -> Route:
        """The route of one forward pass. In training, every adapter present counts it."""
        counts: dict[Adapter, int] = {}
        for adapter in self.adapters() if training else []:
            adapter.forwards += 1
            counts[adapter] = adapter.forwards
        return Route(self.stacks, lengths=self.lengths, uniform=self.uniform, counts=counts)

    def adapters(self) -> list[Adapter]:
        """Every adapter present, once, in order of first appearance."""
        return list(dict.fromkeys(adapter for stack in self.stacks for adapter in stack))

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

    def segments(self, leading: int) -> list[Segment]:
        """Segments of a leading axis of `leading` positions, neighbours of equal stack joined."""
        if leading not in self._segments:
            self._segments[leading] = _join(self._spans(leading))
        return self._segments[leading]

    def _spans(self, leading: int) -> list[Segment]:
        if self.uniform:
            return [Segment(0, leading, self.stacks[0])]
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
        for length, stack in zip(lengths, self.stacks, strict=True):
            spans.append(Segment(start, start + length, stack))
            start += length
        return spans


def _join(spans: list[Segment]) -> list[Segment]:
    joined: list[Segment] = []
    for span in spans:
        if span.start == span.stop:
            continue
        if joined and joined[-1].stack == span.stack:
            joined[-1] = Segment(joined[-1].start, span.stop, span.stack)
        else:
            joined.append(span)
    return joined


def subset(segments: list[Segment], index_N: Tensor) -> list[Segment]:
    """The segments of `x[index]` for an ascending index (the tokens that reach one expert)."""
    edges = torch.tensor([segment.stop for segment in segments], device=index_N.device)
    stops = torch.searchsorted(index_N, edges).tolist()
    spans, start = [], 0
    for segment, stop in zip(segments, stops, strict=True):
        spans.append(Segment(start, stop, segment.stack))
        start = stop
    return _join(spans)
