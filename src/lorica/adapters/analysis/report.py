"""All that can be said about one adapter without any data, and what cannot be said.

In: an adapter over its backbone or over an outline, perhaps others to compare with, perhaps what counts as an intruder.
Out: one record that JSON can hold. Refuses to know files, tables and plots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from lorica.adapters.adapter import Adapter
from lorica.adapters.analysis.anomalies import RULES, Anomaly, find_anomalies
from lorica.adapters.analysis.bases import Bases
from lorica.adapters.analysis.intruders import Intruders, Search, find_intruders
from lorica.adapters.analysis.similarity import Similarity, Source, similarities
from lorica.adapters.analysis.sites import GroupMeasures, SiteMeasures, Unread, by_layer, by_role, measure_sites
from lorica.adapters.outline import Outline
from lorica.core.errors import MissingError
from lorica.core.jsonable import plain
from lorica.models.backbone import Backbone


@dataclass(frozen=True, slots=True)
class Limit:
    """What an analysis cannot say."""

    analysis: str
    says: str


LIMITS: dict[str, tuple[str, ...]] = {
    "spectrum": (
        "A spectrum tells the shape of a change, not its use: noise has a high effective rank too, and a direction of "
        "little energy can carry a skill.",
        "Norms are of weights. What reaches the outputs depends on the inputs of a site, and no data was read.",
    ),
    "anomalies": ("Anomalies are found by fixed rules; one can be meant, and an adapter without any can be wrong.",),
    "similarity": (
        "Overlap and cosine compare weights of one base, site by site. Adapters that act alike can differ in both, and "
        "adapters that started from the same random factors share their input side without having learnt the same.",
    ),
    "intruders": (
        "Whether a vector counts depends on the threshold and on how many are looked at. Where singular values of a "
        "weight lie close together its vectors are not determined, and cosines fall without a cause.",
        "An intruder is not harm. Scale them and measure both tasks (`--scale-intruders`, `lorica forgetting`).",
    ),
    "no base": (
        "Without the base there is no relative norm and no intruder, and changes that depend on the base's weights are "
        "left out.",
    ),
}
"""Analysis → what it cannot say."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """One adapter, inspected.

    Attributes:
        adapter, method: its name and method. base: the backbone's name, None without one.
        norm: the root of Σ‖ΔW‖² over all sites. sites: measures in backbone order; unread: sites without, and why.
        layers, roles: the same in groups. anomalies: worst first, by `rules`.
        similarity: every pair of this adapter and the others; empty without others.
        intruders: None unless they were asked for. limits: what all this cannot say.
    """

    adapter: str
    method: str
    base: str | None
    norm: float
    sites: tuple[SiteMeasures, ...]
    unread: tuple[Unread, ...]
    layers: tuple[GroupMeasures, ...]
    roles: tuple[GroupMeasures, ...]
    anomalies: tuple[Anomaly, ...]
    rules: dict[str, str]
    similarity: tuple[Similarity, ...]
    intruders: Intruders | None
    limits: tuple[Limit, ...]

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Inspection:
        """What `to_dict` gave. Raises pydantic's ValidationError for anything else."""
        return _read().validate_python(record)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON; numbers that are not finite (a cosine with a change of nothing) are None."""
        found: dict[str, Any] = asdict(self)
        if self.intruders is not None:
            counts = {"count": self.intruders.count, "by_layer": self.intruders.by_layer()}
            found["intruders"] |= {**counts, "by_role": self.intruders.by_role()}
        found = plain(found)
        return found


@cache
def _read() -> TypeAdapter[Inspection]:
    return TypeAdapter(Inspection)


def inspect_adapter(
    adapter: Adapter,
    backbone: Backbone,
    others: Sequence[Source] = (),
    *,
    search: Search | None = None,
    bases: Bases | None = None,
) -> Inspection:
    """Measure an adapter's change of every weight, look for anomalies, and compare it with others.

    `backbone` may be an `Outline` (see `load_without_base`); then what needs weights is left out and said. With
    `search`, intruder dimensions are counted, which takes a singular value decomposition of each weight. Values that
    are not finite are reported, and the sites that hold them have no measures. Raises MismatchError for others whose
    sites have other shapes, and MissingError for a search on an outline.
    """
    sites, unread = measure_sites(adapter, backbone)
    without = isinstance(backbone, Outline)
    if search is not None and without:
        raise MissingError("Intruder dimensions are those of the base with the adapter, and there is no base.")
    intruders = None if search is None else find_intruders(adapter, backbone, search, bases=bases)
    pairs = similarities([(adapter, backbone), *others]) if others else ()
    done = {"spectrum": True, "anomalies": True, "similarity": bool(pairs), "intruders": search is not None}
    return Inspection(
        adapter=adapter.name,
        method=adapter.method.name,
        base=None if without else backbone.name,
        norm=sum(site.norm**2 for site in sites) ** 0.5,
        sites=sites,
        unread=unread,
        layers=by_layer(sites),
        roles=by_role(sites),
        anomalies=find_anomalies(sites, unread),
        rules={str(kind): rule for kind, rule in RULES.items()},
        similarity=pairs,
        intruders=intruders,
        limits=tuple(
            Limit(name, says) for name, sentences in LIMITS.items() if done.get(name, without) for says in sentences
        ),
    )
