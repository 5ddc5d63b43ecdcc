"""Fused experts in PEFT's LORA type: stacked factors both ways, and the separate experts of transformers 4.

In: an adapter's factors of one expert tensor, or what a file holds for it. Out: the stacked tensors, or one pair of
factors for each expert. PEFT keeps A as [experts · r, in] and B as [out, r · experts], the expert fastest, and does
not say in a name which tensor they belong to: its wrappers nest in the order of the module's parameters. Refuses to
know configs of methods.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.peft_config import alpha_of, check_rank
from lorica.adapters.peft_keys import PREFIX, Tensors, experts_module, is_named, stacked
from lorica.core.errors import FormatError, MismatchError
from lorica.core.site import Site
from lorica.models.backbone import Backbone

_SEPARATE = re.compile(r"(?P<module>.+)\.(?P<expert>\d+)\.(?P<role>gate_proj|up_proj|down_proj|w1|w2|w3)")
"""A linear of one expert in transformers 4; w1, w2, w3 are Mixtral's gate, down and up."""
_ROLES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def _wrapper(adapter: Adapter, backbone: Backbone, site: Site) -> str:
    """PEFT wraps once for each targeted parameter, in the module's order; the innermost has the longest name."""
    module = experts_module(site)
    roles = {s.role for s in adapter.layout.sites.values() if s.expert is not None and experts_module(s) == module}
    order = [p for p in backbone.module.get_submodule(module)._parameters if p in roles]
    return module + ".base_layer" * (len(order) - 1 - order.index(site.role))


def _swapped(backbone: Backbone, site: Site) -> bool:
    """Whether PEFT takes the rows of an expert's weight for its columns: it believes `is_transposed` alone (Llama-4
    stores [experts, in, out] and does not say so), and then A has our B's place.
    """
    return site.transposed and getattr(backbone.module_of(site.name), "is_transposed", False) is not True


