"""Any adapter of weights as a plain LoRA adapter of the same effect, or of the nearest one at a given rank.

In: an adapter and its backbone. Out: a LoRA adapter with a rank per site, and a report of what was lost.
Dropout is left behind: it belongs to training. Refuses to know files; `adapters.files` writes the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.assemble import assemble_alike
from lorica.adapters.export.decompose import TOLERANCE, factor
from lorica.adapters.fold import doubled, work_device
from lorica.adapters.merging.change import Change, bias_change
from lorica.adapters.parents import derived
from lorica.adapters.probe import Difference, beside, probe_inputs
from lorica.core.errors import ConfigError, FormatError, MethodError
from lorica.core.update import LinearUpdate, PrefixKV, SoftPrompt
from lorica.methods.lora import LoRA
from lorica.models.backbone import Backbone


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export kept.

    Attributes:
        method: the method it came from.
        sites: number of sites. parameters: of the LoRA adapter.
        lowest, highest: the ranks over all sites.
        lost: largest share of a site's change, `Σσ²(cut) / Σσ²(all)`, that was cut away.
        difference: largest absolute difference of a site's outputs on N(0, 1) probes, exported against original.
        relative: largest such difference in units of the site's largest output.
        worst: the site of the largest relative difference.
    """

    method: str
    sites: int
    parameters: int
    lowest: int
    highest: int
    lost: float
    difference: float
    relative: float
    worst: str

    def __str__(self) -> str:
        ranks = f"rank {self.lowest}" if self.lowest == self.highest else f"ranks {self.lowest} to {self.highest}"
        places = "1 site" if self.sites == 1 else f"{self.sites} sites"
        cut = "nothing was cut" if self.lost <= TOLERANCE else f"up to {self.lost:.1%} of a site's change was cut away"
        return (
            f"{self.method} as LoRA of {ranks} at {places}, {self.parameters:,} parameters: {cut}; on probes the "
            f"outputs differ by at most {self.difference:.1e} ({self.relative:.1e} of the largest output, at "
            f"{self.worst})."
        )


def as_lora(adapter: Adapter, backbone: Backbone, *, rank: int | None = None, tolerance: float = TOLERANCE) -> Adapter:
    """The LoRA adapter of `export_lora`, without the report."""
    return export_lora(adapter, backbone, rank=rank, tolerance=tolerance)[0]


