"""LoRA, DoRA and PiSSA as PEFT's LORA type, in both directions.

In: an adapter, or a PEFT config with its tensors. Out: tensors and settings whose maths PEFT reproduces on the
original base, or a layout and its values. PiSSA is written as the plain LoRA `[B, −B₀] [A; A₀]` of rank 2r, so PEFT
needs no residual base. Refuses to know files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.layout import Layout
from lorica.adapters.peft_config import pattern_value, targeted
from lorica.adapters.peft_keys import PREFIX, Tensors, shortest
from lorica.core.errors import FormatError, MismatchError
from lorica.core.site import Site
from lorica.methods.base import Method
from lorica.methods.lora import LoRA
from lorica.methods.pissa import PiSSA
from lorica.models.backbone import Backbone

LoRALike = LoRA | PiSSA


def why_not(adapter: Adapter, backbone: Backbone) -> str | None:
    """Why PEFT's LORA type cannot hold an adapter, or None."""
    methods = list(adapter.layout.methods.values())
    if any(type(m) is not type(adapter.method) for m in methods) or len({m.rslora for m in _like(methods)}) > 1:
        return "its sites have different methods"
    experts: dict[str, set[tuple[int, float]]] = {}
    for name, site in adapter.layout.sites.items():
        method = adapter.layout.methods[name]
        assert isinstance(method, LoRALike)
        if site.kind == "expert":
            if "m" in adapter.layout.specs[name] or "bias" in adapter.layout.specs[name]:
                return "PEFT has neither DoRA nor a bias for fused experts"
            experts.setdefault(_stacked(site), set()).add((method.rank, method.alpha))
        elif site.kind == "conv":
            module: Any = backbone.module_of(name)
            if module.padding_mode != "zeros" or any(step != 1 for step in module.dilation):
                return "PEFT drops the dilation and the padding mode of a convolution"
            if module.groups > 1 and "m" in adapter.layout.specs[name]:
                return "PEFT has no DoRA for grouped convolutions"
    if any(len(sizes) > 1 for sizes in experts.values()):
        return "PEFT needs one rank for all experts of a tensor"
    return None


def _like(methods: list[Method]) -> list[LoRALike]:
    return [m for m in methods if isinstance(m, LoRALike)]


def _stacked(site: Site) -> str:
    """The name of the tensor that an expert's site is a slice of: `model.layers.0.mlp.experts.down_proj`."""
    return f"{_experts_module(site)}.{site.role}"


def _experts_module(site: Site) -> str:
    return site.name.removesuffix(f".{site.expert}.{site.role}")


# -- writing -------------------------------------------------------------------------------------------------------


def settings(adapter: Adapter, backbone: Backbone) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that describe an adapter."""
    method = adapter.method
    assert isinstance(method, LoRALike)
    rank, alpha = _size(method, 1)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, site in adapter.layout.sites.items():
        own = adapter.layout.methods[name]
        assert isinstance(own, LoRALike)
        groups = backbone.module_of(name).groups if site.kind == "conv" else 1
        own_rank, own_alpha = _size(own, int(groups))  # type: ignore[arg-type]
        key = "^" + re.escape(_stacked(site) if site.kind == "expert" else name)
        if own_rank != rank:
            ranks[key] = own_rank
        if own_alpha != alpha:
            alphas[key] = own_alpha
    sites = adapter.layout.sites.values()
    stacked = sorted({_stacked(site) for site in sites if site.kind == "expert"})
    plain = [site.name for site in sites if site.kind != "expert"]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": method.rslora,
        "use_dora": any("m" in owned for owned in adapter.layout.specs.values()),
        "lora_bias": _has_bias(adapter),
        # PEFT refuses dropout at fused experts; after training it changes nothing
        "lora_dropout": 0.0 if stacked else getattr(method, "dropout", 0.0),
        "bias": "none",
        "init_lora_weights": True,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": shortest(plain, (n for n, _ in backbone.module.named_modules())) if plain else [],
        "target_parameters": stacked or None,
        "fan_in_fan_out": any(site.kind == "linear" and site.transposed for site in sites),
        "modules_to_save": None,
    }


def _size(method: LoRALike, groups: int) -> tuple[int, float]:
    """PEFT's rank and alpha: doubled for a counter-term, and once for each group of a convolution."""
    times = groups * (2 if isinstance(method, PiSSA) else 1)
    alpha = method.alpha * (math.sqrt(times) if method.rslora else times)
    return method.rank * times, int(alpha) if float(alpha).is_integer() else alpha


