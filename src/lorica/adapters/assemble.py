"""An adapter made of changes: LoRA where they are factors, a dense difference or a bias elsewhere.

In: a change for each site. Out: one adapter that makes exactly these changes. It is plain LoRA where every change has
factors, so that PEFT reads it. Refuses to know where the changes come from, and files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from lorica.adapters.adapter import Adapter
from lorica.adapters.layout import Layout
from lorica.adapters.merging.change import Change
from lorica.core.errors import MethodError
from lorica.core.site import Site
from lorica.methods.base import Method
from lorica.methods.bias import Bias
from lorica.methods.delta import Delta
from lorica.methods.lora import LoRA


@torch.no_grad()
def assemble(
    name: str,
    changes: dict[str, Change],
    sites: Mapping[str, Site],
    *,
    seed: int = 0,
    base: str = "",
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Adapter:
    """The adapter with these changes, by site. The mapping is emptied, so that not all is held twice to the end.

    Factors become LoRA with `alpha = rank`, so that its scaling is 1 and a scale goes into B; the commonest rank is the
    config's, others are per site, and changes of biases are `lora_bias`. A dense change becomes `delta`, one of a bias
    alone `bias`. Raises MethodError where a bias has no place.
    """
    picked = _methods(changes, sites)
    kinds = (LoRA, Delta, Bias)
    main = next(m for kind in kinds for m in [_commonest(picked, kind)] if m is not None)
    layout = Layout(main, {site: (sites[site], method) for site, method in picked.items()})
    made = Adapter(name, layout, seed=seed, base=base, dtype=dtype)
    made.to(device=device)
    for site, method in picked.items():
        change = changes.pop(site)
        if isinstance(method, LoRA):
            A_RI, B_OR = change.factors()
            made.set(site, "A", A_RI.reshape(-1, *change.shape[1:]))
            made.set(site, "B", change.scale * B_OR)
        elif isinstance(method, Delta):
            made.set(site, "delta", change.dense())
        if change.bias_O is not None:
            made.set(site, "bias", change.bias_O)
    return made


def assemble_alike(adapter: Adapter, changes: dict[str, Change]) -> Adapter:
    """`assemble` with another adapter's name, sites, seed, base and device, in float32 or its wider dtype."""
    return assemble(
        adapter.name,
        changes,
        adapter.layout.sites,
        seed=adapter.seed,
        base=adapter.base,
        dtype=torch.promote_types(adapter.flat.dtype, torch.float32),
        device=adapter.flat.device,
    )


def _methods(changes: Mapping[str, Change], sites: Mapping[str, Site]) -> dict[str, Method]:
    """The method that holds each change."""
    biased = any(c.bias_O is not None and c.factored and c.rank for c in changes.values())
    return {name: _method(sites[name], change, biased) for name, change in changes.items()}


def _method(site: Site, change: Change, biased: bool) -> Method:
    own = change.bias_O is not None
    if change.factored and change.rank and site.kind in LoRA.kinds:
        if own and site.kind == "embedding":
            raise MethodError(f"The change of embedding {site.name!r} has a bias, which no LoRA of an embedding holds.")
        with_bias = biased and site.kind != "embedding"
        return LoRA(rank=change.rank, alpha=float(change.rank), lora_bias=with_bias)
    if own and not site.bias:
        raise MethodError(
            f"The change of site {site.name!r} is dense and has a bias, and the module has none that a dense "
            "difference could be added to.",
            hint="Cut it to a rank (`--rank`): a LoRA has a bias of its own.",
        )
    if change.factored and not change.rank and own:
        return Bias()
    return Delta(bias=own)


def _commonest(picked: Mapping[str, Method], kind: type[Method]) -> Method | None:
    """The method of a kind that most sites have."""
    found = Counter(method for method in picked.values() if isinstance(method, kind)).most_common(1)
    return found[0][0] if found else None
