"""LoRA-Soups of parents: an adapter whose frozen factors are theirs, and of which only each one's weights train.

In: adapters of factors over one backbone. Out: a `lora_soups` adapter, and the weights that it learnt, by site.
Refuses to know how it is trained: it trains as any adapter does. What was learnt becomes a plain adapter by `combine`
with `cat` and these weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch

from lorica.adapters.adapter import Adapter
from lorica.adapters.fold import work_device
from lorica.adapters.layout import Layout
from lorica.adapters.merging.change import Change, change_of
from lorica.adapters.merging.checks import check_parents
from lorica.adapters.merging.provenance import beneath, origins_of
from lorica.adapters.parents import merged
from lorica.core.errors import MergeError, MethodError
from lorica.core.site import Site
from lorica.methods.lora_soups import LoRASoups
from lorica.models.backbone import Backbone


@torch.no_grad()
def soup_of(
    parents: Sequence[Adapter],
    backbone: Backbone,
    *,
    weighting: Literal["free", "softmax"] = "free",
    spread: float = 0.0,
    name: str = "soup",
    seed: int = 0,
) -> Adapter:
    """`y = x W₀ᵀ + Σ_n ω_n s_n x A_nᵀ B_nᵀ` with the parents' factors, frozen, and ω = 1/N at every site to begin with.

    Parents may differ in rank, sites and method, as long as each change is a product of factors; where one does not
    act, its share of the weight does nothing. ω is trained as it is, or as softmax of logits. `spread` is the deviation
    of what is added to the start, drawn from `seed`. Memory: the parents' values once more. arXiv 2410.13025.

    Raises: MergeError for a parent whose change is dense or has a bias, for prompts and prefixes, and without parents;
    MismatchError for another base; FormatError for values that are not finite.
    """
    check_parents(parents, backbone, None)
    known = origins_of(parents, backbone, None)
    below = beneath(parents, known)
    plain = LoRASoups(ranks=(1,) * len(parents), weighting=weighting, spread=spread)
    picked: dict[str, tuple[Site, LoRASoups]] = {}
    for site in backbone.sites.values():
        if any(site.name in parent.layout.sites for parent in parents):
            ranks = tuple(_factored(parent, backbone, site).rank for parent in parents)
            if any(ranks):
                picked[site.name] = (site, plain.replace(ranks=ranks))
    if not picked:
        raise MergeError("The soup would change nothing: no parent changes a weight.")
    method = Counter(own for _, own in picked.values()).most_common(1)[0][0]
    dtype = torch.float32
    for parent in parents:
        dtype = torch.promote_types(dtype, parent.flat.dtype)
    made = Adapter(name, Layout(method, picked), seed=seed, base=backbone.fingerprint(), dtype=dtype)
    for place, (site, own) in picked.items():
        found = [_factored(parent, backbone, site) for parent in parents]  # anew: one site in float64 at a time
        pairs = [(change.scale, *change.factors()) for change in found]
        made.set(place, "A", torch.cat([A_RI for _, A_RI, _ in pairs]).reshape(-1, *site.shape[1:]))
        made.set(place, "B", torch.cat([scale * B_OR for scale, _, B_OR in pairs], dim=1))
        made.set(place, "mix", own.start(made.rng(place)))
    settings = method.model_dump(mode="json", include={"weighting", "spread"})
    return merged(made.to(device=backbone.device), backbone, (*below, *known), method.name, settings)


def _factored(parent: Adapter, backbone: Backbone, site: Site) -> Change:
    """A parent's change of a site, as factors and nothing else."""
    change = change_of(parent, backbone, site.name)
    if change is None:
        return Change.nothing(site.shape, work_device(backbone.weight(site.name)))
    what = "changes it densely" if not change.factored else "changes its bias" if change.bias_O is not None else None
    if what is not None:
        raise MergeError(
            f"A soup holds factors alone, and the {parent.method.name!r} adapter {parent.name!r} {what} at site "
            f"{site.name!r}.",
            hint="`lorica export --rank` makes factors of a dense change; the rules of `lorica merge` take biases too.",
        )
    return change


@torch.no_grad()
def learnt_weights(soup: Adapter) -> dict[str, tuple[float, ...]]:
    """ω of every site, a number for each parent. Raises MethodError for an adapter of another method."""
    found = {}
    for name, method in soup.layout.methods.items():
        if not isinstance(method, LoRASoups):
            raise MethodError(f"Adapter {soup.name!r} is of method {method.name!r}, which has no weights of parents.")
        found[name] = tuple(method.weights(soup.values(name)["mix"].double()).tolist())
    return found
