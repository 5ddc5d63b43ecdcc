"""LoRA, DoRA and LoRA with counter-terms as PEFT's LORA type, in both directions.

In: an adapter, or a PEFT config with its tensors. Out: tensors and settings whose maths PEFT reproduces on the
original base, or a layout and its values. PiSSA and MiLoRA are the plain LoRA `[B, −B₀] [A; A₀]` of rank 2r there, so
PEFT needs no residual base. Refuses to know files, and how fused experts are stacked (`peft_experts`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.layout import Layout
from lorica.adapters.peft_config import alpha_of, check_rank, targeted, written_name
from lorica.adapters.peft_experts import StackedFactors, expert_ranks, join_experts, write_experts
from lorica.adapters.peft_keys import PREFIX, Tensors, experts_module, parameter_of, shortest, stacked
from lorica.core.errors import FormatError, MismatchError
from lorica.core.site import Site
from lorica.methods.base import Method
from lorica.methods.loftq import LoftQ
from lorica.methods.lora import LoRA
from lorica.methods.pissa import CounterTerm
from lorica.models.backbone import Backbone

LoRALike = LoRA | CounterTerm | LoftQ


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
            if "m" in adapter.layout.specs[name] or _has_bias(adapter):
                return "PEFT has neither DoRA nor a bias for fused experts"
            experts.setdefault(stacked(site), set()).add((method.rank, method.alpha))
        elif site.router and ("m" in adapter.layout.specs[name] or _has_bias(adapter)):
            return "PEFT has neither DoRA nor a bias for routers"
        elif site.kind == "embedding" and _has_bias(adapter):
            return "PEFT has no `lora_bias` beside an embedding"
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
        key = "^" + re.escape(parameter_of(site) or name)
        if own_rank != rank:
            ranks[key] = own_rank
        if own_alpha != alpha:
            alphas[key] = own_alpha
    sites = adapter.layout.sites.values()
    parameters = sorted({entry for site in sites if (entry := parameter_of(site)) is not None})
    plain = [site.name for site in sites if parameter_of(site) is None]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": method.rslora,
        "use_dora": any("m" in owned for owned in adapter.layout.specs.values()),
        "lora_bias": _has_bias(adapter),
        # PEFT refuses dropout at bare parameters; after training it changes nothing
        "lora_dropout": 0.0 if parameters else getattr(method, "dropout", 0.0),
        "bias": "none",
        "init_lora_weights": True,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": shortest(plain, (n for n, _ in backbone.module.named_modules())) if plain else [],
        "target_parameters": parameters or None,
        "fan_in_fan_out": any(site.kind == "linear" and site.transposed for site in sites),
        "modules_to_save": None,
    }


def _size(method: LoRALike, groups: int) -> tuple[int, float]:
    """PEFT's rank and alpha: doubled for a counter-term, and once for each group of a convolution."""
    times = groups * (2 if isinstance(method, CounterTerm) and method.split else 1)
    alpha = method.alpha * (math.sqrt(times) if method.rslora else times)
    return method.rank * times, int(alpha) if float(alpha).is_integer() else alpha


def _has_bias(adapter: Adapter) -> bool:
    return any("bias" in owned for owned in adapter.layout.specs.values())


def encode(adapter: Adapter, backbone: Backbone) -> dict[str, Tensor]:
    """Every tensor under PEFT's name."""
    found: dict[str, Tensor] = {}
    experts: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name, site in adapter.layout.sites.items():
        p = adapter.values(name)
        A, B = _factors(p)
        if site.kind == "expert":
            experts.setdefault(stacked(site), {})[name] = A, B
            continue
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
    named = {PREFIX + key: tensor for key, tensor in found.items()}
    for members in experts.values():
        named |= write_experts(adapter, backbone, members)
    return named


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


# -- reading -------------------------------------------------------------------------------------------------------


def decode(adapter: Adapter, held: Tensors, backbone: Backbone, names: Collection[str]) -> None:
    """Fill an adapter's sites `names`. Raises FormatError for missing tensors, MismatchError for other shapes."""
    experts = StackedFactors(adapter, held, backbone)
    for name in names:
        site, specs = adapter.layout.sites[name], adapter.layout.specs[name]
        A, B = experts.of(site) if site.kind == "expert" else _read(held, site)
        rank = specs["A"].shape[0]
        if site.kind == "conv":
            module: Any = backbone.module_of(name)
            A, B = _gather(A, module.groups, name, held.file), B.flatten(1)
        if "A0" in specs and A.shape[0] == 2 * rank:  # PEFT's own PiSSA has the factors alone
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
    joined = join_experts(config, held, backbone)
    ranks = _ranks(config, held, backbone)
    missing = [name for name in targeted(config, backbone, method.kinds, held.as_written) if name not in ranks]
    if missing:
        raise FormatError(f"{held.file} lacks the tensors of {missing[0]!r}, which its settings select.")
    picked: dict[str, tuple[Site, Method]] = {}
    for name, site in backbone.sites.items():
        if name not in ranks:
            continue
        key, rank = written_name(site, held.as_written), ranks[name]
        if name in joined:
            alpha = joined[name] * (math.sqrt(rank) if base["rslora"] else rank)
        else:
            check_rank(config, key, rank, held.file)
            alpha = alpha_of(config, key, held.file)
        groups = _groups(backbone, site, held.file)
        changes = {"rank": rank // groups, "alpha": alpha / (math.sqrt(groups) if base["rslora"] else groups)}
        if base.get("lora_bias") and site.kind == "expert":
            changes["lora_bias"] = False
        picked[name] = (site, method.replace(**changes))
    if not picked:
        raise FormatError(f"{held.file} holds no LoRA factors.")
    return Layout(method, picked)


def _groups(backbone: Backbone, site: Site, file: object) -> int:
    """Groups of a convolution, 1 elsewhere. Raises MismatchError for a geometry that PEFT's factors do not have."""
    if site.kind != "conv":
        return 1
    module: Any = backbone.module_of(site.name)
    if module.padding_mode != "zeros" or any(step != 1 for step in module.dilation):
        raise MismatchError(
            f"{file} adapts {site.name!r}, whose dilation and padding mode PEFT drops and Lorica keeps."
        )
    return int(module.groups)


def _ranks(config: Mapping[str, Any], held: Tensors, backbone: Backbone) -> dict[str, int]:
    """The rank at every site that the file has factors for. Raises MismatchError for modules that are no sites."""
    found: dict[str, int] = {}
    experts = {experts_module(s) for s in backbone.sites.values() if s.expert is not None}
    for key in held:
        module, _, suffix = (
            key.partition(".lora_A.weight") if ".lora_A.weight" in key else key.partition(".lora_embedding_A")
        )
        if suffix or module == key:
            continue
        outer = module.split(".base_layer")[0]
        if outer in experts:
            found |= expert_ranks(config, held, backbone, key)
        elif module not in backbone.sites:
            raise MismatchError(f"{held.file} adapts {module!r}, which is no site of {backbone.name!r}.")
        else:
            found[module] = held.peek(key).shape[0]
    return found
