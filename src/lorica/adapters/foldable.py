"""What can be folded into weights, asked before any weight changes.

In: a backbone and a stack of adapters, innermost first. Out: every adapted site with its updates, or the MergeError
that names the method, the site and what would be right. Refuses to change anything.
"""

from __future__ import annotations

import torch

from lorica.adapters.adapter import Adapter
from lorica.adapters.fold import changes_weight, invertible
from lorica.core.errors import MergeError
from lorica.core.update import LinearUpdate, SoftPrompt
from lorica.models.backbone import Backbone

Plan = dict[str, list[LinearUpdate]]


def folding_plan(backbone: Backbone, stack: tuple[Adapter, ...], *, undoable: bool = False) -> Plan:
    """Every adapted site's updates, lowered against the frozen weights, in backbone order.

    With `undoable`, scales must be invertible. Raises MergeError for an empty stack, an adapter of another base,
    virtual tokens and prefixes, a weight tied to another, a bias that the module cannot hold, a base without values.
    """
    if not stack:
        raise MergeError("There is no adapter to merge.")
    for adapter in stack:
        strange = next((name for name in adapter.layout.sites if name not in backbone.sites), None)
        if strange is not None:
            raise MergeError(
                f"Adapter {adapter.name!r} acts at site {strange!r}, which {backbone.name!r} does not have; "
                "it belongs to another base."
            )
    partners, plan = _partners(backbone), Plan()
    for name in backbone.sites:
        for adapter in stack:
            if name in adapter.layout.sites:
                plan.setdefault(name, []).append(_checked(adapter, backbone, name, partners.get(name), undoable))
    return plan


def _checked(adapter: Adapter, backbone: Backbone, name: str, partner: str | None, undoable: bool) -> LinearUpdate:
    """One adapter's update of one site, if it can be folded there. Raises MergeError."""
    who = f"{adapter.method.name!r} adapter {adapter.name!r}"
    update = adapter.update(name, backbone.weight(name))
    if not isinstance(update, LinearUpdate):
        what = "virtual tokens" if isinstance(update, SoftPrompt) else "keys and values"
        raise MergeError(
            f"The {who} adds {what} at site {name!r} and changes no weight, so it cannot be merged.",
            hint="Keep the adapter beside the model: save it, and load it where the model is served.",
        )
    if partner is not None and changes_weight(update):
        raise MergeError(
            f"The weight of site {name!r} is tied to {partner!r}, so merging the {who} would change both.",
            hint="Adapt another site, keep the adapter beside the model, or load a base with untied weights.",
        )
    if update.bias_O is not None and not backbone.sites[name].bias and bool((update.bias_O != 0).any()):
        raise MergeError(
            f"Site {name!r} has no bias that the one of the {who} could be added to.",
            hint="Train without that bias, adapt a module that has one, or keep the adapter beside the model.",
        )
    weight = backbone.weight(name)
    if undoable and weight.packed is not None and changes_weight(update):
        raise MergeError(
            f"The weight of site {name!r} is stored as {weight.packed.form.name}; quantising it again is nothing that "
            "arithmetic undoes.",
            hint="Merge with `keep=True`.",
        )
    if undoable and not invertible(update):
        raise MergeError(
            f"The {who} scales a feature of site {name!r} by zero, which arithmetic cannot undo.",
            hint="Merge with `keep=True`.",
        )
    if weight.device.type == "meta":
        raise MergeError(f"The weight of site {name!r} is on the meta device and has no values to merge into.")
    return update


def _partners(backbone: Backbone) -> dict[str, str]:
    """Sites whose weight another module has too, each with the name of that module's tensor.

    `Site.tied` knows of sites alone; a tensor can also be shared with a module that is none.
    """
    owners: dict[int, list[tuple[str, tuple[int, str]]]] = {}
    for path, module in backbone.module.named_modules():
        for attribute, tensor in module._parameters.items():
            if tensor is not None and tensor.numel() and tensor.device.type != "meta":
                full = f"{path}.{attribute}" if path else attribute
                owners.setdefault(tensor.data_ptr(), []).append((full, (id(module), attribute)))
    found: dict[str, str] = {}
    for name, site in backbone.sites.items():
        if site.kind not in ("input", "attention") and backbone.weight(name).packed is None:
            owner, attribute, _ = backbone.parameter(name)
            others = owners.get(getattr(owner, attribute).data_ptr(), [])
            partner = next((full for full, key in others if key != (id(owner), attribute)), None)
            if partner is not None:
                found[name] = partner
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` of `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
