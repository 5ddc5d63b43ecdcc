"""GLoRA in PEFT's layout, in both directions.

In: an adapter, or a PEFT config with its tensors. Out: tensors and settings, or a layout and its values. PEFT has one
choice for all modules, in which A is like B and D like E, and gives no bias to a module that has none; what it does not
train it stores as zeros. Refuses to know files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorica.adapters.adapter import Adapter
from lorica.adapters.layout import Layout
from lorica.adapters.peft_config import targeted
from lorica.adapters.peft_keys import PREFIX, Tensors, shortest
from lorica.adapters.peft_lora import put
from lorica.core.errors import FormatError, MismatchError
from lorica.core.glora_choices import OPTIONS, Choice
from lorica.core.site import Site
from lorica.methods.base import Method
from lorica.methods.glora import GLoRA
from lorica.models.backbone import Backbone

MARK = ".glora_A."
"""In the name of a tensor of every adapted module."""


def why_not(adapter: Adapter, backbone: Backbone) -> str | None:
    """Why PEFT's GLORA type cannot hold an adapter, or None."""
    for name, site in adapter.layout.sites.items():
        own = adapter.layout.methods[name]
        if not isinstance(own, GLoRA):
            return "its sites have different methods"
        if own.supernet:
            return "PEFT has one choice of a GLoRA adapter, and no supernet of all of them"
        if type(backbone.module_of(name)) is not nn.Linear:
            return "PEFT has GLoRA for plain linear layers only"
        choice = own.choice_at(site)
        if choice.A != choice.B:
            return f"PEFT has one option for A and B, and at {name!r} they are {choice.A!r} and {choice.B!r}"
        if site.bias and choice.D != choice.E:
            return f"PEFT has one option for D and E, and at {name!r} they are {choice.D!r} and {choice.E!r}"
        if not site.bias and (choice.C, choice.E) != ("none", "none"):
            return f"PEFT gives no bias to {name!r}, which has none, and C or E does"
    if len({method.rank for method in _methods(adapter)}) > 1:
        return "PEFT has one rank for all sites of a GLoRA adapter"
    if len({choice.A for choice, _ in _choices(adapter)}) > 1 or len({c for c, bias in _choices(adapter) if bias}) > 1:
        return "PEFT has one choice for all sites of a GLoRA adapter"
    return None


def _methods(adapter: Adapter) -> list[GLoRA]:
    return [own for own in adapter.layout.methods.values() if isinstance(own, GLoRA)]


def _choices(adapter: Adapter) -> list[tuple[Choice, bool]]:
    """The choice of every site, and whether it has a bias."""
    sites = adapter.layout.sites.values()
    return [(own.choice_at(site), site.bias) for own, site in zip(_methods(adapter), sites, strict=True)]


def settings(adapter: Adapter, backbone: Backbone) -> dict[str, Any]:
    """The fields of PEFT's GloraConfig that describe an adapter."""
    method = _methods(adapter)[0]
    assert method.peft is not None
    # where no module has a bias, what PEFT would do with one does not matter
    choice = next((choice for choice, bias in _choices(adapter) if bias), _choices(adapter)[0][0])
    return {
        "peft_type": method.peft.peft_type,
        "r": method.rank,
        "config_A_B": choice.A,
        "config_C": choice.C,
        "config_D_E": choice.E,
        "init_weights": True,
        "target_modules": shortest(adapter.layout.sites, (name for name, _ in backbone.module.named_modules())),
        "modules_to_save": None,
        **method.peft.fixed,
    }


def encode(adapter: Adapter, backbone: Backbone) -> dict[str, Tensor]:
    """Every tensor under PEFT's name, and the zeros that PEFT keeps where a module has nothing to train."""
    found: dict[str, Tensor] = {}
    for name, site in adapter.layout.sites.items():
        p, columns = adapter.values(name), _columns(adapter, name)
        for param, value in p.items():
            found[_key(f"{PREFIX}{name}", param)] = value[:, None] if param in columns else value
        for letter in OPTIONS.keys() - {param[0] for param in p}:
            found[f"{PREFIX}{name}.glora_{letter}.zeros"] = torch.zeros(_empty(letter, site), dtype=adapter.flat.dtype)
    return found


def _key(module: str, param: str) -> str:
    """PEFT's name of `Ad`, `Au` or `A`."""
    return f"{module}.glora_{param[0]}.X{param[1:]}"


def _columns(adapter: Adapter, name: str) -> set[str]:
    """The vectors of a site that PEFT stores with a second axis of one."""
    own = adapter.layout.methods[name]
    assert isinstance(own, GLoRA)
    choice = own.choice_at(adapter.layout.sites[name])
    return {letter for letter, option in zip("ABC", choice[:3], strict=True) if option == "vector"}


def _empty(letter: str, site: Site) -> tuple[int, ...]:
    """The shape of what PEFT keeps of a tensor that is not trained."""
    if letter == "C":
        return (site.in_features, 1)
    return site.shape if letter in "AB" else (site.out_features,)


def decode(adapter: Adapter, held: Tensors, backbone: Backbone, names: Collection[str]) -> None:
    """Fill an adapter's sites `names`. Raises FormatError for missing tensors, MismatchError for other shapes."""
    for name in names:
        columns = _columns(adapter, name)
        for param in adapter.layout.specs.get(name, {}):
            value = held.take(_key(name, param))
            put(adapter, name, {param: value[:, 0] if param in columns and value.ndim == 2 else value}, held.file)
        for letter in OPTIONS:
            zeros = f"{name}.glora_{letter}.zeros"
            if zeros in held and held.take(zeros).any():
                raise FormatError(f"{held.file} holds values other than zero in {zeros!r}, which nothing trains.")


def plan(method_class: type[Method], config: Mapping[str, Any], held: Tensors, backbone: Backbone) -> Layout:
    """The sites that a PEFT file adapts; at those without a bias C, D and E are `none`. Raises FormatError,
    MismatchError.
    """
    defaults = {"config_A_B": "lora", "config_C": "lora", "config_D_E": "constant"}
    both, C, bias = (str(config.get(field, default)) for field, default in defaults.items())
    whole = GLoRA(rank=config.get("r", 8), choice=",".join((both, both, C, bias, bias)))
    bare = whole.replace(choice=f"{both},{both},none,none,none")
    present = {key.partition(MARK)[0] for key in held if MARK in key}
    known = [n for n in present if n in backbone.sites and type(backbone.module_of(n)) is nn.Linear]
    foreign = sorted(present.difference(known))
    if foreign:
        raise MismatchError(f"{held.file} adapts {foreign[0]!r}, which is no linear layer of {backbone.name!r}.")
    missing = set(targeted(config, backbone, ("linear",), held.as_written)) - present
    if missing:
        raise FormatError(f"{held.file} lacks the tensors of {min(missing)!r}, which its settings select.")
    if not present:
        raise FormatError(f"{held.file} holds no GLORA tensors.")
    sites = {name: site for name, site in backbone.sites.items() if name in present}
    picked: dict[str, tuple[Site, Method]] = {n: (s, whole if s.bias else bare) for n, s in sites.items()}
    return Layout(whole if any(site.bias for site in sites.values()) else bare, picked)