def _has_bias(adapter: Adapter) -> bool:
    return any("bias" in owned for owned in adapter.layout.specs.values())


def encode(adapter: Adapter, backbone: Backbone) -> dict[str, Tensor]:
    """Every tensor under PEFT's name."""
    found: dict[str, Tensor] = {}
    experts: dict[str, list[Site]] = {}
    for name, site in adapter.layout.sites.items():
        if site.kind == "expert":
            experts.setdefault(_stacked(site), []).append(site)
            continue
        p = adapter.values(name)
        A, B = _factors(p)
        if site.kind == "embedding":
            found |= {f"{name}.lora_embedding_A": A, f"{name}.lora_embedding_B": B}
        elif site.kind == "conv":
            module: Any = backbone.module_of(name)
            found[f"{name}.lora_A.weight"] = _spread(A, module.groups)
            found[f"{name}.lora_B.weight"] = B.view(*B.shape, *(1,) * len(site.shape[2:]))
        else:
            found |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        if "m" in p:
            found[f"{name}.lora_magnitude_vector"] = p["m"].view(_magnitude(site))
        if _has_bias(adapter):
            found[f"{name}.lora_B.bias"] = p.get("bias", torch.zeros(site.out_features, dtype=B.dtype))
    for members in experts.values():
        found |= _encode_experts(adapter, backbone, members)
    return {PREFIX + key: tensor for key, tensor in found.items()}


