"""What a PEFT file holds beside its factors: whole biases, whole modules (`modules_to_save`), copies of the base's
tensors.

In: the tensors that no method has taken, and the layout so far. Out: a layout in which every changed tensor has a
site of a method that computes it (a bias, a norm, a dense difference), and its values. Refuses to guess: what has no
such site is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.layout import Layout
from lorica.adapters.peft_keys import Tensors
from lorica.adapters.peft_lora import put
from lorica.core.errors import FormatError, MismatchError
from lorica.core.site import Site
from lorica.methods.base import Method
from lorica.methods.bias import Bias
from lorica.methods.delta import Delta
from lorica.methods.lora import LoRA
from lorica.methods.norm import Norm
from lorica.models.backbone import Backbone


@dataclass(frozen=True, slots=True)
class Change:
    """The difference between a stored whole tensor and the base's, at a site."""

    site: Site
    leaf: str
    value: Tensor


def take_changes(held: Tensors, backbone: Backbone) -> list[Change]:
    """Whole tensors of the base that the file holds. Equal ones are dropped. Raises MismatchError for another shape."""
    base = dict(backbone.module.named_parameters(remove_duplicate=False))
    found = []
    for key in list(held):
        name = key.replace(".base_layer.", ".")
        module, _, leaf = name.rpartition(".")
        if name not in base:
            continue
        old, new = base[name].detach(), held.take(key)
        if old.shape != new.shape:
            raise MismatchError(
                f"{held.file} holds {name!r} with shape {list(new.shape)}, where {backbone.name!r} has "
                f"{list(old.shape)}.",
                hint="It was made for a base whose vocabulary was resized; load that base." if new.ndim == 2 else None,
            )
        new = new.to(old.device)
        if torch.equal(old.to(new.dtype), new):
            continue
        if module not in backbone.sites or leaf not in ("weight", "bias"):
            raise MismatchError(f"{held.file} replaces {name!r}, which is no site that Lorica can adapt.")
        wide = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
        found.append(Change(backbone.sites[module], leaf, new.to(wide) - old.to(wide)))
    return found


def widen(layout: Layout, changes: list[Change], backbone: Backbone, file: object) -> Layout:
    """The layout with a place for every change. Raises FormatError where there is none."""
    if not changes:
        return layout
    if layout.method.sites_are_coupled:
        raise FormatError(
            f"{file} replaces {changes[0].site.name!r} beside {layout.method.name}, which Lorica cannot read."
        )
    picked = {name: (site, layout.methods[name]) for name, site in layout.sites.items()}
    for name in {change.site.name for change in changes}:
        leaves = {change.leaf for change in changes if change.site.name == name}
        site = backbone.sites[name]
        picked[name] = (site, _method(layout.methods.get(name), site, leaves, file))
    return Layout(layout.method, {name: picked[name] for name in backbone.sites if name in picked})


def _method(own: Method | None, site: Site, leaves: set[str], file: object) -> Method:
    """The method that can hold changes of these leaves at a site."""
    if own is None and site.kind == "norm":
        return Norm()
    if own is None and leaves == {"bias"}:
        return Bias()
    if own is None and leaves == {"weight"}:
        return Delta()
    if type(own) is LoRA and leaves == {"bias"}:
        return own.replace(lora_bias=True)
    what = " and ".join(sorted(leaves))
    beside = f" beside {own.name}" if own is not None else " together"
    raise FormatError(f"{file} replaces the {what} of {site.name!r}{beside}, which no method of Lorica computes.")


def fill(adapter: Adapter, changes: list[Change], file: object) -> None:
    """Set the values of the changes; at a LoRA site a bias is what `lora_bias` must be, given its scale."""
    for change in changes:
        name = change.site.name
        method = adapter.layout.methods[name]
        if isinstance(method, LoRA):
            old = adapter.values(name)["bias"]
            values: Mapping[str, Tensor] = {"bias": old + change.value.to(old) / method.scaling()}
        elif isinstance(method, Delta):
            values = {"delta": change.value.T if change.site.transposed else change.value}
        else:
            values = {change.leaf: change.value}
        put(adapter, name, values, file)
