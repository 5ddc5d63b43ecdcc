"""Dense delta: a trained difference to a whole weight, or to some of its rows or columns.

In: a site. Out: a dense delta, zero outside the chosen slice. Refuses to know rows of a batch and optimisers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lorica.core.errors import MethodError
from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, ParamSpec
from lorica.methods.base import BaseWeight, Method, Paper

Span = tuple[int, int]


class Delta(Method):
    """Full or partial fine-tuning beside a frozen base: `y = x (W₀ + Δ)ᵀ + b₀`.

    Δ is stored for output rows `[first, last)` and input columns `[first, last)` only, [rows, columns, *kernel], and
    is zero elsewhere; it starts at zero, so decay pulls towards the base. At an embedding, rows are features and
    columns are tokens; a norm has rows only. With `bias`, b₀ of the chosen rows is trained too, where a site has one.
    Parameters: rows · columns a site (and rows). Raises MethodError when a slice does not fit a site. A trained
    difference to frozen weights is the setting of diff pruning (arXiv 2012.07463), here with a chosen slice instead
    of a learned mask.
    """

    name: ClassVar[str] = "delta"
    summary: ClassVar[str] = "a dense difference to whole weights, or to rows or columns of them"
    paper: ClassVar[Paper] = Paper("Parameter-Efficient Transfer Learning with Diff Pruning", "ACL 2021", "2012.07463")
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert", "conv", "norm", "embedding"})

    rows: Span | None = Field(None, description="output rows `[first, last)` to train; null is all")
    columns: Span | None = Field(
        None, description="input columns (channels, tokens) `[first, last)` to train; null is all"
    )
    bias: bool = Field(False, description="also train a difference to the bias, at the sites that have one")

    def _slices(self, site: Site) -> list[Span]:
        """The trained span of each of the weight's first two axes. Raises MethodError when one does not fit."""
        spans: list[Span] = []
        for axis, (label, wanted) in enumerate((("rows", self.rows), ("columns", self.columns))):
            if axis >= len(site.shape):
                if wanted is not None:
                    raise MethodError(f"Site {site.name!r} is a norm and has no columns to choose.")
                continue
            first, last = wanted or (0, site.shape[axis])
            if not 0 <= first < last <= site.shape[axis]:
                raise MethodError(
                    f"The {label} [{first}, {last}) do not fit site {site.name!r}, which has {site.shape[axis]}."
                )
            spans.append((first, last))
        return spans

    def params(self, site: Site) -> dict[str, ParamSpec]:
        sizes = [last - first for first, last in self._slices(site)]
        specs = {"delta": ParamSpec((*sizes, *site.shape[2:]))}
        return {**specs, "bias": ParamSpec((sizes[0],), decay=False)} if self.bias and site.bias else specs

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        pads: list[int] = [0, 0] * len(site.shape[2:])
        for size, (first, last) in reversed(list(zip(site.shape, self._slices(site), strict=False))):
            pads += [first, size - last]
        delta = F.pad(p["delta"], pads) if any(pads) else p["delta"]
        return LinearUpdate(delta=delta, bias_O=F.pad(p["bias"], pads[-2:]) if "bias" in p else None)