def _factors(p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B, with a counter-term appended."""
    if "A0" in p:
        return torch.cat([p["A"], p["A0"]]), torch.cat([p["B"], -p["B0"]], dim=1)
    return p["A"], p["B"]


def _magnitude(site: Site) -> tuple[int, ...]:
    return (1, site.shape[0], *(1,) * len(site.shape[2:])) if site.kind == "conv" else (site.shape[0],)


def _spread(A: Tensor, groups: int) -> Tensor:
    """[r, in / groups, …] → [groups · r, in, …]: PEFT's A sees all channels, ours those of each output's group."""
    if groups == 1:
        return A
    out = A.new_zeros(groups, A.shape[0], groups, *A.shape[1:])
    for group in range(groups):
        out[group, :, group] = A
    return out.view(groups * A.shape[0], groups * A.shape[1], *A.shape[2:])


def _wrapper(backbone: Backbone, module: str, parameters: list[str], parameter: str) -> str:
    """PEFT wraps once for each targeted parameter, in the module's order; the innermost has the longest name."""
    order = [p for p in backbone.module.get_submodule(module)._parameters if p in parameters]
    return module + ".base_layer" * (len(order) - 1 - order.index(parameter))


def _encode_experts(adapter: Adapter, backbone: Backbone, members: list[Site]) -> dict[str, Tensor]:
    """A as [experts · r, in], B as [out, r · experts], the expert fastest; experts that are not adapted are zero."""
    first = members[0]
    module = _experts_module(first)
    parameters = [
        s.role for s in adapter.layout.sites.values() if s.expert is not None and _experts_module(s) == module
    ]
    count = len(getattr(backbone.module_of(first.name), first.role))
    A, B = _factors(adapter.values(first.name))
    A_ERI, B_ORE = A.new_zeros(count, *A.shape), B.new_zeros(*B.shape, count)
    for site in members:
        assert site.expert is not None
        A_ERI[site.expert], B_ORE[:, :, site.expert] = _factors(adapter.values(site.name))
    where = _wrapper(backbone, module, parameters, first.role)
    return {f"{where}.lora_A.weight": A_ERI.flatten(0, 1), f"{where}.lora_B.weight": B_ORE.flatten(1)}


# -- reading -------------------------------------------------------------------------------------------------------


def decode(adapter: Adapter, held: Tensors, backbone: Backbone) -> None:
    """Fill an adapter whose layout is known. Raises FormatError for missing tensors, MismatchError for other shapes."""
    stacked: dict[str, tuple[Tensor, Tensor]] = {}
    for name, site in adapter.layout.sites.items():
        if not isinstance(adapter.layout.methods[name], LoRALike):
            continue  # a whole bias or module beside the factors
        specs = adapter.layout.specs[name]
        A, B = _read_expert(adapter, held, backbone, site, stacked) if site.kind == "expert" else _read(held, site)
        rank = specs["A"].shape[0]
        if site.kind == "conv":
            module: Any = backbone.module_of(name)
            A, B = _gather(A, module.groups, name, held.file), B.flatten(1)
        if "A0" in specs and f"{name}.A0" not in held:
            values = {"A": A[:rank], "A0": A[rank:], "B": B[:, :rank], "B0": -B[:, rank:]}
        else:
            values = {"A": A, "B": B}
        if "m" in specs:
            values["m"] = held.take(f"{name}.lora_magnitude_vector").flatten()
        if f"{name}.lora_B.bias" in held or ("bias" in specs and getattr(adapter.method, "lora_bias", False)):
            bias = held.take(f"{name}.lora_B.bias")
            if "bias" in specs:
                values["bias"] = bias
            elif bias.any():
                raise FormatError(f"{held.file} holds a bias for {name!r}, which has none.")
        put(adapter, name, values, held.file)


def put(adapter: Adapter, site: str, values: Mapping[str, Tensor], file: object) -> None:
    """Set tensors whose shapes must be those of the site. Raises MismatchError."""
    for param, value in values.items():
        shape = adapter.layout.specs[site][param].shape
        if tuple(value.shape) != shape:
            where = f"site {site!r}" if site else "the whole adapter"
            raise MismatchError(
                f"{file} holds {param!r} of {where} with shape {list(value.shape)}; this backbone and these settings "
                f"need {list(shape)}."
            )
        adapter.set(site, param, value)


def _read(held: Tensors, site: Site) -> tuple[Tensor, Tensor]:
    if site.kind == "embedding":
        return held.take(f"{site.name}.lora_embedding_A"), held.take(f"{site.name}.lora_embedding_B")
    return held.take(f"{site.name}.lora_A.weight"), held.take(f"{site.name}.lora_B.weight")


def _gather(A: Tensor, groups: int, name: str, file: object) -> Tensor:
    """The reverse of `_spread`. Raises MismatchError when A reaches over groups, which a grouped update cannot."""
    if groups == 1 or A.shape[0] % groups or A.shape[1] % groups:
        return A
    own = A[: A.shape[0] // groups, : A.shape[1] // groups]
    if not torch.equal(_spread(own, groups), A):
        raise MismatchError(
            f"{file} lets groups of the convolution {name!r} see each other's channels, as PEFT does; Lorica's update "
            "of a grouped convolution stays within the groups."
        )
    return own


def _read_expert(
    adapter: Adapter, held: Tensors, backbone: Backbone, site: Site, stacked: dict[str, tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """One expert's factors, cut from the stacked tensors."""
    assert site.expert is not None
    count = len(getattr(backbone.module_of(site.name), site.role))
    key = _stacked(site)
    if key not in stacked:
        module = _experts_module(site)
        parameters = [
            s.role for s in adapter.layout.sites.values() if s.expert is not None and _experts_module(s) == module
        ]
        where = _wrapper(backbone, module, parameters, site.role)
        A, B = held.take(f"{where}.lora_A.weight"), held.take(f"{where}.lora_B.weight")
        if A.shape[0] % count or B.shape[1] % count:
            raise MismatchError(f"{held.file} holds factors of {key!r} that do not divide among its {count} experts.")
        stacked[key] = A.view(count, -1, A.shape[1]), B.view(B.shape[0], -1, count)
    A_ERI, B_ORE = stacked[key]
    return A_ERI[site.expert], B_ORE[:, :, site.expert]


def plan(method_class: type[Method], config: Mapping[str, Any], held: Tensors, backbone: Backbone) -> Layout:
    """The sites that a PEFT file adapts, each with its rank and alpha. Raises FormatError, MismatchError."""
    base = {
        "rank": config.get("r", 8),
        "alpha": config.get("lora_alpha", 8),
        "rslora": bool(config.get("use_rslora")),
    }
    if issubclass(method_class, LoRA):
        base |= {"dropout": config.get("lora_dropout", 0.0), "lora_bias": bool(config.get("lora_bias"))}
    method = method_class(**base)
    ranks = _ranks(config, held, backbone)
    missing = [name for name in targeted(config, backbone, method.kinds) if name not in ranks]
    if missing:
        raise FormatError(f"{held.file} lacks the tensors of {missing[0]!r}, which its target_modules select.")
    picked: dict[str, tuple[Site, Method]] = {}
    for name, site in backbone.sites.items():
        if name not in ranks:
            continue
        key = _stacked(site) if site.kind == "expert" else name
        told, groups = pattern_value(config.get("rank_pattern"), key, base["rank"]), 1
        if site.kind == "conv":
            module: Any = backbone.module_of(name)
            groups = module.groups
            if module.padding_mode != "zeros" or any(step != 1 for step in module.dilation):
                raise MismatchError(f"PEFT drops the dilation and padding mode of {name!r}; Lorica keeps them.")
        if told != ranks[name]:
            raise FormatError(f"{held.file} has rank {ranks[name]} at {key!r}, where its settings say {told}.")
        alpha = pattern_value(config.get("alpha_pattern"), key, base["alpha"])
        rslora = base["rslora"]
        changes = {"rank": told // groups, "alpha": alpha / (math.sqrt(groups) if rslora else groups)}
        if base.get("lora_bias") and site.kind == "expert":
            changes["lora_bias"] = False
        picked[name] = (site, method.replace(**changes))
    if not picked:
        raise FormatError(f"{held.file} holds no LoRA factors.")
    return Layout(method, picked)


def _ranks(config: Mapping[str, Any], held: Tensors, backbone: Backbone) -> dict[str, int]:
    """The rank at every site that the file has factors for. Raises MismatchError for modules that are no sites."""
    found: dict[str, int] = {}
    experts = {_experts_module(s): s for s in backbone.sites.values() if s.expert is not None}
    for key in held:
        module, _, suffix = (
            key.partition(".lora_A.weight") if ".lora_A.weight" in key else key.partition(".lora_embedding_A")
        )
        if suffix or module == key:
            continue
        outer = module.split(".base_layer")[0]
        if outer in experts:
            found |= _expert_ranks(config, backbone, outer, module.count(".base_layer"), held.peek(key))
        elif module not in backbone.sites:
            raise MismatchError(f"{held.file} adapts {module!r}, which is no site of {backbone.name!r}.")
        else:
            found[module] = held.peek(key).shape[0]
    return found


def _expert_ranks(config: Mapping[str, Any], backbone: Backbone, module: str, depth: int, A: Tensor) -> dict[str, int]:
    """The rank at each slice of the parameter that PEFT wrapped `depth` levels below the outermost."""
    wanted = config.get("target_parameters") or []
    names = list(backbone.module.get_submodule(module)._parameters)
    order = [p for p in names if any(f".{module}.{p}".endswith(f".{entry}") for entry in wanted)]
    if depth >= len(order):
        raise FormatError(f"The factors of {module!r} fit no entry of target_parameters {list(wanted)}.")
    role = order[len(order) - 1 - depth]
    sites = [s.name for s in backbone.sites.values() if s.expert is not None and _stacked(s) == f"{module}.{role}"]
    if not sites or A.shape[0] % len(sites):
        raise MismatchError(f"The factors of {module}.{role} do not divide among {len(sites)} experts.")
    return dict.fromkeys(sites, A.shape[0] // len(sites))
