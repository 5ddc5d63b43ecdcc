"""What fine-tuning gained on its task and lost on what the base knew, and how many directions it moved weights in.

In: a service with trained adapters, examples of the target and of the source. Out: a row for each adapter. Refuses to
know files, terminals and how the adapters were trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorica.adapters.adapter import Adapter
from lorica.adapters.analysis.spectrum import Components, components_of
from lorica.client.local import Service
from lorica.core.errors import DataError
from lorica.data.example import Example


@dataclass(frozen=True, slots=True)
class Forgetting:
    """One adapter: mean losses a trained token before (the base's) and after, and the rank of its change.

    `components` are those that hold the share of the variance, site by site; empty where it changes no matrix.
    """

    adapter: str
    method: str
    parameters: int
    target_before: float
    target_after: float
    source_before: float
    source_after: float
    components: tuple[Components, ...]

    @property
    def gained(self) -> float:
        """By how much the target's loss fell."""
        return self.target_before - self.target_after

    @property
    def forgotten(self) -> float:
        """By how much the source's loss rose."""
        return self.source_after - self.source_before

    def by_role(self) -> dict[str, tuple[float, int]]:
        """Role of a site → (mean components, the most that one could have)."""
        return _grouped(self.components, lambda site: site.role)

    def by_layer(self) -> dict[str, tuple[float, int]]:
        """Layer → (mean components, the most that one could have); sites outside blocks are under `-`."""
        return _grouped(self.components, lambda site: "-" if site.layer is None else str(site.layer))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {**asdict(self), "gained": self.gained, "forgotten": self.forgotten}


def measure_forgetting(
    service: Service,
    adapters: Sequence[Adapter],
    target: Sequence[Example],
    source: Sequence[Example],
    *,
    share: float = 0.9,
) -> list[Forgetting]:
    """Ask the base and each adapter for the loss of both sets, and count the components of each adapter's change.

    `source` stands for what the base was trained on. Compare methods at an equal gain, each with rates of its own: any
    method forgets more at a higher rate. Raises DataError where a set has no trained token, MethodError unless
    0 < share ≤ 1. Paper: arXiv 2405.09673.
    """
    before = [mean_loss(service, None, examples, name) for name, examples in (("target", target), ("source", source))]
    return [
        Forgetting(
            adapter=adapter.name,
            method=adapter.method.name,
            parameters=adapter.layout.trainable_count(),
            target_before=before[0],
            target_after=mean_loss(service, adapter, target, "target"),
            source_before=before[1],
            source_after=mean_loss(service, adapter, source, "source"),
            components=components_of(adapter, service.host.backbone, share),
        )
        for adapter in adapters
    ]


def mean_loss(service: Service, adapter: Adapter | None, examples: Sequence[Example], name: str) -> float:
    """`Σ w · −log p / Σ |w|` over examples, without dropout. Raises DataError where nothing has a weight."""
    weight = sum(sum(map(abs, example.weights)) for example in examples)
    if not weight:
        raise DataError(f"No token of the {name} has a loss weight, so it has no loss.")
    results = service.sampling_client(adapter).logprobs(examples)
    return sum(result.loss for result in results) / weight


def _grouped(found: Sequence[Components], key: Any) -> dict[str, tuple[float, int]]:
    groups: dict[str, list[Components]] = {}
    for site in found:
        groups.setdefault(key(site), []).append(site)
    return {
        name: (sum(site.count for site in sites) / len(sites), max(site.most for site in sites))
        for name, sites in groups.items()
    }
