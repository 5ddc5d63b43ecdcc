"""Pruning: an AdaLoRA adapter without the triplets that its budget left out.

In: an adapter. Out: one of the same function with a rank per site. Refuses to know files; `adapters.files` writes it,
and PEFT reads it as an ADALORA folder.
"""

from __future__ import annotations

import torch

from lorica.adapters.adapter import Adapter
from lorica.adapters.layout import Layout
from lorica.core.errors import MethodError
from lorica.methods.adalora import AdaLoRA


@torch.no_grad()
def pruned(adapter: Adapter) -> Adapter:
    """The adapter with the kept triplets alone, in their order; sites that have none left are no sites of it.

    The scaling stays that of the initial rank, so the function is the same. Raises MethodError for other methods, and
    where a triplet that is masked still acts: before the final steps such triplets may come back.
    """
    picked, values = {}, {}
    for name, site in adapter.layout.sites.items():
        method, own = adapter.layout.methods[name], adapter.values(name)
        if not isinstance(method, AdaLoRA):
            raise MethodError(f"Adapter {adapter.name!r} is of method {method.name!r}, which has no triplets to prune.")
        kept = own["mask"].bool()
        if own["E"][~kept].any():
            raise MethodError(
                f"A masked triplet of adapter {adapter.name!r} acts at site {name!r}, so pruning would change its "
                "function.",
                hint="Prune after the last step that chooses triplets, or with `every=1`.",
            )
        if kept.any():
            picked[name] = (site, method.replace(rank=int(kept.sum()), scale_rank=method.scale_rank or method.rank))
            values[name] = {"P": own["P"][:, kept], "E": own["E"][kept], "Q": own["Q"][kept], "mask": own["mask"][kept]}
    if not picked:
        raise MethodError(f"Adapter {adapter.name!r} has no triplet left.")
    layout = Layout(adapter.method, picked)
    found = Adapter(adapter.name, layout, seed=adapter.seed, base=adapter.base, dtype=adapter.flat.dtype)
    found.to(device=adapter.flat.device)
    for name, own in values.items():
        for param, value in own.items():
            found.set(name, param, value)
    found.meta, found.forwards = dict(adapter.meta), adapter.forwards
    return found
