"""LoRA inside fused weights: factors of its own for each of q, k and v (or gate and up), and none for those left out.

In: a site whose weight holds several maps below each other (`Site.parts`). Out: LoRA's update with block-diagonal B.
Refuses to know which families fuse what, rows and optimisers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from lorica.core.errors import MethodError, did_you_mean
from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, LowRank, ParamSpec
from lorica.methods.base import BaseWeight, Paper, PeftNames
from lorica.methods.lora import LoRA


class FusedLoRA(LoRA):
    """`ΔW = s · [B_q A_q; 0; B_v A_v]`: one low-rank product for each chosen map inside a fused weight, `s = α/r`.

    LoRA on such a weight shares A between q, k and v and changes all of them; this is what LoRA on three separate
    weights is. `A` is [n, r, in] for n chosen maps; `B` is [Σ of their outputs, r]. The
    rank counts for each map. Parameters: r(n·in + Σ outputs) a site. Raises MethodError at a site that is not fused or
    lacks a slice, and where the rank exceeds a map. Paper: LoRA (arXiv 2106.09685), which adapts q and v.
    """

    name: ClassVar[str] = "lora_fused"
    summary: ClassVar[str] = "LoRA's factors for each of the maps that a fused weight holds, or for some of them"
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert"})
    paper: ClassVar[Paper] = LoRA.paper
    peft: ClassVar[PeftNames | None] = None
    default_targets: ClassVar[str | tuple[str, ...]] = ("c_attn", "qkv", "qkv_proj", "gate_up_proj")

    slices: tuple[str, ...] | None = Field(
        None, min_length=1, description="names of the maps to adapt, e.g. `[q, v]`; null is every map of the weight"
    )
    lora_bias: bool = Field(False, description="always false: use the method 'bias' beside it")

    @field_validator("lora_bias")
    @classmethod
    def _no_bias(cls, value: bool) -> bool:
        if value:
            raise ValueError("lora_fused trains no bias; use the method 'bias' beside it")
        return value

    def _chosen(self, site: Site) -> list[tuple[int, int]]:
        """First row and outputs of each chosen map, in the weight's own order."""
        if not site.parts:
            raise MethodError(
                f"Site {site.name!r} is one map, not several fused ones, so {self.name!r} does not fit.",
                hint="Use the method 'lora' there.",
            )
        known = [name for name, _ in site.parts]
        for name in self.slices or ():
            if name not in known:
                raise MethodError(
                    f"Site {site.name!r} holds {', '.join(known)}; it has no slice {name!r}.{did_you_mean(name, known)}"
                )
        return list(self._rows(site))

    def _rows(self, site: Site) -> Iterator[tuple[int, int]]:
        first = 0
        for name, size in site.parts:
            if self.slices is None or name in self.slices:
                if self.rank > min(size, site.in_features):
                    raise MethodError(
                        f"Rank {self.rank} is larger than slice {name!r} of site {site.name!r} "
                        f"({size}×{site.in_features}) allows; choose at most {min(size, site.in_features)}."
                    )
                yield first, size
            first += size

    def params(self, site: Site) -> dict[str, ParamSpec]:
        chosen = self._chosen(site)
        return {
            "A": ParamSpec((len(chosen), self.rank, site.in_features), group="A"),
            "B": ParamSpec((sum(size for _, size in chosen), self.rank), group="B"),
        }

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        chosen = self._chosen(site)
        columns, first = [], 0
        for row, size in chosen:
            B_OR = p["B"][first : first + size]
            first += size
            columns.append(torch.nn.functional.pad(B_OR, (0, 0, row, site.out_features - row - size)))
        factor = LowRank(p["A"].flatten(0, 1), torch.cat(columns, dim=1), self.scaling())
        return LinearUpdate(factors=(factor,), dropout=self.dropout)
