"""A run before it starts: what the data is, what would be trained, and how much memory that takes.

In: a loaded plan. Out: `Summary`, as text and as plain values. Nothing is written and no weight changes.
Refuses to know terminals.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from lorica.adapters.adapter import Adapter
from lorica.adapters.layout import GLOBAL
from lorica.data.show import Explanation, describe
from lorica.models.backbone import Backbone
from lorica.recipes.config import to_yaml
from lorica.recipes.memory import MemoryEstimate, estimate
from lorica.recipes.sft import Plan


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Adapted sites of one role and shape. `parameters` are those trained at all of them."""

    role: str
    kind: str
    shape: tuple[int, ...]
    count: int
    parameters: int


@dataclass(frozen=True, slots=True)
class Trained:
    """What an adapter trains: sites by role, parameters, and their share of the base's."""

    method: str
    settings: dict[str, Any]
    groups: tuple[SiteGroup, ...]
    sites: int
    parameters: int
    frozen: int
    base_parameters: int

    @property
    def share(self) -> float:
        """Trained parameters over the base's."""
        return self.parameters / self.base_parameters

    @property
    def oversized(self) -> tuple[str, ...]:
        """One sentence for each group of sites that trains more values than its weights have: r > oi / (o + i)."""
        return tuple(
            f"At {group.role} the method trains {group.parameters // group.count:,} values for a weight of "
            f"{math.prod(group.shape):,}: a lower rank or `delta` would be smaller."
            for group in self.groups
            if group.shape and group.parameters > group.count * math.prod(group.shape)
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything that `lorica train --dry-run` prints."""

    config: dict[str, Any]
    resolved: str
    data: Explanation
    trained: Trained
    steps: int
    memory: MemoryEstimate | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {
            "config": self.config,
            "data": self.data.to_dict(),
            "trained": {**asdict(self.trained), "share": self.trained.share, "oversized": self.trained.oversized},
            "steps": self.steps,
            "memory": None if self.memory is None else asdict(self.memory),
        }


def what_is_trained(adapter: Adapter, backbone: Backbone) -> Trained:
    """Sites, parameters and share of an adapter over its backbone."""
    layout = adapter.layout
    groups: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for name, site in layout.sites.items():
        owned = layout.specs.get(name, {})
        count = sum(math.prod(spec.shape) for spec in owned.values() if spec.trainable)
        groups.setdefault((site.role, site.kind, site.shape), []).append(count)
    found = [SiteGroup(*key, len(counts), sum(counts)) for key, counts in groups.items()]
    shared = sum(math.prod(spec.shape) for spec in layout.specs.get(GLOBAL, {}).values() if spec.trainable)
    if shared:
        found.append(SiteGroup("(shared by all)", "-", (), 1, shared))
    return Trained(
        method=adapter.method.name,
        settings=adapter.method.model_dump(mode="json"),
        groups=tuple(found),
        sites=len(layout.sites),
        parameters=layout.trainable_count(),
        frozen=layout.frozen_count(),
        base_parameters=backbone.parameter_count(),
    )


def summarise(ready: Plan, *, memory: bool = True, colour: bool = False) -> Summary:
    """The summary of a plan; with `memory`, the largest micro-batch is rehearsed."""
    config = ready.config
    return Summary(
        config=config.model_dump(mode="json"),
        resolved=to_yaml(config),
        data=describe(ready.dataset, ready.renderer, ready.prepared, colour=colour),
        trained=what_is_trained(ready.client.adapter, ready.backbone),
        steps=ready.steps,
        memory=estimate(ready.client, ready.prepared.examples, config.batch_size) if memory else None,
    )