def write_experts(
    adapter: Adapter, backbone: Backbone, factors: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The stacked tensors of one parameter from its experts' factors by site; experts that are not adapted are zero."""
    sites = [adapter.layout.sites[name] for name in factors]
    if _swapped(backbone, sites[0]):
        factors = {name: (B.T, A.T) for name, (A, B) in factors.items()}
    A, B = factors[sites[0].name]
    count = len(getattr(backbone.module_of(sites[0].name), sites[0].role))
    A_ERI, B_ORE = A.new_zeros(count, *A.shape), B.new_zeros(*B.shape, count)
    for site in sites:
        assert site.expert is not None
        A_ERI[site.expert], B_ORE[:, :, site.expert] = factors[site.name]
    where = PREFIX + _wrapper(adapter, backbone, sites[0])
    return {f"{where}.lora_A.weight": A_ERI.flatten(0, 1), f"{where}.lora_B.weight": B_ORE.flatten(1)}


class StackedFactors:
    """What a file holds for fused experts, cut into one pair of factors for each. A stacked tensor is taken once."""

    def __init__(self, adapter: Adapter, held: Tensors, backbone: Backbone) -> None:
        self._adapter, self._held, self._backbone = adapter, held, backbone
        self._taken: dict[str, tuple[Tensor, Tensor]] = {}

    def of(self, site: Site) -> tuple[Tensor, Tensor]:
        """A and B of one expert. Raises FormatError when they are missing, MismatchError when they do not divide."""
        assert site.expert is not None
        if f"{site.name}.lora_A.weight" in self._held:  # `join_experts` made it
            return self._held.take(f"{site.name}.lora_A.weight"), self._held.take(f"{site.name}.lora_B.weight")
        key = stacked(site)
        if key not in self._taken:
            count = len(getattr(self._backbone.module_of(site.name), site.role))
            where = _wrapper(self._adapter, self._backbone, site)
            A, B = self._held.take(f"{where}.lora_A.weight"), self._held.take(f"{where}.lora_B.weight")
            if A.shape[0] % count or B.shape[1] % count:
                raise MismatchError(
                    f"{self._held.file} holds factors of {key!r} that do not divide among its {count} experts."
                )
            self._taken[key] = A.view(count, -1, A.shape[1]), B.view(B.shape[0], -1, count)
        A_ERI, B_ORE = self._taken[key]
        A, B = A_ERI[site.expert], B_ORE[:, :, site.expert]
        return (B.T, A.T) if _swapped(self._backbone, site) else (A, B)


def expert_ranks(config: Mapping[str, Any], held: Tensors, backbone: Backbone, key: str) -> dict[str, int]:
    """The rank at each slice of the parameter whose stacked A is called `key`. Raises FormatError, MismatchError.

    PEFT wrapped it as many levels below the outermost parameter as the name has `base_layer`.
    """
    module, depth = key.removesuffix(".lora_A.weight").split(".base_layer")[0], key.count(".base_layer")
    A, wanted = held.peek(key), config.get("target_parameters") or []
    names, written = backbone.module.get_submodule(module)._parameters, held.as_written(module)
    order = [p for p in names if is_named(f"{written}.{p}", wanted)]
    if depth >= len(order):
        raise FormatError(
            f"{held.file} has factors of {module!r} that fit no entry of target_parameters {list(wanted)}."
        )
    role = order[len(order) - 1 - depth]
    sites = [s.name for s in backbone.sites.values() if s.expert is not None and stacked(s) == f"{module}.{role}"]
    if not sites or A.shape[0] % len(sites):
        raise MismatchError(
            f"{held.file} has factors of {module}.{role} that do not divide among {len(sites)} experts."
        )
    return dict.fromkeys(sites, A.shape[0] // len(sites))


# -- files of transformers 4, where each expert had linears of its own -------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """The factors of one linear, and the scale of their product."""

    A: Tensor
    B: Tensor
    m: Tensor | None
    scale: float


def join_experts(config: Mapping[str, Any], held: Tensors, backbone: Backbone) -> dict[str, float]:
    """Put the factors of separate gate, up and down maps in place as those of the fused tensors.

    Rows of the fused map are gate's and then up's, so `A = [A_gate; A_up]` and B is block-diagonal. Gives the
    scale of their product by site. Raises FormatError, MismatchError.
    """
    fused = {experts_module(s) for s in backbone.sites.values() if s.expert is not None and not s.transposed}
    found: dict[str, dict[str, _Part]] = {}
    for key in [key for key in held if key.endswith(".lora_A.weight")] if fused else ():
        name = key.removesuffix(".lora_A.weight")
        match = _SEPARATE.fullmatch(name)
        if match is None:
            continue
        module = held.resolve(match["module"].replace(".block_sparse_moe.", ".mlp."))
        if module in fused:
            role = _ROLES.get(match["role"], match["role"])
            site = f"{module}.{match['expert']}.{'down_proj' if role == 'down_proj' else 'gate_up_proj'}"
            if site not in backbone.sites:
                raise MismatchError(f"{held.file} adapts {name!r}, which {backbone.name!r} does not have.")
            found.setdefault(site, {})[role] = _part(config, held, name)
    return {site: _join(parts, backbone.sites[site], held) for site, parts in found.items()}


def _part(config: Mapping[str, Any], held: Tensors, name: str) -> _Part:
    A, B = held.take(f"{name}.lora_A.weight"), held.take(f"{name}.lora_B.weight")
    written = held.as_written(name)
    rank, alpha = A.shape[0], alpha_of(config, written, held.file)
    check_rank(config, written, rank, held.file)
    m = held.take(f"{name}.lora_magnitude_vector") if config.get("use_dora") else None
    return _Part(A, B, m, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _join(parts: Mapping[str, _Part], site: Site, held: Tensors) -> float:
    """Put the factors of one fused site in place, and give their scale; a map that is not adapted has rank 0 there."""
    roles = ("down_proj",) if site.role == "down_proj" else ("gate_proj", "up_proj")
    first, rows = next(iter(parts.values())), site.out_features // len(roles)
    A, B, m = [], [], []
    for role in roles:
        part = parts.get(role)
        A.append(first.A.new_zeros(0, site.in_features) if part is None else part.A)
        B.append(first.B.new_zeros(rows, 0) if part is None else part.B * (part.scale / first.scale))
        if part is not None and part.m is not None:
            m.append(part.m.flatten())
    if m and len(m) < len(roles):
        raise FormatError(f"{held.file} has magnitudes for a part of {site.name!r} alone, which Lorica cannot read.")
    held.give(f"{site.name}.lora_A.weight", torch.cat(A))
    held.give(f"{site.name}.lora_B.weight", torch.block_diag(*B))
    if m:
        held.give(f"{site.name}.lora_magnitude_vector", torch.cat(m))
    return first.scale
