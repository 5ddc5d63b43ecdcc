"""What a merged adapter says of where it comes from, and which parents mean something together.

In: the parents and who they are. Out: the result's lineage. Refuses to know rules and changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lorica.adapters.adapter import Adapter
from lorica.adapters.lineage import Parent
from lorica.adapters.parents import lineage_of, parent_of
from lorica.core.errors import MergeError
from lorica.models.backbone import Backbone


def origins_of(parents: Sequence[Adapter], backbone: Backbone, weights: Sequence[float] | None) -> tuple[Parent, ...]:
    """The loaded parents by their folders, with their weights."""
    shares: Sequence[float | None] = weights or [None] * len(parents)
    return tuple(
        parent_of(parent, backbone, "merged-from", share) for parent, share in zip(parents, shares, strict=True)
    )


def weighed(origins: Sequence[Parent], weights: Sequence[float] | None) -> tuple[Parent, ...]:
    """The same parents with the weights of this merge."""
    shares: Sequence[float | None] = weights or [None] * len(origins)
    return tuple(
        replace(parent, relation="merged-from", weight=share) for parent, share in zip(origins, shares, strict=True)
    )


def beneath(parents: Sequence[Adapter], origins: Sequence[Parent]) -> tuple[Parent, ...]:
    """What the result acts on top of: what all parents were trained on top of, less what is merged with them.

    Raises MergeError where they were trained on top of different adapters: their changes belong to other weights.
    """
    inside = {origin.sha256 for origin in origins if origin.sha256}
    stacks = [
        tuple(below for below in lineage_of(parent).of("stacked-on") if below.sha256 not in inside)
        for parent in parents
    ]
    keys = [tuple(below.sha256 or below.path for below in stack) for stack in stacks]
    odd = next((n for n, key in enumerate(keys) if key != keys[0]), None)
    if odd is None:
        return stacks[0]
    above, other = (odd, 0) if stacks[odd] else (0, odd)
    names = ", ".join(below.path or f"an unsaved {below.method}" for below in stacks[above])
    raise MergeError(
        f"Adapter {parents[above].name!r} was trained on top of {names}, and {parents[other].name!r} was not, so their "
        "changes belong to different weights.",
        hint="Merge what is beneath it too, or fold that into the base and train there.",
    )
