"""Who an adapter comes from, said while it is made: by its loaded parents, by the base that it acts on, by its recipe.

In: adapters in memory and their backbone. Out: `Parent` records, and lineages in `meta`. A parent is named by its
folder only where that holds what is in memory. Refuses to know graphs, and who asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorica.adapters.adapter import Adapter
from lorica.adapters.files import load_adapter
from lorica.adapters.lineage import KEY, Base, Data, Lineage, Parent, Relation, parent_at
from lorica.core.errors import LoricaError, MethodError
from lorica.models import names
from lorica.models.backbone import Backbone


def base_of(backbone: Backbone) -> Base:
    """The record of a backbone; a directory by its absolute path."""
    name = backbone.name
    local = name not in names() and Path(name).expanduser().is_dir()
    return Base(str(Path(name).expanduser().resolve()) if local else name, backbone.fingerprint())


def folded_in(backbone: Backbone) -> tuple[Parent, ...]:
    """The adapters that were folded into a backbone's weights, first to last: what is trained on it comes from them.

    Raises FormatError where the model directory's record is broken.
    """
    made = lineage_of_weights(backbone)
    return tuple(replace(parent, relation="trained-from") for parent in made.parents)


def lineage_of_weights(backbone: Backbone) -> Lineage:
    """Where a backbone's weights come from; an empty one where nobody knows. Raises FormatError."""
    return Lineage.from_meta({KEY: backbone.lineage}, f"The model {backbone.name!r}")


def lineage_of(adapter: Adapter) -> Lineage:
    """What is known of where an adapter comes from. Raises FormatError."""
    return Lineage.from_meta(adapter.meta, f"Adapter {adapter.name!r}")


def parent_of(adapter: Adapter, backbone: Backbone, relation: Relation, weight: float | None = None) -> Parent:
    """A loaded adapter as a parent: by its folder where that holds the same method, sites and values, else without."""
    if adapter.folder and _unchanged(adapter, backbone):
        found = parent_at(adapter.folder, relation, weight)
        return replace(found, method=adapter.method.name, base=adapter.base)
    return Parent(relation, "", "", adapter.method.name, weight, adapter.base)


@torch.no_grad()
def _unchanged(adapter: Adapter, backbone: Backbone) -> bool:
    try:
        stored = load_adapter(Path(adapter.folder), backbone, adapter.name, from_quantized=True)
    except LoricaError:
        return False
    if stored.layout.key != adapter.layout.key or stored.flat.dtype != adapter.flat.dtype:
        return False
    if (stored.seed, stored.forwards) != (adapter.seed, adapter.forwards):
        return False
    frozen = [
        (stored.frozen[site][param], own) for site, owned in adapter.frozen.items() for param, own in owned.items()
    ]
    return all(torch.equal(one.to(other.device), other) for one, other in [(stored.flat, adapter.flat), *frozen])


def folded(backbone: Backbone, stack: Sequence[Adapter]) -> Lineage:
    """Where a backbone's weights come from once a stack is folded into them. Call it before that."""
    parents, how, settings = [*lineage_of_weights(backbone).parents], "fold", {}
    for adapter in stack:
        parent, known = parent_of(adapter, backbone, "merged-from"), lineage_of(adapter)
        if parent.path or known.how is None:
            parents.append(parent)
        else:  # it was computed just now and is nowhere else: what it was computed from is
            parents += known.parents
            how, settings = f"{known.how}, then fold", known.settings
    return Lineage(tuple(parents), base_of(backbone), how=how, settings=settings)


def born(adapter: Adapter, backbone: Backbone, *parents: Parent) -> Adapter:
    """Begin an adapter's lineage: the adapters in its base's weights, its other parents, its base. Returns it.

    What was said of an earlier lineage of its is replaced.
    """
    return _put(adapter, Lineage((*folded_in(backbone), *parents), base_of(backbone)))


def merged(
    made: Adapter, backbone: Backbone, parents: Sequence[Parent], how: str, settings: Mapping[str, Any]
) -> Adapter:
    """Write the lineage of an adapter that was computed from others by `how`. Returns it."""
    return _put(made, Lineage(tuple(parents), base_of(backbone), how=how, settings=dict(settings)))


def derived(made: Adapter, source: Adapter, backbone: Backbone, how: str, **settings: Any) -> Adapter:
    """Write the lineage of an adapter that was computed from one other by `how`. Returns it.

    What the source acted on top of, the result does too. Of a source that lies in no folder, all that is known goes
    over: nobody can look it up there.
    """
    known, parent = lineage_of(source), parent_of(source, backbone, "derived-from")
    before = known.of("stacked-on") if parent.path else known.parents
    found = Lineage((parent, *before), known.base or base_of(backbone), how=how, settings=settings)
    if not parent.path:
        found = found.replace(recipe=known.recipe, data=known.data)
    return _put(made, found)


def note_training(
    adapter: Adapter, backbone: Backbone, recipe: Mapping[str, Any] | None = None, data: Data | None = None
) -> Adapter:
    """Add to an adapter's lineage what trained it and on which rows; its parents and base stay. Returns it."""
    known = lineage_of(adapter)
    if known.base is None:
        known = known.replace(parents=known.parents or folded_in(backbone), base=base_of(backbone))
    return _put(adapter, known.replace(recipe=None if recipe is None else dict(recipe), data=data))


def _put(adapter: Adapter, lineage: Lineage) -> Adapter:
    for key in ("recipe", "data", "exported_from"):  # what earlier versions wrote for the same
        adapter.meta.pop(key, None)
    adapter.meta[KEY] = lineage.to_meta()
    return adapter


def stacked(stack: Sequence[Adapter], backbone: Backbone) -> tuple[Parent, ...]:
    """Adapters, innermost first, as what another one is trained on top of. Raises MethodError as `check_beneath`."""
    found: list[Parent] = []
    for adapter in stack:
        check_beneath(adapter, found)
        found.append(parent_of(adapter, backbone, "stacked-on"))
    return tuple(found)


def check_beneath(adapter: Adapter, beneath: Sequence[Parent]) -> None:
    """Raises MethodError where an adapter was trained on top of others and would act without them."""
    absent = missing_beneath(adapter, beneath)
    if absent:
        on = ", ".join(parent.path or f"an unsaved {parent.method}" for parent in absent)
        raise MethodError(
            f"Adapter {adapter.folder or adapter.name!r} was trained on top of {on}, which would not act beneath it.",
            hint="Name what it stands on too (`stack_on`), in the same order, innermost first.",
        )


def missing_beneath(adapter: Adapter, beneath: Sequence[Parent]) -> tuple[Parent, ...]:
    """The adapters that one was trained on top of, where not all of them are beneath it in their order; else none."""
    wanted = lineage_of(adapter).of("stacked-on")
    present = iter([parent.sha256 for parent in beneath])
    return () if all(parent.sha256 in present for parent in wanted if parent.sha256) else wanted
