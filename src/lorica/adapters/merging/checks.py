"""What must hold of parents and their weights before anything is computed.

In: adapters, a backbone, a rule, weights. Out: the weights of every site, or the sentence that says what does not fit.
Refuses to compute changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lorica.adapters.adapter import Adapter
from lorica.adapters.merging.base import Merging
from lorica.core.errors import ConfigError, MergeError, MismatchError
from lorica.models.backbone import Backbone

Weights = Sequence[float] | Mapping[str, Sequence[float]] | None
"""One for each parent, or one for each parent by site; None is what the rule takes by default."""


def check_parents(
    parents: Sequence[Adapter], backbone: Backbone, rank: int | None, *, other_base: bool = False
) -> None:
    """Raises MergeError for no parents and for those that must not be added up, MismatchError for a parent of another
    base unless that is wanted, ConfigError for a rank below 1.
    """
    if not parents:
        raise MergeError("There is no adapter to merge.")
    if rank is not None and rank < 1:
        raise ConfigError(f"The rank of a merge is {rank}; at least 1 is right.")
    _check_roundings(parents)
    if not other_base:
        _check_bases(parents, backbone)


def _check_bases(parents: Sequence[Adapter], backbone: Backbone) -> None:
    for parent in parents:
        if parent.base and parent.base != backbone.fingerprint():
            raise MismatchError(
                f"Adapter {parent.name!r} was made for a base with fingerprint {parent.base}; this is "
                f"{backbone.name!r} ({backbone.fingerprint()}), and changes of different bases do not add up.",
                hint="Merge adapters of one base.",
            )
        strange = next((site for site in parent.layout.sites if site not in backbone.sites), None)
        if strange is not None:
            raise MismatchError(f"Adapter {parent.name!r} acts at {strange!r}, which {backbone.name!r} does not have.")


def _check_roundings(parents: Sequence[Adapter]) -> None:
    """What packing took from the base must count once."""
    for parent in parents:
        if parent.method.restores_rounding and len(parents) > 1:
            raise MergeError(
                f"The {parent.method.name!r} adapter {parent.name!r} holds what packing took from the base, which a "
                "merge with others would count by its weight.",
                hint="Fold it into the packed base with `lorica merge`, or leave it out.",
            )


def weights_by_site(
    rule: Merging, parents: Sequence[Adapter], sites: Sequence[str], weights: Weights
) -> dict[str, tuple[float, ...]]:
    """The parents' weights at every site. Raises ConfigError where they do not fit the parents, sites or rule."""
    if weights is None:
        weights = [1 / len(parents) if rule.default_weight == "mean" else 1.0] * len(parents)
    if isinstance(weights, Mapping):
        odd = next((s for s in (*sites, *weights) if (s in weights) != (s in sites)), None)
        if odd is not None:
            what = "there is none" if odd in sites else "no parent acts there"
            raise ConfigError(f"The weights are given by site; for {odd!r} {what}.")
        found = {site: tuple(map(float, weights[site])) for site in sites}
    else:
        found = dict.fromkeys(sites, tuple(map(float, weights)))
    for site, own in found.items():
        if len(own) != len(parents) or not all(map(math.isfinite, own)):
            raise ConfigError(
                f"The weights {', '.join(f'{w:g}' for w in own)} (site {site!r}) do not fit {len(parents)} adapters; "
                "a finite number for each is right."
            )
        if not rule.weighted and any(weight != 1 for weight in own):
            raise ConfigError(f"{rule.name!r} has no weights of parents; leave them out.")
    return found
