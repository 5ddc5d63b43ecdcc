"""LoftQ: LoRA that starts from what quantising took from each weight.

In: a packed weight and its residual; or a full weight and a format, for codes and factors that are chosen together.
Out: factors whose product restores the weight as far as their rank allows. Refuses to know rows, optimisers and how
the full weights are reached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorica.core.errors import MethodError
from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, LowRank, ParamSpec
from lorica.methods.base import BaseWeight, Paper, PeftNames
from lorica.methods.lora import LearningRates, check_rank, uniform
from lorica.methods.pissa import Triplets, leading
from lorica.models.quantize.formats import Format, Packed
from lorica.models.quantize.functions import packed_as


@dataclass(frozen=True, slots=True, eq=False)
class Alternation:
    """The best iterate: codes and triplets of its low-rank part, whose number is `chosen`. `errors[t]` is `‖W − Q_t −
    L_t‖` after t iterations, Frobenius; `errors[0]` is that of the plain codes alone.
    """

    packed: Packed
    triplets: Triplets
    errors: tuple[float, ...]

    @property
    def chosen(self) -> int:
        return min(range(1, len(self.errors)), key=self.errors.__getitem__)


class LoftQ(LearningRates):
    """LoRA beside a quantised weight Q, started to minimise `‖W − Q − sBA‖`: `y = x Qᵀ + b₀ + s·x AᵀBᵀ`, `s = α/r`.

    With `U Σ Vᵀ ≈ W − Q` (the r largest), `B = U √(Σ/s)` [out, r] and `A = √(Σ/s) Vᵀ` [r, in]: the division by √s,
    which the published code lacks, makes the start the same for every α (rsLoRA: `s = α/√r`). With `iterations: 1` Q is
    the plain quantised base, shared by all, and its full weights have to be at hand. More iterations quantise `W − sBA`
    in turn with that; their best Q is a base of the adapter's own (`adapters.private_base`, `lorica train`). One
    there in full has nothing to restore: it starts as LoRA's, B = 0. There is no dropout and no decay (the factors
    carry a part of the base). Parameters: r(in + out) a site. Raises MethodError when the rank exceeds a site or a
    shared base would have to change, MissingError without the full weights. Paper: arXiv 2310.08659.
    """

    name: ClassVar[str] = "loftq"
    summary: ClassVar[str] = "LoRA that starts from what quantising took from each weight"
    paper: ClassVar[Paper] = Paper(
        "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", "ICLR 2024", "2310.08659"
    )
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert", "conv"})
    peft: ClassVar[PeftNames | None] = PeftNames(
        "LORA",
        tensors={"A": "lora_A.weight", "B": "lora_B.weight"},
        fields={"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora"},
        fixed={"use_dora": False},
    )
    restores_rounding: ClassVar[bool] = True

    rank: int = Field(8, ge=1, description="rank r of the update, and of what is restored")
    alpha: float = Field(
        16.0, gt=0, description="numerator of s = alpha / rank; it changes step sizes, not the initial function"
    )
    rslora: bool = Field(False, description="s = alpha / sqrt(rank)")
    iterations: int = Field(
        1, ge=1, description="alternations T; 1 leaves the base as it is, more need a base of the adapter's own"
    )
    svd: Literal["exact", "lowrank"] = Field(
        "exact", description="full decomposition, or seeded subspace iteration (faster, nearly equal)"
    )
    niter: int = Field(4, ge=0, description="power iterations of `svd: lowrank`")

    def scaling(self) -> float:
        """`α/r`, or `α/√r` with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        check_rank(self.rank, site)
        return {
            "A": ParamSpec((self.rank, *site.shape[1:]), decay=False, group="A"),
            "B": ParamSpec((site.out_features, self.rank), decay=False, group="B"),
        }

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        residual_OI = weight.residual()
        if residual_OI is None:
            return {"A": uniform(self.params(site)["A"].shape, math.prod(site.shape[1:]) ** -0.5, rng)}
        if self.iterations > 1:
            raise MethodError(
                f"LoftQ with {self.iterations} iterations chooses the codes of site {site.name!r} anew, and this base "
                "is one that others share.",
                hint="Leave `iterations` at 1, or train with a base of its own: `lorica train` makes one.",
            )
        return self.factors(leading(residual_OI, self.rank, self._niter, rng))

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        return LinearUpdate(factors=(LowRank(p["A"], p["B"], self.scaling()),))

    @property
    def _niter(self) -> int | None:
        return None if self.svd == "exact" else self.niter

    def factors(self, triplets: Triplets) -> dict[str, Tensor]:
        """A and B with `sBA = U Σ Vᵀ`. A direction with σ = 0 keeps a row of A, so that it can learn from B = 0."""
        U_OR, S_R, V_RI = triplets
        root_R = (S_R / self.scaling()).sqrt()
        return {"A": torch.where(root_R > 0, root_R, 3**-0.5)[:, None] * V_RI, "B": U_OR * root_R}

    def alternate(self, W_OI: Tensor, form: Format, rng: torch.Generator) -> Alternation:
        """Codes and factors of one weight together; see `alternate`."""
        return alternate(W_OI, form, self.rank, self.iterations, rng, self._niter)


def alternate(
    W_OI: Tensor, form: Format, rank: int, iterations: int, rng: torch.Generator, niter: int | None = None
) -> Alternation:
    """`Q_t = Q(W − L_{t−1})`, `L_t = SVD_r(W − Q_t)` for t = 1 … `iterations`, from `L_0 = 0`; the best of them.

    The error is not monotone in t. W is [out, in] of any dtype, Q_t in that dtype; `rank` 0 is plain quantising.
    Raises FormatError for values that are not finite.
    """
    wide = torch.promote_types(W_OI.dtype, torch.float32)
    W, L_OI = W_OI.to(wide), torch.zeros_like(W_OI, dtype=wide)
    errors: list[float] = []
    best: tuple[Packed, Triplets] | None = None
    for _ in range(iterations):
        packed = packed_as(form, W - L_OI)
        residual_OI = W - packed.dense(W_OI.dtype).to(wide)
        errors = errors or [float(residual_OI.norm())]
        triplets = leading(residual_OI, rank, niter, rng)
        L_OI = (triplets[0] * triplets[1]) @ triplets[2]
        errors.append(float((residual_OI - L_OI).norm()))
        if best is None or errors[-1] < min(errors[1:-1]):
            best = packed, triplets
    assert best is not None
    return Alternation(*best, tuple(errors))
