"""VeRA, IA³, norm tuning and MiSS in PEFT's layout, in both directions.

In: an adapter, or a PEFT config with its tensors. Out: tensors and settings, or a layout and its values. PEFT stores
a norm's new weight, so Lorica's difference to the old one travels beside it and comes back bit for bit. Refuses to
know files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.layout import GLOBAL, Layout
from lorica.adapters.peft_config import targeted
from lorica.adapters.peft_keys import PREFIX, Tensors, is_named, own_key, shortest
from lorica.adapters.peft_lora import put
from lorica.core.errors import FormatError, MismatchError
from lorica.core.site import Site
from lorica.methods.base import Method
from lorica.methods.ia3 import IA3
from lorica.methods.miss import MiSS
from lorica.methods.vera import VeRA
from lorica.models.backbone import Backbone

MARKS = {"VERA": "vera_lambda_d", "IA3": "ia3_l", "LN_TUNING": "ln_tuning_layers.weight", "MISS": "miss_block"}
"""The tensor that every adapted site has."""


def why_not(adapter: Adapter, backbone: Backbone) -> str | None:
    """Why the PEFT type cannot hold an adapter, or None."""
    for name, site in adapter.layout.sites.items():
        if type(adapter.layout.methods[name]) is not type(adapter.method):
            return "its sites have different methods"
        if site.kind == "expert":
            return "PEFT adapts fused experts with LoRA only"
        if site.router:
            return "PEFT adapts routers with LoRA only"
        if isinstance(adapter.method, IA3) and site.kind == "conv" and len(site.shape) == 3:
            return "PEFT has no IA³ for Conv1d"
        if isinstance(adapter.method, MiSS):
            if adapter.layout.methods[name] != adapter.method:
                return "PEFT has one rank for all sites of a MiSS adapter"
            if site.transposed:
                return "PEFT has no MiSS for Conv1D"
    return None


def settings(adapter: Adapter, backbone: Backbone) -> dict[str, Any]:
    """The fields of PEFT's config that describe an adapter."""
    method, sites = adapter.method, adapter.layout.sites
    assert method.peft is not None
    modules = [name for name, _ in backbone.module.named_modules()]
    found: dict[str, Any] = {
        "peft_type": method.peft.peft_type,
        "target_modules": shortest(sites, modules),
        "modules_to_save": None,
        **method.peft.fixed,
    }
    if isinstance(method, VeRA):
        found |= {theirs: getattr(method, ours) for theirs, ours in method.peft.fields.items()} | {"bias": "none"}
    if isinstance(method, MiSS):
        found |= {theirs: getattr(method, ours) for theirs, ours in method.peft.fields.items()}
        found |= {"init_weights": True if method.form == "full" else method.form, "mini_r": method.mini_rank or 1}
    if not isinstance(method, VeRA | IA3):
        return found
    found["fan_in_fan_out"] = any(site.transposed for site in sites.values())
    if isinstance(method, IA3):
        inner = [name for name, site in sites.items() if method.is_feedforward(site)]
        short = shortest(inner, modules)
        # PEFT asks that the one list is part of the other
        if isinstance(short, list) and not (
            isinstance(found["target_modules"], list) and set(short) <= set(found["target_modules"])
        ):
            found["target_modules"], short = sorted(sites), sorted(inner)
        found["feedforward_modules"] = short if inner else []
    return found


def encode(adapter: Adapter, backbone: Backbone) -> dict[str, Tensor]:
    """Every tensor under PEFT's name, and a norm's difference under ours."""
    found: dict[str, Tensor] = {}
    for name, site in adapter.layout.sites.items():
        p = adapter.values(name)
        where = f"{PREFIX}{name}."
        if isinstance(adapter.method, VeRA):
            found |= {f"{where}vera_lambda_d": p["d"], f"{where}vera_lambda_b": p["b"]}
        elif isinstance(adapter.method, IA3):
            found[f"{where}ia3_l"] = p["l"].view(_scale_shape(site, adapter.layout.methods[name]))
        elif isinstance(adapter.method, MiSS):
            found[f"{where}miss_block"] = p["M"]
        else:
            found |= {own_key(name, param): value for param, value in p.items()}
            found[f"{where}ln_tuning_layers.weight"] = _sum(backbone.weight(name).matrix(), p["weight"])
            if "bias" in p:
                found[f"{where}ln_tuning_layers.bias"] = _sum(backbone.bias(name), p["bias"])
    if isinstance(adapter.method, VeRA):
        shared = adapter.values(GLOBAL)
        found |= {"base_model.vera_A": shared["A"], "base_model.vera_B": shared["B"]}
    return found


