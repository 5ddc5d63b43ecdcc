"""The state that site forwards share: the present route, and the lowering of each adapter present at a site.

In: a route. Out: for a site and a number of positions, the parts of the batch with their updates.
Refuses to know modules' forwards and how updates are applied.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lorica.adapters.adapter import Adapter
from lorica.core.errors import RouteError
from lorica.core.site import Site
from lorica.core.update import LinearUpdate, Update
from lorica.engine.equation import Dropout, Mask
from lorica.engine.native.kernels import Kernels
from lorica.engine.native.passes import Passes
from lorica.engine.native.proved import kernels_for, passes_for, walks_here
from lorica.engine.native.walk import Walks
from lorica.engine.replay import GRAPHS
from lorica.engine.route import Route, Segment
from lorica.models.backbone import Backbone


@dataclass(frozen=True, slots=True)
class Work:
    """One segment of the batch at one site: positions `[start, stop)` and its updates, innermost first."""

    start: int
    stop: int
    updates: tuple[Update, ...]
    dropouts: tuple[Dropout | None, ...]

    def linear(self, level: int) -> LinearUpdate:
        update = self.updates[level]
        assert isinstance(update, LinearUpdate)
        return update

    def meets(self, start: int, stop: int) -> bool:
        return self.start < stop and start < self.stop

    def clipped(self, start: int, stop: int) -> Work:
        """This work on positions `[start, stop)` alone, counted from `start`; its masks are the same there."""
        first = max(self.start, start)
        skipped = first - self.start
        last = min(self.stop, stop)
        drops = tuple(None if d is None else d.cut(skipped, last - self.start) for d in self.dropouts)
        return Work(first - start, last - start, self.updates, drops)


class Executor:
    """Shared by every adapted site of one backbone.

    Attributes: `route` is the routing of the present forward pass, None while adapters are disabled; `compute` is the
    dtype of the adapters' arithmetic, None for that of the activations; `graphs` says whether passes may be replayed
    where the device has graphs, `native` whether kernels in C may be used on a CPU; `recomputing` is true inside a
    checkpoint's second pass; `window` is the span of packed positions that sites see, None for all of them; `memo`
    keeps lowered updates while no adapter can change (a generation), None otherwise; `muted` are adapters with sites at
    which they do not act.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.route: Route | None = None
        self.compute: torch.dtype | None = None
        self.graphs = True
        self.native = True
        self.recomputing = False
        self.window: tuple[int, int] | None = None
        self.memo: dict[tuple[str, Adapter], Update] | None = None
        self.muted: frozenset[tuple[Adapter, str]] = frozenset()

    def kernels(self, dtype: torch.dtype) -> Kernels | None:
        """Kernels in C for the steps of a backbone on a CPU; None where there are none, or they are switched off."""
        device = self.backbone.device.type  # what is recorded must be torch's own operations
        return kernels_for(dtype) if self.native and device == "cpu" and device not in GRAPHS else None

    def passes(self, dtype: torch.dtype) -> Passes | None:
        """Kernels in C for training passes, likewise."""
        return None if self.kernels(dtype) is None else passes_for(dtype)

    def walks(self, dtype: torch.dtype) -> Walks | None:
        """Kernels in C for whole steps, likewise."""
        return walks_here() if dtype == torch.float32 and self.kernels(dtype) is not None else None

    def acts(self, adapter: Adapter, site: str) -> bool:
        """Whether an adapter acts at a site."""
        return site in adapter.layout.sites and (adapter, site) not in self.muted

    def work(self, site: Site, leading: int) -> list[Work]:
        """What to do at a site whose flattened leading axis has `leading` positions; empty where only the base acts."""
        route = self.live_route()
        if route is None or not route.touches(site.name):
            return []
        if self.window is None:
            return self.lower(site, route.segments(leading), route)
        assert route.lengths is not None
        return [
            w.clipped(*self.window)
            for w in self.lower(site, route.segments(sum(route.lengths)), route)
            if w.meets(*self.window)
        ]

    @contextmanager
    def replay(self, route: Route | None, window: tuple[int, int] | None = None) -> Iterator[None]:
        """Inside, sites act under this route, in a backward pass too; with `window`, on those packed positions
        alone.
        """
        before = self.route, self.window, self.recomputing
        self.route, self.window, self.recomputing = route, window, True
        try:
            yield
        finally:
            self.route, self.window, self.recomputing = before

    def work_for_rows(self, site: Site, rows: int) -> list[Work]:
        """The same for a site that sees whole rows (attention, convolution, input): start and stop count rows."""
        route = self.live_route()
        if route is None or not route.touches(site.name):
            return []
        return self.lower(site, route.row_segments(rows), route)

    def rows(self) -> int | None:
        """How many rows the present batch routes one by one; None where a stack serves all, or rows are packed."""
        route = self.live_route()
        return None if route is None or route.uniform or route.lengths is not None else len(route.stacks)

    def check_rows(self, shape: torch.Size) -> None:
        """Raises RouteError for a tensor that does not begin with the batch: its positions are nobody's rows."""
        rows = self.rows()
        if rows is not None and len(shape) > 2 and shape[0] % rows:
            raise RouteError(
                f"A site saw a tensor of shape {tuple(shape)}, whose first axis does not hold the {rows} routed rows.",
                hint="Leave this site out of the targets, or let one adapter serve the whole batch.",
            )

    def live_route(self) -> Route | None:
        """The present route. Raises RouteError inside a backward pass that no checkpoint of ours announced."""
        if torch._C._current_graph_task_id() != -1 and not self.recomputing:
            raise RouteError(
                "Gradient checkpointing recomputes this forward pass without its route.",
                hint="Enable checkpointing with `host.checkpointing()`, which remembers the route of each pass.",
            )
        return self.route

    def lowered(self, adapter: Adapter, site: str) -> Update:
        """One adapter's update at a site; made once while `memo` is there to keep it."""
        if self.memo is None:
            return adapter.update(site, self.backbone.weight(site))
        key = (site, adapter)
        if key not in self.memo:
            self.memo[key] = adapter.update(site, self.backbone.weight(site))
        return self.memo[key]

    def lower(self, site: Site, segments: list[Segment], route: Route) -> list[Work]:
        """Lower each adapter present once, and give every segment its updates and dropout masks."""
        with self.backbone.weight(site.name).held():  # a quantised weight is dequantised once for all adapters
            return self._lower(site, segments, route)

    def _lower(self, site: Site, segments: list[Segment], route: Route) -> list[Work]:
        lowered: dict[Adapter, Update] = {}
        work = []
        for segment in segments:
            levels = [level for level, adapter in enumerate(segment.stack) if self.acts(adapter, site.name)]
            if not levels:
                continue
            updates, drops = [], []
            for level in levels:
                adapter = segment.stack[level]
                if adapter not in lowered:
                    lowered[adapter] = self.lowered(adapter, site.name)
                updates.append(lowered[adapter])
                drops.append(_dropout(lowered[adapter], site, segment, level, route))
            work.append(Work(segment.start, segment.stop, tuple(updates), tuple(drops)))
        return work


def _dropout(update: Update, site: Site, segment: Segment, level: int, route: Route) -> Dropout | None:
    """A mask that is a function of (adapter seed, its call, its row, site): no other tenant can move it."""
    adapter = segment.stack[level]
    count = None if route.counts is None else route.counts.get(adapter)
    if count is None or not isinstance(update, LinearUpdate) or update.dropout == 0.0:
        return None
    key = f"{adapter.seed}/{count}/{site.name}"
    rows = [Mask(zlib.crc32(f"{key}/{numbers[level]}".encode()), n, 0, n) for n, numbers in segment.rows]
    return Dropout(update.dropout, tuple(rows))
