"""Quantising a backbone: every linear weight but the head's, in place, one after the other.

In: a backbone and a setting. Out: the same network as another backbone, whose linear modules hold packed weights.
Embeddings, norms, heads, routers, convolutions, fused experts and tied weights stay as they are. Refuses to know files
and adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lorica.core.errors import ConfigError, FormatError, did_you_mean
from lorica.core.site import Site
from lorica.models.backbone import Backbone
from lorica.models.quantize.bnb import installed
from lorica.models.quantize.config import Quantization
from lorica.models.quantize.formats import Format, Packed
from lorica.models.quantize.functions import format_of, packed_as
from lorica.models.quantize.linear import QuantizedLinear

Pack = Callable[[Site, Tensor], Packed]
"""What a site's weight [out, in], still where the backbone is, is stored as: on the device that it goes to."""


def format_for(config: Quantization) -> Format:
    """The format that a setting names."""
    return format_of(config.kind, block=config.block, double=config.double)


def linear_sites(backbone: Backbone) -> list[Site]:
    """The sites whose weight can be packed: linear ones, but no head, no router and nothing that is tied."""
    sites = backbone.sites.values()
    return [site for site in sites if site.kind == "linear" and not (site.head or site.router or site.tied)]


def sites_to_quantize(backbone: Backbone, config: Quantization) -> list[Site]:
    """The linear sites whose weight a setting packs. Raises ConfigError for a `skip` that matches nothing."""
    linear = linear_sites(backbone)
    matched = {pattern for site in linear if (pattern := config.skips(site.name)) is not None}
    idle = next((pattern for pattern in config.skip if pattern not in matched), None)
    if idle is not None:
        roles = sorted({site.role for site in linear})
        near = did_you_mean(idle, roles) or f" Its linear sites end in {', '.join(roles)}."
        raise ConfigError(f"`skip` names {idle!r}, which no further linear site of {backbone.name!r} matches.{near}")
    return [site for site in linear if config.skips(site.name) is None]


@torch.no_grad()
def quantize_backbone(
    backbone: Backbone, config: Quantization, *, device: torch.device | None = None, pack: Pack | None = None
) -> Backbone:
    """The network with packed weights; the backbone that was given is spent. `device` is where packed weights go.

    `pack` chooses the codes where they are not the plain ones. One weight at a time is in float32. Its `dtype` stays
    that of the backbone. Raises ConfigError for a backbone that is quantised already or has nothing to quantise,
    FormatError for values that are not finite, naming the site.
    """
    if backbone.quantization is not None:
        raise ConfigError(f"{backbone.name!r} is quantised already ({backbone.quantization}).")
    if config.backend == "bitsandbytes" and not installed():
        raise ConfigError("backend is 'bitsandbytes', which is not installed; use backend=torch.")
    sites = sites_to_quantize(backbone, config)
    if not sites:
        raise ConfigError(f"{backbone.name!r} has no linear weight to quantise besides its head.")
    pack, origin = pack or partial(_plain, format_for(config), device), backbone.fingerprint()
    root = backbone.module
    for site in sites:
        owner, weight_OI = backbone.module_of(site.name), backbone.weight(site.name).matrix()
        module = _module(site, owner, weight_OI, pack, config.backend)
        root = module if owner is root else root
        _replace(backbone.module, owner, module)
        del owner, weight_OI
        backbone.drop(site.name)
    return backbone.requantized(root, config, origin)


def _plain(form: Format, device: torch.device | None, site: Site, weight_OI: Tensor) -> Packed:
    return packed_as(form, weight_OI if device is None else weight_OI.to(device))


def _module(site: Site, owner: nn.Module, weight_OI: Tensor, pack: Pack, backend: str) -> QuantizedLinear:
    try:
        packed = pack(site, weight_OI)
    except FormatError as error:
        raise FormatError(f"Site {site.name!r}: {error}") from None
    return QuantizedLinear(
        packed, owner._parameters["bias"], dtype=weight_OI.dtype, transposed=site.transposed, backend=backend
    )


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever a parent holds it."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