@torch.no_grad()
def export_lora(
    adapter: Adapter, backbone: Backbone, *, rank: int | None = None, tolerance: float = TOLERANCE
) -> tuple[Adapter, ExportReport]:
    """A plain LoRA adapter with `B A = ΔW = effective(W₀) − W₀` at every site, computed in float64, and a report.

    A plain LoRA adapter within `rank` is copied bit for bit, and its `s·B A` of another method taken as it is. DoRA,
    IA³ and dense changes go through singular values; such a change is usually of full rank, so without `rank` the
    result is exact and large. Every site has `alpha = rank`, so the scaling is 1. Changes of a bias become
    `lora_bias`. Parameters: r(in + out) a site.

    Args:
        adapter: any adapter whose updates act on linear, expert, embedding or convolution weights.
        backbone: the base that it belongs to.
        rank: most ranks a site may keep; None keeps all that float32 can tell.
        tolerance: singular values up to this share of the site's largest are dropped, 0 ≤ tolerance < 1.

    Raises: MethodError naming the site for virtual tokens, prefixes, norms and a bias at an embedding; FormatError for
    values that are not finite; ConfigError for a rank below 1 or a tolerance out of range.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"The rank of an export is {rank}; at least 1 is right.")
    if not 0 <= tolerance < 1:
        raise ConfigError(f"The tolerance of an export is {tolerance}; a share from 0 to below 1 is right.")
    updates = {name: _exact(adapter, backbone, name) for name in adapter.layout.sites}
    if _is_plain(adapter, rank):
        exported = Adapter(adapter.name, adapter.layout, seed=adapter.seed, base=adapter.base, dtype=adapter.flat.dtype)
        exported.flat = adapter.flat.clone()
        lost = dict.fromkeys(updates, 0.0)
    else:
        changes, lost = {}, {}
        for name, update in updates.items():
            found = factor(_weight(backbone, name), update, rank, tolerance)
            bias_O, shape = _bias_change(backbone, name, update), adapter.layout.sites[name].shape
            changes[name], lost[name] = Change.of_factors(shape, found.A_RI, found.B_OR, bias_O=bias_O), found.lost
        exported = assemble_alike(adapter, changes)
    exported.meta = dict(adapter.meta)
    derived(exported, adapter, backbone, "export lora", method=adapter.method.name, rank=rank)
    return exported, _measure(adapter, exported, backbone, updates, lost)


def _is_plain(adapter: Adapter, rank: int | None) -> bool:
    """Whether the adapter is a plain LoRA already, within the rank everywhere."""
    methods = adapter.layout.methods.values()
    return all(type(m) is LoRA and (rank is None or m.rank <= rank) for m in methods)


def _weight(backbone: Backbone, name: str) -> Tensor:
    weight = backbone.weight(name).matrix()
    return weight.to(device=work_device(weight), dtype=torch.float64)


def _exact(adapter: Adapter, backbone: Backbone, name: str) -> LinearUpdate:
    """One site's update in float64. Raises MethodError where a LoRA cannot act as it does."""
    update = adapter.update(name, backbone.weight(name))
    kind = adapter.layout.sites[name].kind
    reason: str | None = None
    if isinstance(update, SoftPrompt):
        reason = "adds virtual tokens"
    elif isinstance(update, PrefixKV):
        reason = "adds keys and values"
    elif kind not in LoRA.kinds:
        reason = f"changes a {kind}"
    if reason is not None:
        raise MethodError(
            f"The {adapter.method.name!r} adapter {adapter.name!r} {reason} at site {name!r}, which no LoRA can hold.",
            hint="Merge it into the weights with `lorica merge`." if kind == "norm" else "Keep it as it is.",
        )
    assert isinstance(update, LinearUpdate)
    exact = doubled(update, work_device(backbone.weight(name).matrix()))
    parts = [exact.delta, exact.in_scale_I, exact.out_scale_O, exact.bias_O]
    parts += [part for f in exact.factors for part in (f.A_RI, f.B_OR, f.mid_R, f.post_O)]
    if not all(torch.isfinite(part).all() for part in parts if part is not None):
        raise FormatError(
            f"Adapter {adapter.name!r} holds values that are not finite, at site {name!r}.",
            hint="Export an earlier checkpoint.",
        )
    return exact


def _bias_change(backbone: Backbone, name: str, update: LinearUpdate) -> Tensor | None:
    """`b' − b₀` [out] in float64; None where it is zero. Raises MethodError at an embedding, which has no bias."""
    change_O = bias_change(update, backbone.bias(name), work_device(backbone.weight(name)))
    if change_O is None:
        return None
    if backbone.sites[name].kind == "embedding":
        raise MethodError(f"The update of embedding {name!r} adds a bias, which no LoRA of an embedding can hold.")
    return change_O


def _measure(
    adapter: Adapter,
    exported: Adapter,
    backbone: Backbone,
    updates: Mapping[str, LinearUpdate],
    lost: Mapping[str, float],
) -> ExportReport:
    """Compare the adapters on probes, site by site."""
    found: dict[str, Difference] = {}
    for name, site in adapter.layout.sites.items():
        weight = _weight(backbone, name)
        x_NC = probe_inputs(site, weight.device)
        outputs = []
        for update in (updates[name], _exact(exported, backbone, name)):
            change_O, y_NO = _bias_change(backbone, name, update), beside(x_NC, weight, [update])
            outputs.append(y_NO if change_O is None else y_NO + change_O)
        gap_NO = (outputs[0] - outputs[1]).abs()
        found[name] = Difference(float(gap_NO.max()), float(outputs[0].abs().max()))
    worst = max(found, key=lambda name: found[name].relative)
    ranks = [m.rank for m in exported.layout.methods.values() if isinstance(m, LoRA)]
    return ExportReport(
        method=adapter.method.name,
        sites=len(found),
        parameters=exported.layout.trainable_count(),
        lowest=min(ranks),
        highest=max(ranks),
        lost=max(lost.values()),
        difference=max(d.largest for d in found.values()),
        relative=found[worst].relative,
        worst=worst,
    )
