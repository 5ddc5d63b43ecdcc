"""MiSS (formerly Bone, DiSHA): one trained matrix whose rows are shared by all blocks of the input.

In: a site, and for the form `bat` its frozen weight. Out: a factor beside a constant one, or a dense difference.
Refuses to know rows and optimisers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lorica.core.errors import ConfigError, MethodError
from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, LowRank, ParamSpec
from lorica.methods.base import BaseWeight, Method, Paper, PeftNames


class MiSS(Method):
    """Matrix shard sharing: `y = x W₀ᵀ + b₀ + (Σ_q x[q·r : (q+1)·r]) M`, that is `ΔW[j, k] = M[k mod r, j]`.

    M is [r, out] and starts at zero. It is a LoRA with `B = Mᵀ` and the constant `A = [I_r I_r …]`, which no adapter
    stores; where r does not divide the input, the last columns use the first rows. `form: mini` has M [r, mini_rank],
    repeated along the outputs. `form: bat` has M [out/r, r, r] and changes each r × r block of the weight through
    itself, `W'_pq = W_pq + W_pq M_p + M_p`: a dense difference. There is no scaling factor. Parameters: r·out a site;
    mini r·mini_rank, bat r·out. Raises MethodError where r or mini_rank does not fit a site. Paper: arXiv 2409.15371.
    """

    name: ClassVar[str] = "miss"
    summary: ClassVar[str] = "one trained matrix shared by all blocks of the input"
    paper: ClassVar[Paper] = Paper(
        "MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing", "2024", "2409.15371"
    )
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert"})
    peft: ClassVar[PeftNames | None] = PeftNames(
        "MISS", tensors={"M": "miss_block"}, fields={"r": "rank", "miss_dropout": "dropout"}, fixed={"bias": "none"}
    )

    rank: int = Field(64, ge=1, description="rows r of M: the input is summed in blocks of r")
    form: Literal["full", "mini", "bat"] = Field(
        "full", description="full; mini: M is repeated along the outputs; bat: blocks of the weight multiply M"
    )
    mini_rank: int | None = Field(
        None, ge=1, description="columns of M in the form mini, where it must divide every site's outputs; else null"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input, in training only; not in the form bat")

    @model_validator(mode="after")
    def _fits(self) -> MiSS:
        if (self.form == "mini") != (self.mini_rank is not None):
            raise ConfigError("MiSS has a mini_rank in the form 'mini', which needs one, and in no other form.")
        if self.form == "bat" and self.dropout:
            raise ConfigError(
                "MiSS has no dropout in the form 'bat', which has no low-rank path whose input could drop."
            )
        return self

    def params(self, site: Site) -> dict[str, ParamSpec]:
        out, width, r = site.out_features, site.in_features, self.rank
        if r > width:
            raise MethodError(f"Rank {r} exceeds the {width} inputs of site {site.name!r}; at most those is right.")
        if self.form == "bat" and (out % r or width % r):
            raise MethodError(
                f"The form 'bat' at site {site.name!r} needs a rank that divides {out} and {width}, not {r}."
            )
        if self.mini_rank is not None and out % self.mini_rank:
            raise MethodError(f"mini_rank {self.mini_rank} does not divide the {out} outputs of site {site.name!r}.")
        return {"M": ParamSpec((out // r, r, r) if self.form == "bat" else (r, self.mini_rank or out), group="M")}

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        M = p["M"]
        if self.form == "bat":
            return LinearUpdate(delta=through_weight(weight.matrix().to(M.dtype), M))
        M_RO = M if self.mini_rank is None else M.repeat(1, site.out_features // self.mini_rank)
        folding_RI = repeated_identity(self.rank, site.in_features, M.dtype, M.device)
        return LinearUpdate(factors=(LowRank(folding_RI, M_RO.T),), dropout=self.dropout)


def through_weight(W_OI: Tensor, M_PRR: Tensor) -> Tensor:
    """`W_pq M_p + M_p` for every r × r block (p, q), as one matrix [out, in]."""
    r = M_PRR.shape[-1]
    W_PRQR = W_OI.view(M_PRR.shape[0], r, -1, r)
    return (torch.einsum("paqb,pbc->paqc", W_PRQR, M_PRR) + M_PRR[:, :, None]).reshape(W_OI.shape)


@lru_cache(maxsize=128)
def repeated_identity(rank: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[I_r I_r …]` cut to `width` columns: a constant, held once for all adapters and never written to."""
    with torch.inference_mode(False):  # the first caller may serve, a later one train
        return torch.eye(rank, dtype=dtype, device=device).repeat(1, -(-width // rank))[:, :width].contiguous()
