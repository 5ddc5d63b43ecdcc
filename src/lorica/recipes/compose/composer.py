"""Adapters of any weights, under one name in a host, so that a search can ask for one after the other.

In: parents over one backbone, a rule of merging. Out: for weights, an adapter that acts as the rule's result. The base
is never loaded again. Refuses to know losses and searches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from lorica.adapters.adapter import Adapter
from lorica.adapters.lineage import Parent
from lorica.adapters.merging.base import Merging
from lorica.adapters.merging.combine import combine
from lorica.adapters.merging.lorahub import LoraHub
from lorica.core.errors import RouteError
from lorica.engine.host import Host


class Composer:
    """Computes the rule anew for each weights. What `at` gave acts until the next call."""

    def __init__(
        self, host: Host, parents: Sequence[Adapter], rule: Merging, name: str, origins: Sequence[Parent]
    ) -> None:
        self.host, self.parents, self.rule, self.name = host, parents, rule, name
        self.origins = origins  # told once: asking for them reads the parents' folders

    def combined(self, weights: Sequence[float]) -> Adapter:
        """The rule's own result, float64 rounded once; it is not resident."""
        made, _ = combine(self.parents, self.host.backbone, self.rule, weights, name=self.name, origins=self.origins)
        return made

    def at(self, weights: Sequence[float]) -> Adapter:
        """The adapter of these weights, resident."""
        self.close()
        return self.host.put(self.combined(weights))

    def close(self) -> None:
        """Delete what is resident."""
        if self.name in self.host.adapters:
            self.host.delete(self.name)


class InPlace(Composer):
    """A rule whose result's values are linear in the weights: one resident adapter, written over in place.

    `rows_NP` are the values at weight one of each parent and zero of the others; those at w are `Σ w_n rows_n`. Memory:
    the values of a parent N + 1 times.
    """

    def __init__(
        self, host: Host, parents: Sequence[Adapter], rule: Merging, name: str, origins: Sequence[Parent]
    ) -> None:
        super().__init__(host, parents, rule, name, origins)
        count = len(parents)
        made = [self.combined([float(n == own) for n in range(count)]) for own in range(count)]
        self.rows_NP = torch.stack([adapter.flat for adapter in made])
        self.adapter = host.put(made[0])

    def at(self, weights: Sequence[float]) -> Adapter:
        w_N = torch.tensor(list(weights), dtype=self.rows_NP.dtype, device=self.rows_NP.device)
        torch.mv(self.rows_NP.T, w_N, out=self.adapter.flat)
        return self.adapter


@contextmanager
def composer(
    host: Host, parents: Sequence[Adapter], rule: Merging, name: str, origins: Sequence[Parent]
) -> Iterator[Composer]:
    """The composer that fits a rule; what it made resident is deleted at the end. `origins` are the parents' records.

    Raises RouteError for a name that is taken, and what `combine` raises where the rule cannot combine the parents.
    """
    if name in host.adapters:
        raise RouteError(f"There is an adapter {name!r} already; delete it or choose another name.")
    made = (InPlace if isinstance(rule, LoraHub) else Composer)(host, parents, rule, name, origins)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def resident(host: Host, adapters: Sequence[Adapter]) -> Iterator[None]:
    """Inside, all of these are resident; those that were not are deleted at the end."""
    put: list[str] = []
    try:
        for adapter in adapters:
            if host.adapters.get(adapter.name) is not adapter:
                put.append(host.put(adapter).name)
        yield
    finally:
        for name in put:
            host.delete(name)
