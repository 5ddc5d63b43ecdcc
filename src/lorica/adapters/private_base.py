"""A quantised base and a LoftQ adapter made for each other: codes and factors chosen together, site by site.

In: a backbone in full, how to pack it, a LoftQ config. Out: the packed backbone, the adapter that belongs to it, and
what each site's error was. Refuses to share: the codes fit this adapter, and other tenants want plain ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.alternation import Alternation, alternate
from lorica.adapters.layout import Layout
from lorica.adapters.lineage import Base
from lorica.adapters.parents import born, lineage_of_weights
from lorica.adapters.targets import Targets, select
from lorica.core.errors import MethodError
from lorica.core.site import Site
from lorica.methods.loftq import LoftQ
from lorica.models.backbone import Backbone
from lorica.models.quantize.apply import format_for, quantize_backbone
from lorica.models.quantize.config import Quantization
from lorica.models.quantize.formats import Packed
from lorica.models.quantize.functions import packed_as

META = "loftq"
"""Where an adapter's `meta` keeps the errors, by site."""


@dataclass(frozen=True, slots=True)
class PrivateBase:
    """Base and adapter. `errors[site]` is `‖W − Q − sBA‖` after each iteration, from the plain codes alone on; the
    adapter's `meta` has the same.
    """

    backbone: Backbone
    adapter: Adapter
    errors: Mapping[str, tuple[float, ...]]


@torch.no_grad()
def private_base(
    backbone: Backbone,
    quantization: Quantization,
    method: LoftQ,
    targets: Targets | None = None,
    *,
    seed: int = 0,
    name: str = "default",
    device: torch.device | None = None,
) -> PrivateBase:
    """Pack a backbone (the one given is spent) with LoftQ's alternation at every adapted site, and plainly elsewhere.

    At each site the iterate with the least error is kept, codes and factors. With one iteration the codes are the plain
    ones, unless it starts from principal directions (QPiSSA). The adapter acts on the returned backbone and on no
    other, unless that is so. Raises MethodError where no adapted site would be packed, ConfigError, TargetError,
    FormatError.
    """
    spec = targets or Targets()
    methods = Layout(method, select(backbone.sites, method, spec)).methods
    found: dict[str, Alternation] = {}
    form = format_for(quantization)

    def pack(site: Site, weight_OI: Tensor) -> Packed:
        own, weight_OI = methods.get(site.name), weight_OI.to(device or weight_OI.device)
        if not isinstance(own, LoftQ):
            return packed_as(form, weight_OI)
        rng = torch.Generator().manual_seed(seed)
        found[site.name] = alternate(weight_OI, form, own.rank, own.iterations, rng, own.steps, start=own.start)
        return found[site.name].packed

    made_of = lineage_of_weights(backbone)
    packed = quantize_backbone(backbone, quantization, device=device, pack=pack)
    if not found:
        raise MethodError(
            f"LoftQ adapts no site whose weight is packed as {quantization}, so there is nothing to choose together."
        )
    layout = Layout(method, select(packed.sites, method, spec))
    settings = {"quantize": str(quantization), "method": {"name": method.name, **method.model_dump(mode="json")}}
    made_of = made_of.replace(base=Base(packed.name, packed.origin), how="pack with loftq", settings=settings)
    packed.lineage = made_of.to_meta()
    adapter = born(Adapter(name, layout, seed=seed, base=packed.fingerprint()), packed)
    for site_name, site in layout.sites.items():
        own = layout.methods[site_name]
        if site_name in found and isinstance(own, LoftQ):
            values = own.factors(found[site_name].triplets)
        else:
            values = own.init(site, packed.weight(site_name), adapter.rng(site_name))
        for param, value in values.items():
            adapter.set(site_name, param, value)
    errors = {site_name: one.errors for site_name, one in found.items()}
    adapter.meta[META] = {
        site_name: {"plain": one.errors[0], "errors": list(one.errors[1:]), "chosen": one.chosen}
        for site_name, one in found.items()
    }
    return PrivateBase(packed, adapter, errors)