def _sum(old: Tensor | None, change: Tensor) -> Tensor:
    assert old is not None
    return old.to(change) + change


def _scale_shape(site: Site, method: Method) -> tuple[int, ...]:
    assert isinstance(method, IA3)
    if site.kind == "conv":
        return (1, -1, *(1,) * len(site.shape[2:]))
    return (1, -1) if method.is_feedforward(site) else (-1, 1)


def decode(adapter: Adapter, held: Tensors, backbone: Backbone, names: Collection[str]) -> None:
    """Fill an adapter's sites `names`. Raises FormatError for missing tensors, MismatchError for other shapes."""
    if isinstance(adapter.method, VeRA):
        _decode_projections(adapter, held)
    for name in names:
        if isinstance(adapter.method, VeRA):
            values = {"d": held.take(f"{name}.vera_lambda_d"), "b": held.take(f"{name}.vera_lambda_b")}
            put(adapter, name, values, held.file)
        elif isinstance(adapter.method, IA3):
            put(adapter, name, {"l": held.take(f"{name}.ia3_l").flatten()}, held.file)
        elif isinstance(adapter.method, MiSS):
            put(adapter, name, {"M": held.take(f"{name}.miss_block")}, held.file)
        else:
            for param in adapter.layout.specs[name]:
                stored = held.take(f"{name}.ln_tuning_layers.{param}")
                old = backbone.weight(name).matrix() if param == "weight" else backbone.bias(name)
                assert old is not None
                if stored.shape != old.shape:
                    put(adapter, name, {param: stored}, held.file)
                exact = own_key(name, param)
                change = held.take(exact) if exact in held else stored.to(adapter.flat) - old.to(adapter.flat)
                put(adapter, name, {param: change}, held.file)


def _decode_projections(adapter: Adapter, held: Tensors) -> None:
    if "vera_A" in held or "vera_B" in held:
        values = {"A": held.take("vera_A"), "B": held.take("vera_B")}
    else:
        values = adapter.method.init_global(adapter.layout.own_sites(), adapter.rng(GLOBAL))
    put(adapter, GLOBAL, values, held.file)


def plan(method_class: type[Method], config: Mapping[str, Any], held: Tensors, backbone: Backbone) -> Layout:
    """The sites that a PEFT file adapts. Raises FormatError, MismatchError."""
    assert method_class.peft is not None
    mark = "." + MARKS[method_class.peft.peft_type]
    present = [key.removesuffix(mark) for key in held if key.endswith(mark)]
    method = _method(method_class, config, present, held)
    foreign = [name for name in present if name not in backbone.sites]
    if foreign:
        raise MismatchError(f"{held.file} adapts {foreign[0]!r}, which is no site of {backbone.name!r}.")
    missing = set(targeted(config, backbone, method.kinds, held.as_written)) - set(present)
    if missing:
        raise FormatError(f"{held.file} lacks the tensors of {min(missing)!r}, which its settings select.")
    if method_class is VeRA and config.get("save_projection", True) and "vera_A" not in held:
        raise FormatError(f"{held.file} lacks 'base_model.vera_A', which save_projection promises.")
    if not present:
        raise FormatError(f"{held.file} holds no {method_class.peft.peft_type} tensors.")
    # PEFT tunes whatever it is told to as a norm; whole weights of other kinds are dense differences (`peft_extras`)
    return Layout(
        method, {n: (s, method) for n, s in backbone.sites.items() if n in present and s.kind in method.kinds}
    )


def _method(method_class: type[Method], config: Mapping[str, Any], present: list[str], held: Tensors) -> Method:
    assert method_class.peft is not None
    if method_class is IA3:
        inner = config.get("feedforward_modules") or ()
        return IA3(feedforward=tuple(name for name in present if is_named(held.as_written(name), inner)))
    fields = method_class.peft.fields
    values = {ours: config[theirs] for theirs, ours in fields.items() if config.get(theirs) is not None}
    if method_class is MiSS:
        # the form hides in the name of its initial values; everything but these two names is the full one
        form = config.get("init_weights") if config.get("init_weights") in ("mini", "bat") else "full"
        values |= {"form": form, "mini_rank": config.get("mini_r", 1) if form == "mini" else None}
        if form == "bat":
            values["dropout"] = 0.0  # PEFT computes none there
    return method_class(**values)
