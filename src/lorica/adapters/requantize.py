"""Folding into a packed weight: dequantise, add in float64, quantise again, and say how much that rounded.

In: a packed module, its site's updates. Out: other packed tensors in place, and the rounding. The folding itself is
verified before it is rounded; that the rounding is small is never claimed. Refuses to know merges and their undoing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.adapters.fold import blocks, fold_weight, rows_of, work_device
from lorica.adapters.probe import Difference, beside, compare
from lorica.core.errors import FormatError, MergeError
from lorica.core.site import Site
from lorica.core.update import LinearUpdate
from lorica.models.quantize.linear import QuantizedLinear


@dataclass(frozen=True, slots=True)
class Rounding:
    """What quantising a merged weight W' to Ŵ' lost: `‖Ŵ' − W'‖ / ‖W'‖`, and `‖Ŵ' − W'‖ / ‖W' − Ŵ‖`, Frobenius norms.

    The second compares with the change that was merged: near 1 and above, the rounding is as large as the update.
    """

    weight: float
    update: float


def fold_packed(
    site: Site,
    module: QuantizedLinear,
    updates: Sequence[LinearUpdate],
    x_NI: Tensor,
    wanted_O: Tensor | None,
    stored_O: Tensor | None,
    keep: Callable[[Tensor], None],
) -> tuple[Difference, Rounding]:
    """Store `W'` of a float64 stack in a packed module; `keep` is handed each packed tensor before it changes.

    `wanted_O` is the folded bias, `stored_O` what was stored of it. The difference is that of the outputs on probes,
    the rounding to packed form included. Raises MergeError where the folding is wrong or the values are not finite.
    """
    frozen = module.dense()
    device = work_device(frozen)
    exact = Difference()
    folded = torch.empty(module.shape, dtype=torch.float64 if frozen.dtype == torch.float64 else torch.float32)
    change = 0.0
    for rows in blocks(site.shape):
        parts = [rows_of(update, rows) for update in updates]
        before = frozen[rows].to(device, torch.float64)
        after = fold_weight(before, parts)
        compare(exact, x_NI, beside(x_NI, before, parts), after, None, torch.float64)
        folded[rows] = after.cpu().to(folded.dtype)
        change += float((after - before).square().sum())
    if not exact.explained:
        raise MergeError(
            f"The merged weight of site {site.name!r} does not give the adapter's outputs; nothing is merged."
        )
    for part in module.packed.parts.values():
        keep(part)
    try:
        module.store(folded)
    except FormatError as error:
        raise MergeError(f"The merged weight of site {site.name!r} cannot be quantised: {error}") from None
    found, stored = Difference(), module.dense()
    lost = size = 0.0
    for rows in blocks(site.shape):
        parts = [rows_of(update, rows) for update in updates]
        wanted_NO = beside(x_NI, frozen[rows].to(device, torch.float64), parts)
        wanted_NO = wanted_NO if wanted_O is None else wanted_NO + wanted_O[rows]
        after = stored[rows].to(device, torch.float64)
        compare(found, x_NI, wanted_NO, after, None if stored_O is None else stored_O[rows], stored.dtype)
        whole = folded[rows].to(device, torch.float64)
        lost += float((after - whole).square().sum())
        size += float(whole.square().sum())
    found.explained = True  # what rounding to a few bits does is reported, not judged
    return found, Rounding((lost / size) ** 0.5 if size else 0.0, (lost / change) ** 0.5 if change else 0.0)
