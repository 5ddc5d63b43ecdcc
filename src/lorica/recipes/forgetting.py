"""What fine-tuning gained on tasks and lost on what the base knew, and how many directions it moved weights in.

In: a service with adapters, named sets of examples. Out: a row for each adapter with its loss on every set, before and
after. Refuses to know files, terminals and how the adapters were trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorica.adapters.adapter import Adapter
from lorica.adapters.analysis.spectrum import Components, components_of
from lorica.client.local import Service
from lorica.core.errors import DataError
from lorica.data.example import Example
from lorica.engine.host import RowSpec

Sets = Mapping[str, Sequence[Example]]
"""Sets of examples by name."""


@dataclass(frozen=True, slots=True)
class TaskLoss:
    """Mean loss a trained token on one set: the base's (`before`) and the adapter's (`after`)."""

    data: str
    before: float
    after: float

    @property
    def change(self) -> float:
        """By how much it rose; below zero it fell."""
        return self.after - self.before


@dataclass(frozen=True, slots=True)
class Forgetting:
    """One adapter: its loss on every target and source, and the rank of its change.

    `components` are those that hold the share of the variance, site by site; empty where it changes no matrix.
    """

    adapter: str
    method: str
    parameters: int
    targets: tuple[TaskLoss, ...]
    sources: tuple[TaskLoss, ...]
    components: tuple[Components, ...]

    @property
    def gained(self) -> float:
        """By how much the loss of the targets fell, the mean over them."""
        return -_mean([loss.change for loss in self.targets])

    @property
    def forgotten(self) -> float:
        """By how much the loss of the sources rose, the mean over them."""
        return _mean([loss.change for loss in self.sources])

    def by_role(self) -> dict[str, tuple[float, int]]:
        """Role of a site → (mean components, the most that one could have)."""
        return _grouped(self.components, lambda site: site.role)

    def by_layer(self) -> dict[str, tuple[float, int]]:
        """Layer → (mean components, the most that one could have); sites outside blocks are under `-`."""
        return _grouped(self.components, lambda site: "-" if site.layer is None else str(site.layer))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        found = {**asdict(self), "gained": self.gained, "forgotten": self.forgotten}
        for name in ("targets", "sources"):
            found[name] = [{**asdict(loss), "change": loss.change} for loss in getattr(self, name)]
        return found


def measure_forgetting(
    service: Service, adapters: Sequence[Adapter], targets: Sets, sources: Sets, *, share: float = 0.9
) -> list[Forgetting]:
    """Ask the base and each adapter for its loss on every set, and count the components of each adapter's change.

    Targets are tasks that were trained (each adapter on its own, perhaps); sources stand for what the base was trained
    on. Compare methods at an equal gain, each with rates of its own: any method forgets more at a higher rate. Raises
    DataError where there is no target or no source, or a set has no trained token; MethodError unless 0 < share ≤ 1.
    Paper: arXiv 2405.09673.
    """
    for sets, word in ((targets, "target"), (sources, "source")):
        if not sets:
            raise DataError(f"There is no {word}; gain and forgetting need at least one set of each kind.")
    before = [task_losses(service, None, sets) for sets in (targets, sources)]
    found = []
    for adapter in adapters:
        pairs = zip((targets, sources), before, strict=True)
        after = [_against(task_losses(service, adapter, sets), base) for sets, base in pairs]
        found.append(
            Forgetting(
                adapter=adapter.name,
                method=adapter.method.name,
                parameters=adapter.layout.trainable_count(),
                targets=after[0],
                sources=after[1],
                components=components_of(adapter, service.host.backbone, share),
            )
        )
    return found


def task_losses(service: Service, adapter: RowSpec, sets: Sets) -> dict[str, float]:
    """The mean loss of the base (None), an adapter or a stack on every set. Raises DataError as `mean_loss`."""
    return {name: mean_loss(service, adapter, examples, name) for name, examples in sets.items()}


def mean_loss(service: Service, adapter: RowSpec, examples: Sequence[Example], name: str) -> float:
    """`Σ w · −log p / Σ |w|` over examples under an adapter, a stack or the base (None), without dropout. Raises
    DataError where nothing has a weight.
    """
    weight = sum(sum(map(abs, example.weights)) for example in examples)
    if not weight:
        raise DataError(f"No token of the {name} has a loss weight, so it has no loss.")
    results = service.sampling_client(adapter).logprobs(examples)
    return sum(result.loss for result in results) / weight


def _against(after: Mapping[str, float], before: Mapping[str, float]) -> tuple[TaskLoss, ...]:
    return tuple(TaskLoss(name, before[name], loss) for name, loss in after.items())


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _grouped(found: Sequence[Components], key: Any) -> dict[str, tuple[float, int]]:
    groups: dict[str, list[Components]] = {}
    for site in found:
        groups.setdefault(key(site), []).append(site)
    return {
        name: (sum(site.count for site in sites) / len(sites), max(site.most for site in sites))
        for name, sites in groups.items()
    }
