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
    found: dict[tuple[str, str], Change] = {}
    for key in list(held):
        name = _whole(key, backbone)
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
        site, leaf = _owner(name, base, backbone, held.file)
        wide = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
        change = Change(site, leaf, new.to(wide) - old.to(wide))
        earlier = found.setdefault((site.name, leaf), change)
        if not torch.equal(earlier.value, change.value):
            raise MismatchError(f"{held.file} replaces {name!r} under two names by different values.")
    return list(found.values())


def _whole(key: str, backbone: Backbone) -> str:
    """The name of the base's tensor that a file's tensor stands for."""
    module, _, leaf = key.replace(".base_layer.", ".").rpartition(".")
    inner = module.removesuffix(".ln_tuning_layers")
    if inner != module and inner in backbone.sites and backbone.sites[inner].kind == "norm":
        return key  # norm tuning reads it
    return f"{inner}.{leaf}"


def _owner(name: str, base: Mapping[str, Tensor], backbone: Backbone, file: object) -> tuple[Site, str]:
    """The site of a tensor, under this name or another that the same tensor has (BERT's output bias)."""
    for twin in (name, *(other for other, tensor in base.items() if tensor is base[name])):
        module, _, leaf = twin.rpartition(".")
        if module in backbone.sites and leaf in ("weight", "bias"):
            return backbone.sites[module], leaf
    raise MismatchError(f"{file} replaces {name!r}, which is no site that Lorica can adapt.")


def widen(layout: Layout, changes: list[Change], backbone: Backbone, file: object) -> Layout:
    """The layout with a place for every change. Raises FormatError where there is none."""
    if not changes:
        return layout
    picked = {name: (site, layout.methods[name]) for name, site in layout.sites.items()}
    for name in {change.site.name for change in changes}:
        leaves = {change.leaf for change in changes if change.site.name == name}
        site = backbone.sites[name]
        picked[name] = (site, _method(layout.methods.get(name), site, leaves, file))
    return Layout(layout.method, {name: picked[name] for name in backbone.sites if name in picked})


def _method(own: Method | None, site: Site, leaves: set[str], file: object) -> Method:
    """The method that can hold changes of these leaves at a site."""
    if own is None and leaves == {"bias"}:
        return Bias()
    if own is None and site.kind == "norm":
        return Norm()
    if own is None:
        return Delta(bias="bias" in leaves)
    if type(own) is LoRA and leaves == {"bias"}:
        return own.replace(lora_bias=True)
    what = " and ".join(sorted(leaves))
    raise FormatError(
        f"{file} replaces the {what} of {site.name!r} beside {own.name}, which no method of Lorica computes."
    )


def fill(adapter: Adapter, changes: list[Change], file: object) -> None:
    """Set the values of the changes; at a LoRA site a bias is what `lora_bias` must be, given its scale."""
    for change in changes:
        name = change.site.name
        method = adapter.layout.methods[name]
        if isinstance(method, LoRA):
            old = adapter.values(name)["bias"]
            values: Mapping[str, Tensor] = {"bias": old + change.value.to(old) / method.scaling()}
        elif isinstance(method, Delta) and change.leaf == "weight":
            values = {"delta": change.value.T if change.site.transposed else change.value}
        else:
            values = {change.leaf: change.value}
        put(adapter, name, values, file)
