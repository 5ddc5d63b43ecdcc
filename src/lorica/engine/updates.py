"""What adapters do at linear sites, lowered and folded once, as long as they do not change.

In: an executor, stacks of adapters. Out: a stack's update at a site, or at maps of one input as kernels read it.
Refuses to know rows, steps and prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from lorica.adapters.adapter import Adapter
from lorica.core.update import LinearUpdate, Update
from lorica.engine.executor import Executor
from lorica.engine.factors import NOTHING, Folded, fold
from lorica.engine.native.kernels import Kernels, RowMaps
from lorica.engine.route import Stack

IDLE = 8
"""Updates of so many adapters without rows are kept for the next ones at least."""
IDLE_BYTES = 2**26
"""Those of more adapters are, as long as all of them take no more memory than that."""


class Updates:
    """The updates of adapters that do not change while they have rows, lowered and folded once.

    Attributes: `memo` is what an executor's is while these rows are computed.
    """

    def __init__(self) -> None:
        self.memo: dict[tuple[str, Adapter], Update] = {}
        self._folds: dict[Stack, dict[tuple[str, torch.dtype], Folded | None]] = {}
        self._rows: dict[Stack, dict[object, RowMaps | None]] = {}
        self._stamps: dict[Adapter, tuple[int, int]] = {}
        self._bytes: dict[Adapter, int] = {}

    def use(self, adapters: Iterable[Adapter]) -> None:
        """These have rows now. Forgets what changed since, and who has had none for long."""
        for adapter in adapters:
            before, now = self._stamps.pop(adapter, None), stamp(adapter)
            self._stamps[adapter] = now  # the last in the order
            if before is not None and before != now:
                self._drop({adapter})

    def tidy(self, present: frozenset[Adapter]) -> None:
        """Forget all but these and the last others."""
        idle = [adapter for adapter in reversed(self._stamps) if adapter not in present]
        total, kept = 0, 0
        for adapter in idle:
            total += self._bytes.get(adapter, 0)
            if kept >= IDLE and total > IDLE_BYTES:
                break
            kept += 1
        self.forget(idle[kept:])

    def known(self) -> list[Adapter]:
        """Whose updates are kept."""
        return list(self._stamps)

    def forget(self, adapters: Iterable[Adapter]) -> None:
        gone = set(adapters)
        if gone:
            self._drop(gone)
            for adapter in gone:
                self._stamps.pop(adapter, None)
                self._bytes.pop(adapter, None)

    def _drop(self, gone: set[Adapter]) -> None:
        for key in [key for key in self.memo if key[1] in gone]:
            del self.memo[key]
        for kept in (self._folds, self._rows):
            for stack in [stack for stack in kept if not gone.isdisjoint(stack)]:
                del kept[stack]

    def folded(
        self, executor: Executor, site: str, stack: Stack, dtype: torch.dtype, kernels: Kernels | None
    ) -> Folded | None:
        """A stack's update at a site; None where it has no folded form."""
        acting = tuple(adapter for adapter in stack if executor.acts(adapter, site))
        own = self._folds.setdefault(acting, {})
        if (site, dtype) not in own:
            updates = [executor.lowered(adapter, site) for adapter in acting]
            linear = [u for u in updates if isinstance(u, LinearUpdate)]
            made = fold(linear, executor.backbone.bias(site), dtype, kernels) if linear else NOTHING
            own[site, dtype] = made
            for adapter in acting:
                self._bytes[adapter] = self._bytes.get(adapter, 0) + _bytes(made, updates)
        return own[site, dtype]

    def row(self, executor: Executor, sites: tuple[str, ...], stack: Stack, kernels: Kernels) -> RowMaps | None:
        """What a row of a stack has at maps of one input, for kernels of their dtype; None where that is more than
        factors.
        """
        own, key = self._rows.setdefault(stack, {}), (sites, executor.muted)
        if key not in own:
            folds = [self.folded(executor, site, stack, kernels.dtype, kernels) for site in sites]
            plain = all(f is not None and f.bare and (f.pair is not None or f.A_RI is None) for f in folds)
            own[key] = RowMaps([f.pair for f in folds if f is not None]) if plain else None
        return own[key]


def _bytes(folded: Folded | None, updates: Sequence[Update]) -> int:
    """Memory that is kept of a stack's update at a site; about, as an update may be views of its adapter."""
    if folded is None:
        return sum(
            u.delta.numel() * u.delta.element_size()
            for u in updates
            if isinstance(u, LinearUpdate) and u.delta is not None
        )
    parts = (folded.A_RI, folded.B_OR, folded.in_scale_I, folded.out_scale_O, folded.shift_O)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def stamp(adapter: Adapter) -> tuple[int, int]:
    """Another one where an adapter's values are others."""
    return id(adapter.flat), adapter.flat._version
