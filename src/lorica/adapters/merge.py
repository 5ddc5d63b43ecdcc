"""Merging: a stack of adapters folded into the live weights, checked before, verified after, undone bit for bit.

In: a backbone and adapters, innermost first. Out: changed base tensors and a report of how exact they are.
Refuses to know routes, hooks and files; no method writes a merge of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.fold import (
    blocks,
    changes_weight,
    doubled,
    fold_bias,
    fold_weight,
    rows_of,
    unfold_bias,
    unfold_weight,
    work_device,
)
from lorica.adapters.foldable import dtype_name, folding_plan
from lorica.adapters.parents import folded
from lorica.adapters.probe import Difference, beside, compare, probe_inputs
from lorica.adapters.requantize import Rounding, fold_packed
from lorica.core.errors import MergeError
from lorica.core.site import Site
from lorica.core.update import LinearUpdate
from lorica.models.backbone import Backbone


@dataclass(frozen=True, slots=True)
class MergeReport:
    """How a merge went.

    Attributes:
        sites: number of sites whose weights changed.
        difference: largest absolute difference of a site's outputs on N(0, 1) probes, merged against adapted.
        relative: largest such difference in units of the site's largest output.
        worst: the site of the largest relative difference.
        dtype: what the results were rounded to, e.g. `bfloat16`, or `nf4` where the worst site is packed.
        rounding: what quantising again lost, of each site whose weight is packed.
    """

    sites: int
    difference: float
    relative: float
    worst: str
    dtype: str
    rounding: Mapping[str, Rounding] = field(default_factory=dict)

    def __str__(self) -> str:
        places = "1 site" if self.sites == 1 else f"{self.sites} sites"
        text = (
            f"Merged {places} in float64 and rounded to {self.dtype}: on probes the outputs differ by at most "
            f"{self.difference:.1e} ({self.relative:.1e} of the largest output, at {self.worst})."
        )
        if not self.rounding:
            return text
        worst = max(self.rounding, key=lambda name: self.rounding[name].update)
        return (
            f"{text} Quantising again is no exact merge: its rounding is up to {self.rounding[worst].update:.0%} of "
            f"the size of what was merged (at {worst})."
        )

    def lines(self) -> list[str]:
        """The report as lines to print: one for each site that was quantised again."""
        rows = [f"  {n}: {r.weight:.2e} of the weight, {r.update:.2e} of the update" for n, r in self.rounding.items()]
        return [str(self), *(["Rounding by site (Frobenius norms):", *rows] if rows else [])]


class Merge:
    """One merge of a stack into a backbone: `apply`, then `undo`.

    `W' = diag(out_scale) ((W₀ + delta) diag(in_scale) + Σ BA)` and `b' = b₀ (⊙ out_scale) + bias`, level by level, in
    float64, rounded once to the dtype of the base. Each site's result is compared with the updates beside the frozen
    weight on random probes. A packed weight is dequantised, folded and quantised again: that rounding is reported.
    Memory: a copy of every changed tensor is kept until `undo`, on its device, because arithmetic could not give back
    the last bits; of fused experts, the adapted slices alone. With `keep=False` only the updates are kept after
    `apply`, and `undo` subtracts and divides them again, to within the dtype's rounding: of weights around 0.3, 3e-8 in
    float32 and 2e-3 in bfloat16. Meanwhile the backbone's `lineage` says what is in its weights.
    """

    def __init__(self, backbone: Backbone, stack: tuple[Adapter, ...], *, keep: bool = True) -> None:
        self.backbone = backbone
        self.stack = stack
        self.keep = keep
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._folded: dict[str, list[LinearUpdate]] = {}
        self._rounding: dict[str, Rounding] = {}
        self._away = False
        self._lineage = backbone.lineage

    @torch.no_grad()
    def apply(self) -> MergeReport:
        """Fold every update. Raises MergeError when one cannot be folded or verified; and restores the weights"""
        if self._kept or self._folded:
            raise MergeError("This stack is merged already; call undo() first.")
        plan = folding_plan(self.backbone, self.stack, undoable=not self.keep)
        lineage = folded(self.backbone, self.stack).to_meta()
        found: dict[str, Difference] = {}
        self._rounding = {}
        try:
            for name, updates in plan.items():
                found[name] = self._fold(self.backbone.sites[name], updates)
        except BaseException:
            self._restore()
            raise
        finally:
            self.backbone.invalidate()
        self._lineage, self.backbone.lineage = self.backbone.lineage, lineage
        if not self.keep:
            self._kept = []
            for name, updates in plan.items():  # copied: the adapters may be trained on
                device = work_device(self.backbone.weight(name))
                self._folded[name] = [doubled(update, device, copy=True) for update in updates]
        worst = max(found, key=lambda name: found[name].relative)
        weight = self.backbone.weight(worst)
        return MergeReport(
            sites=len(found),
            difference=max(d.largest for d in found.values()),
            relative=found[worst].relative,
            worst=worst,
            dtype=dtype_name(weight.dtype) if weight.packed is None else weight.packed.form.name,
            rounding=self._rounding,
        )

    @torch.no_grad()
    def undo(self) -> None:
        """Give changed tensors their bits back (their values, with `keep=False`). Raises MergeError when not merged."""
        if not self._kept and not self._folded:
            raise MergeError("Nothing is merged.")
        for name, updates in self._folded.items():
            self._unfold(self.backbone.sites[name], updates)
        self._folded = {}
        self._restore()
        self.backbone.lineage = self._lineage
        self.backbone.invalidate()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, the weights are the frozen ones, bit for bit; leaving brings the merged ones back. Nests.

        Raises MergeError with `keep=False`, which has no frozen ones to show.
        """
        if self._folded:
            raise MergeError("The frozen weights were not kept, so they cannot be shown while this stack is merged.")
        if self._away or not self._kept:
            yield
            return
        self._swap()
        self._away = True
        try:
            yield
        finally:
            if self._away:  # an undo inside has settled it
                self._away = False
                self._swap()

    def _fold(self, site: Site, updates: list[LinearUpdate]) -> Difference:
        """Write one site's folded weight and bias, and measure them. Raises MergeError."""
        weight, bias = self.backbone.weight(site.name), self.backbone.bias(site.name)
        device = work_device(weight)
        exact = [doubled(update, device) for update in updates]
        frozen = None if bias is None else bias.to(device=device, dtype=torch.float64)
        wanted_O = None if bias is None else fold_bias(frozen, exact)
        stored_O: Tensor | None = None
        if bias is not None and wanted_O is not None:
            self._keep(bias)
            stored_O = self._write(site, bias, slice(None), wanted_O).to(wanted_O)
        x_NC, found = probe_inputs(site, device), Difference()
        touched = any(changes_weight(update) for update in updates)
        if touched and weight.packed is not None:
            found, rounding = fold_packed(site, weight.packed, exact, x_NC, wanted_O, stored_O, self._keep)
            self._rounding[site.name] = rounding
            return found
        live = weight.matrix()
        if touched:
            self._keep(live)
        for rows in blocks(site.shape):
            parts = [rows_of(update, rows) for update in exact]
            before = live[rows].to(device=device, dtype=torch.float64)
            x = x_NC[:, rows] if site.kind == "norm" else x_NC
            wanted_NO = beside(x, before, parts)
            wanted_NO = wanted_NO if wanted_O is None else wanted_NO + wanted_O[rows]
            after = self._write(site, live, rows, fold_weight(before, parts)).to(before) if touched else before
            compare(found, x, wanted_NO, after, None if stored_O is None else stored_O[rows], live.dtype)
        if not found.explained:
            raise MergeError(
                f"The merged weight of site {site.name!r} gives outputs that differ by {found.largest:.1e} from the "
                f"adapter's, more than rounding to {dtype_name(live.dtype)} explains, so nothing was merged."
            )
        return found

    def _unfold(self, site: Site, updates: list[LinearUpdate]) -> None:
        """Take one site's updates out again by arithmetic."""
        live, bias = self.backbone.weight(site.name).matrix(), self.backbone.bias(site.name)
        if bias is not None:
            bias.copy_(unfold_bias(bias.to(work_device(bias), torch.float64), updates))
        for rows in blocks(site.shape) if any(changes_weight(update) for update in updates) else ():
            parts = [rows_of(update, rows) for update in updates]
            live[rows] = unfold_weight(live[rows].to(work_device(live), torch.float64), parts).to(live)

    def _keep(self, live: Tensor) -> None:
        self._kept.append((live, live.clone()))

    def _write(self, site: Site, live: Tensor, rows: slice, value: Tensor) -> Tensor:
        """Round into place and read back. Raises MergeError when the value, or the rounded one, is not finite."""
        if not torch.isfinite(value).all():
            raise MergeError(
                f"Merging would give site {site.name!r} values that are not finite, so nothing was merged.",
                hint="The adapter holds NaN or infinity: use an earlier checkpoint.",
            )
        rounded = value.to(live.dtype)
        if not torch.isfinite(rounded).all():
            raise MergeError(
                f"Merged values of site {site.name!r} reach {float(value.abs().max()):.1e}, which "
                f"{dtype_name(live.dtype)} cannot hold, so nothing was merged.",
                hint="Load the base in bfloat16 or float32.",
            )
        live[rows] = rounded.to(live.device)
        return live[rows]

    def _restore(self) -> None:
        if not self._away:
            for live, before in self._kept:
                live.copy_(before)
        self._kept, self._away = [], False

    @torch.no_grad()
    def _swap(self) -> None:
        for live, other in self._kept:
            here = live.clone()
            live.copy_(other)
            other.copy_(here)
        self.backbone.invalidate()
