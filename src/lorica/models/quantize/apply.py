"""Quantising a backbone: every linear weight but the head's, in place, one after the other.

In: a backbone and a setting. Out: the same network as another backbone, whose linear modules hold packed weights.
Embeddings, norms, heads, routers, convolutions, fused experts and tied weights stay as they are. Refuses to know files
and adapters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lorica.core.errors import ConfigError, FormatError, did_you_mean
from lorica.core.site import Site
from lorica.models.backbone import Backbone
from lorica.models.quantize.bnb import installed
from lorica.models.quantize.config import Quantization
from lorica.models.quantize.formats import Format
from lorica.models.quantize.functions import format_of, packed_as
from lorica.models.quantize.linear import QuantizedLinear

Seen = Callable[[Site, Tensor, QuantizedLinear], None]
"""Hears of each site, with its weight [out, in] before that goes: for what compares the two."""


def format_for(config: Quantization) -> Format:
    """The format that a setting names."""
    return format_of(config.kind, block=config.block, double=config.double)


def sites_to_quantize(backbone: Backbone, config: Quantization) -> list[Site]:
    """The linear sites whose weight a setting packs. Raises ConfigError for a `skip` that matches nothing."""
    linear = [
        site
        for site in backbone.sites.values()
        if site.kind == "linear" and not (site.head or site.router or site.tied)
    ]
    matched = {pattern for site in linear if (pattern := config.skips(site.name)) is not None}
    idle = next((pattern for pattern in config.skip if pattern not in matched), None)
    if idle is not None:
        roles = sorted({site.role for site in linear})
        near = did_you_mean(idle, roles) or f" Its linear sites end in {', '.join(roles)}."
        raise ConfigError(f"`skip` names {idle!r}, which no further linear site of {backbone.name!r} matches.{near}")
    return [site for site in linear if config.skips(site.name) is None]


@torch.no_grad()
def quantize_backbone(
    backbone: Backbone, config: Quantization, *, device: torch.device | None = None, seen: Seen | None = None
) -> Backbone:
    """The network with packed weights; the backbone that was given is spent. `device` is where packed weights go.

    One weight at a time is in float32. Its `dtype` stays that of the backbone. Raises ConfigError for a backbone that
    is quantised already or has nothing to quantise, FormatError for values that are not finite, naming the site.
    """
    if backbone.quantization is not None:
        raise ConfigError(f"{backbone.name!r} is quantised already ({backbone.quantization}).")
    if config.backend == "bitsandbytes" and not installed():
        raise ConfigError("backend is 'bitsandbytes', which is not installed; use backend=torch.")
    sites = sites_to_quantize(backbone, config)
    if not sites:
        raise ConfigError(f"{backbone.name!r} has no linear weight to quantise besides its head.")
    form, origin = format_for(config), backbone.fingerprint()
    made: dict[nn.Module, QuantizedLinear] = {}
    for site in sites:
        owner, weight_OI = backbone.module_of(site.name), backbone.weight(site.name).matrix()
        module = _packed(site, owner, weight_OI, form, config.backend, device)
        if seen is not None:
            seen(site, weight_OI, module)
        made[owner] = module
        _replace(backbone.module, {owner: module})
        del owner, weight_OI
        backbone.drop(site.name)
    root = made.get(backbone.module, backbone.module)
    return backbone.requantized(root, config, origin)


def _packed(
    site: Site, owner: nn.Module, weight_OI: Tensor, form: Format, backend: str, device: torch.device | None
) -> QuantizedLinear:
    try:
        packed = packed_as(form, weight_OI if device is None else weight_OI.to(device))
    except FormatError as error:
        raise FormatError(f"Site {site.name!r}: {error}") from None
    return QuantizedLinear(
        packed, owner._parameters["bias"], dtype=weight_OI.dtype, transposed=site.transposed, backend=backend
    )


def _replace(root: nn.Module, others: dict[nn.Module, QuantizedLinear]) -> None:
    """Put modules in the places of others, wherever a parent holds them."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in others:
                parent._modules[name] = others[child]
