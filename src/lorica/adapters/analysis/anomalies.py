"""What looks wrong in an adapter: by rules that are stated, each with the place and the numbers.

In: measures of sites and those that could not be measured. Out: anomalies, worst first. Refuses to know whether
something is meant: an adapter that was not trained yet has no change, and says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lorica.adapters.analysis.sites import SiteMeasures, Unread

Kind = Literal["not finite", "exploding", "above the weight", "no change", "dead directions"]
FAR, FEWEST = 10.0, 4
"""A site explodes where its rms is above FAR times the median of the changed sites, of which there are FEWEST."""

RULES: dict[Kind, str] = {
    "not finite": "a tensor, or the change that it makes, holds NaN or infinity",
    "exploding": f"‖ΔW‖ / √(out · in) is above {FAR:g} times the median of the changed sites ({FEWEST} or more)",
    "above the weight": "‖ΔW‖ is larger than ‖W₀‖",
    "no change": "ΔW and the change of the bias are zero",
    "dead directions": "of the adapter's own rank, directions with σ up to 1e-6 σ₁ move nothing",
}
"""Kind → its rule, worst first."""


@dataclass(frozen=True, slots=True)
class Anomaly:
    """One kind of anomaly at one site, with its numbers."""

    kind: Kind
    site: str
    says: str


def find_anomalies(sites: Sequence[SiteMeasures], unread: Sequence[Unread] = ()) -> tuple[Anomaly, ...]:
    """Every anomaly by `RULES`, in their order and then in the order of the sites."""
    found = [Anomaly("not finite", one.site, one.says) for one in unread if one.reason == "not finite"]
    found += [*_exploding(sites), *(anomaly for site in sites for anomaly in _of_site(site))]
    order = list(RULES)
    return tuple(sorted(found, key=lambda anomaly: order.index(anomaly.kind)))


def _exploding(sites: Sequence[SiteMeasures]) -> Iterator[Anomaly]:
    changed = [site.rms for site in sites if site.rms > 0]
    if len(changed) < FEWEST:
        return
    middle = statistics.median(changed)
    for site in sites:
        if site.rms > FAR * middle:
            yield Anomaly("exploding", site.site, f"rms {site.rms:.3g}, {site.rms / middle:.0f} times the median")


def _of_site(site: SiteMeasures) -> Iterable[Anomaly]:
    if site.norm == 0 and site.bias == 0:
        yield Anomaly("no change", site.site, "its factors multiply to zero" if site.factored else "it is zero")
    if site.relative is not None and site.relative > 1:
        times = "more than any number of" if math.isinf(site.relative) else f"{site.relative:.3g}"
        yield Anomaly("above the weight", site.site, f"{times} times the weight's norm")
    if site.factored and 0 < site.moving < site.rank:
        yield Anomaly("dead directions", site.site, f"{site.rank - site.moving} of {site.rank}")
