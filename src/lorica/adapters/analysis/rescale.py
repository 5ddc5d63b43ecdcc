"""An adapter whose intruder dimensions are scaled: removed, damped or amplified, as a causal test of what they do.

In: an adapter over its backbone, and the factor λ. Out: a new adapter with `W_λ = W₁ + (λ − 1) Σ σ u vᵀ` at every
weight, exact or cut to a rank, and what was scaled and lost. Refuses to know files, and what scaling does to a task.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lorica.adapters.adapter import Adapter
from lorica.adapters.analysis.bases import Bases
from lorica.adapters.analysis.intruders import Examined, Search, examine
from lorica.adapters.analysis.sites import Unread, change_at
from lorica.adapters.assemble import assemble_alike
from lorica.adapters.export.decompose import TOLERANCE, cut
from lorica.adapters.merging.change import Change, join
from lorica.adapters.parents import derived
from lorica.core.errors import ConfigError, FormatError, MethodError
from lorica.models.backbone import Backbone

HOW = "intruders"
"""Where the new adapter's `meta` says how it was made."""


@dataclass(frozen=True, slots=True)
class Rescaled:
    """What scaling changed.

    Attributes:
        factor: λ. scaled: intruders that were scaled; weights: in how many weights, of `of` that were looked at.
        rank: the largest rank of the result's factors; 0 where all of it is dense.
        lost: the largest share Σσ²(cut) / Σσ²(all) of a site's new change that cutting to a rank took away.
        worst: the site of that loss; empty where nothing was cut.
    """

    factor: float
    scaled: int
    weights: int
    of: int
    rank: int
    lost: float
    worst: str

    def __str__(self) -> str:
        if not self.scaled:
            return f"There are no intruders in {self.of} weights, so the adapter's changes are as they were."
        kept = "nothing was cut"
        if self.worst:
            kept = f"cutting to ranks up to {self.rank} lost up to {self.lost:.2%} of a site's change (at {self.worst})"
        return f"Scaled {self.scaled} intruders in {self.weights} of {self.of} weights by {self.factor:g}; {kept}."


@torch.no_grad()
def rescale_intruders(
    adapter: Adapter,
    backbone: Backbone,
    factor: float = 0.75,
    search: Search | None = None,
    *,
    exact: bool = False,
    rank: int | None = None,
    bases: Bases | None = None,
) -> tuple[Adapter, Rescaled]:
    """A new adapter with `W_λ = W₁ + (λ − 1) Σ_{j ∈ J} σ_j u¹_j v¹_jᵀ` over the intruders J, and a report.

    λ = 0 removes them, 1 changes nothing, above 1 amplifies. Scaled factors are cut to the rank that the adapter has at
    the site, as the authors and PEFT do, by singular values with their root on each side; with `rank` every site is cut
    to that one. With `exact` nothing is cut: a site's rank grows by its intruders. Dense changes stay dense unless
    there is a rank. A site without intruders keeps its change, as does one that is not looked at (embeddings, norms).

    Raises ConfigError for a negative or infinite factor, a rank below 1, or a rank with `exact`; FormatError for values
    that are not finite; MethodError for virtual tokens and prefixes. Paper: arXiv 2410.21228.
    """
    _check(factor, exact, rank)
    search = search or Search()
    seen = {_name(one): one for one in examine(adapter, backbone, search, bases or Bases())}
    changes: dict[str, Change] = {}
    found: dict[str, int] = {}
    lost: dict[str, float] = {}
    for name in adapter.layout.sites:
        one = seen.pop(name, None)
        before = _readable(
            adapter, name, one.change if isinstance(one, Examined) else one or change_at(adapter, backbone, name)
        )
        after = before
        if isinstance(one, Examined):
            which = one.leading.intruders(search.threshold)
            found[name] = len(which)
            after = _scaled(before, one, which, factor) if which and factor != 1 else before
        changes[name], lost[name] = _limited(after, rank or _most(before, after, exact))
    worst = max(lost, key=lost.__getitem__)
    report = Rescaled(
        factor=factor,
        scaled=sum(found.values()),
        weights=sum(map(bool, found.values())),
        of=len(found),
        rank=max((change.rank for change in changes.values() if change.factored), default=0),
        lost=lost[worst],
        worst=worst if lost[worst] > TOLERANCE else "",
    )
    made = assemble_alike(adapter, changes)
    settings = {"scaled_by": factor, "top": search.top, "threshold": search.threshold}
    made.meta = {**adapter.meta, HOW: settings}
    return derived(made, adapter, backbone, "scale intruders", **settings), report


def _check(factor: float, exact: bool, rank: int | None) -> None:
    if not 0 <= factor < math.inf:
        raise ConfigError(f"Intruders would be scaled by {factor}; a number from 0 (removed) on is right.")
    if rank is not None and rank < 1:
        raise ConfigError(f"The rank is {rank}; at least 1 is right.")
    if exact and rank is not None:
        raise ConfigError("An exact result is cut to no rank; ask for one or the other.")


def _name(one: Examined | Unread) -> str:
    return one.site.name if isinstance(one, Examined) else one.site


def _readable(adapter: Adapter, name: str, change: Change | Unread) -> Change:
    """The change itself. Raises FormatError, MethodError where there is none."""
    if isinstance(change, Change):
        return change
    if change.reason == "not finite":
        raise FormatError(
            f"Adapter {adapter.name!r} holds values that are not finite, at site {name!r}: {change.says}.",
            hint="Use an earlier checkpoint.",
        )
    raise MethodError(
        f"The {adapter.method.name!r} adapter {adapter.name!r} has no intruders at {name!r}: {change.says}."
    )


def _scaled(change: Change, one: Examined, which: list[int], factor: float) -> Change:
    """`ΔW + (λ − 1) Σ σ u vᵀ`: of more factors, or dense."""
    A_JI, B_OJ = one.leading.part(which)
    more = Change.of_factors(change.shape, A_JI.to(change.device), (factor - 1) * B_OJ.to(change.device))
    if change.factored:
        return join([change, more])
    return Change.of_dense(change.shape, change.matrix() + more.matrix(), change.bias_O)


def _most(before: Change, after: Change, exact: bool) -> int | None:
    """The rank that a site's new change is cut to when nobody says; None for a dense one."""
    if not before.factored:
        return None
    return min(before.sides) if exact or after is before else before.rank


def _limited(change: Change, rank: int | None) -> tuple[Change, float]:
    """The change cut to a rank, and the share that was lost; a norm's stays."""
    if rank is None or len(change.shape) < 2:
        return change, 0.0
    kept = cut(change, rank, TOLERANCE)
    return Change.of_factors(change.shape, kept.A_RI, kept.B_OR, bias_O=change.bias_O), kept.lost
