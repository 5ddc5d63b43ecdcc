"""AdaLoRA in PEFT's layout, in both directions.

In: an adapter, or a PEFT config with its tensors. Out: tensors and settings, or a layout and its values. A pruned
adapter has a `rank_pattern` of PEFT's, which says how many triplets each module has left. The mask travels beside
PEFT's tensors. Refuses to know files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.layout import Layout
from lorica.adapters.peft_config import targeted
from lorica.adapters.peft_keys import PREFIX, Tensors, own_key, shortest
from lorica.adapters.peft_lora import put
from lorica.core.errors import FormatError, MismatchError
from lorica.core.site import Site
from lorica.methods.adalora import AdaLoRA
from lorica.methods.base import Method
from lorica.models.backbone import Backbone


def why_not(adapter: Adapter, backbone: Backbone) -> str | None:
    """Why PEFT's ADALORA type cannot hold an adapter, or None."""
    scalings = set()
    for name, site in adapter.layout.sites.items():
        own = adapter.layout.methods[name]
        if not isinstance(own, AdaLoRA):
            return "its sites have different methods"
        if site.kind != "linear" or site.router:
            return "PEFT has this form of AdaLoRA for linear layers only"
        scalings.add((own.alpha, _initial(own)))
    if len(scalings) > 1:
        return "PEFT has one initial rank and one alpha for all sites of an AdaLoRA adapter"
    return None


def _initial(method: AdaLoRA) -> int:
    """The rank that a site had before it was pruned."""
    return method.scale_rank or method.rank


def settings(adapter: Adapter, backbone: Backbone) -> dict[str, Any]:
    """The fields of PEFT's AdaLoraConfig that describe an adapter."""
    found = [own for own in adapter.layout.methods.values() if isinstance(own, AdaLoRA)]
    one, initial = found[0], _initial(found[0])
    assert one.peft is not None
    pattern: dict[str, list[bool]] = {}
    if any(own.rank != initial for own in found):
        for name, own in zip(adapter.layout.sites, found, strict=True):
            pattern[f"{name}.lora_E"] = [True] * own.rank + [False] * (initial - own.rank)
    return {
        "peft_type": "ADALORA",
        **{theirs: getattr(one, ours) for theirs, ours in one.peft.fields.items()},
        **one.peft.fixed,
        "init_r": initial,
        "target_r": max(1, round(one.keep * initial)),
        "total_step": one.steps or one.warmup + one.final + 1,  # PEFT insists on one; it matters in training only
        "rank_pattern": pattern or None,
        "init_lora_weights": True,
        "target_modules": shortest(adapter.layout.sites, (name for name, _ in backbone.module.named_modules())),
        "fan_in_fan_out": any(site.transposed for site in adapter.layout.sites.values()),
        "modules_to_save": None,
    }


def encode(adapter: Adapter, backbone: Backbone) -> dict[str, Tensor]:
    """Every tensor under PEFT's name, and the masks under ours."""
    found: dict[str, Tensor] = {}
    for name in adapter.layout.sites:
        p, where = adapter.values(name), f"{PREFIX}{name}."
        found |= {f"{where}lora_A": p["Q"], f"{where}lora_B": p["P"], f"{where}lora_E": p["E"][:, None]}
        found[own_key(name, "mask")] = p["mask"]
    return found


def decode(adapter: Adapter, held: Tensors, backbone: Backbone, names: Collection[str]) -> None:
    """Fill an adapter's sites `names`. Raises FormatError for missing tensors, MismatchError for other shapes."""
    for name in names:
        E_R = held.take(f"{name}.lora_E").flatten()
        mask = own_key(name, "mask")
        values = {
            "P": held.take(f"{name}.lora_B.weight"),
            "E": E_R,
            "Q": held.take(f"{name}.lora_A.weight"),
            "mask": held.take(mask) if mask in held else torch.ones(len(E_R)),
        }
        put(adapter, name, values, held.file)


def plan(method_class: type[Method], config: Mapping[str, Any], held: Tensors, backbone: Backbone) -> Layout:
    """The sites that a PEFT file adapts, each with the triplets it has left; those with none are passed over.

    Raises FormatError, MismatchError.
    """
    initial = int(config.get("init_r", 12))
    assert method_class.peft is not None
    told = {ours: config[theirs] for theirs, ours in method_class.peft.fields.items() if config.get(theirs) is not None}
    told["keep"] = min(1.0, float(config.get("target_r", 8)) / initial)
    if told.get("alpha", 8) <= 0:  # PEFT's way to ask for a scaling of about one
        told["alpha"] = float(initial)
    method = method_class(**told)
    patterns = config.get("rank_pattern") or {}
    picked: dict[str, tuple[Site, Method]] = {}
    empty: set[str] = set()
    for module in [key.removesuffix(".lora_E") for key in held if key.endswith(".lora_E")]:
        site = backbone.sites.get(module)
        if site is None or site.kind != "linear":
            raise MismatchError(f"{held.file} adapts {module!r}, which is no linear site of {backbone.name!r}.")
        rank, expected = held.peek(f"{module}.lora_E").shape[0], _expected(patterns, held, module, initial)
        if rank != expected:
            raise FormatError(f"{held.file} has {rank} triplets at {module!r}, where its settings say {expected}.")
        if rank == 0:
            empty.add(module)
            for tensor in ("lora_A.weight", "lora_B.weight", "lora_E"):
                held.take(f"{module}.{tensor}")
            continue
        pruned = {"rank": rank, "scale_rank": initial} if rank != initial else {}
        picked[module] = (site, method.replace(**pruned))
    missing = set(targeted(config, backbone, ("linear",), held.as_written)) - picked.keys() - empty
    if missing:
        raise FormatError(f"{held.file} lacks the tensors of {min(missing)!r}, which its settings select.")
    if not picked:
        raise FormatError(f"{held.file} holds no triplets.")
    return Layout(method, {name: picked[name] for name in backbone.sites if name in picked})


def _expected(patterns: Mapping[str, Any], held: Tensors, module: str, initial: int) -> int:
    """How many triplets the settings say a module has; PEFT writes its patterns with or without the adapter's name."""
    name = held.as_written(module)
    for key, kept in patterns.items():
        if key.partition(".lora_E")[0] == name:
            return sum(map(bool, kept))
    return initial
