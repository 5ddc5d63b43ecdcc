"""Where each tensor of an adapter lives in one flat buffer.

In: the adapted sites with their methods. Out: offsets, so that an adapter is two flat rows (values and gradients) whose
register, copy, zero, save and optimise are single calls. Parameters of one (group, decay) are contiguous: one optimiser
tensor each. Adapters of equal method and sites share one layout. Refuses to know values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lorica.core.site import Site
from lorica.core.update import ParamSpec
from lorica.methods.base import Method

GLOBAL = ""
"""The site name under which tensors owned once per adapter are kept."""


@dataclass(frozen=True, slots=True)
class Place:
    """A trained tensor's offset in the flat row, in elements."""

    offset: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Group:
    """A contiguous run of the flat row that one optimiser tensor covers."""

    name: str
    decay: bool
    start: int
    stop: int


class Layout:
    """Offsets of every trained tensor and shapes of every frozen one.

    Attributes: `sites` and `methods` by site name, in backbone order; `places[site][param]`; `frozen[site][param]`;
    `changing`, the (site, param) of those frozen ones that step hooks write; `groups`; `size` in elements. Global
    tensors stand under the site name `GLOBAL`.
    """

    def __init__(self, method: Method, picked: Mapping[str, tuple[Site, Method]]) -> None:
        self.method = method
        self.sites: dict[str, Site] = {name: site for name, (site, _) in picked.items()}
        self.methods: dict[str, Method] = {name: resolved for name, (_, resolved) in picked.items()}
        specs: dict[str, dict[str, ParamSpec]] = {GLOBAL: method.global_params(self.own_sites())}
        specs |= {name: resolved.params(site) for name, (site, resolved) in picked.items()}
        self.specs = {name: owned for name, owned in specs.items() if owned}
        self.frozen: dict[str, dict[str, tuple[int, ...]]] = {}
        self.places: dict[str, dict[str, Place]] = {}
        self.groups: list[Group] = []
        self.changing: list[tuple[str, str]] = []
        self.size = self._lay_out()
        self.key = (method, tuple((name, self.methods[name]) for name in self.sites), tuple(self.sites.values()))

    def _lay_out(self) -> int:
        buckets: dict[tuple[str, bool], list[tuple[str, str, ParamSpec]]] = {}
        for site, owned in self.specs.items():
            for param, spec in owned.items():
                if spec.trainable:
                    buckets.setdefault((spec.group, spec.decay), []).append((site, param, spec))
                else:
                    self.frozen.setdefault(site, {})[param] = spec.shape
                    if spec.changes:
                        self.changing.append((site, param))
        offset = 0
        for (group, decay), members in buckets.items():
            start = offset
            for site, param, spec in members:
                self.places.setdefault(site, {})[param] = Place(offset, spec.shape)
                offset += math.prod(spec.shape)
            self.groups.append(Group(group, decay, start, offset))
        return offset

    def own_sites(self) -> list[Site]:
        """Sites of the adapter's own method, which its global tensors are for; a PEFT file may bring others."""
        return [site for name, site in self.sites.items() if type(self.methods[name]) is type(self.method)]

    def trainable_count(self) -> int:
        """Number of trained parameters."""
        return self.size

    def frozen_count(self) -> int:
        """Number of frozen extra parameters (projections, counter-terms)."""
        return sum(math.prod(shape) for owned in self.frozen.values() for shape in owned.values())
