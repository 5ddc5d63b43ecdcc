"""LoRA, with rsLoRA scaling, Init[A] or Init[B], a bias of its own, and embedding and convolution sites.

In: a site. Out: factors A, B, and a learning rate for each (LoRA+). Refuses to know rows, dropout masks and optimisers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lorica.core.errors import ConfigError, MethodError
from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, LowRank, ParamSpec
from lorica.methods.base import BaseWeight, Method, Paper, PeftNames


def check_rank(rank: int, site: Site) -> None:
    """Raises MethodError when a rank exceeds what the site's weight can have."""
    rows, cols = site.shape[0], math.prod(site.shape[1:])
    if rank > min(rows, cols):
        raise MethodError(
            f"Rank {rank} is larger than site {site.name!r} ({rows}×{cols}) allows; choose at most {min(rows, cols)}.",
            hint="A per-site `rank_pattern` can lower it for this site alone.",
        )


def uniform(shape: tuple[int, ...], bound: float, rng: torch.Generator) -> Tensor:
    """Values of U(−bound, bound)."""
    return torch.empty(shape).uniform_(-bound, bound, generator=rng)


class LearningRates(Method):
    """Base of methods whose tensors of group "A" read the input and of group "B" write the output: LoRA+.

    `lr_A = η`, `lr_B = λη`, and embeddings' factors (group "embedding") `lr_embedding · η`. Weight decay is
    decoupled, so it too follows a group's rate. A tensor of one axis is in neither group: a magnitude or a bias keeps
    η. Raises ConfigError for an `lr_embedding` of a method that adapts no embeddings. Paper: arXiv 2402.12354.
    """

    lr_ratio: float = Field(1.0, gt=0, description="LoRA+: learning rate of B over that of A; the paper advises 16")
    lr_embedding: float = Field(
        1.0, gt=0, description="learning rate of both factors of an embedding over that of the other sites' A"
    )

    @model_validator(mode="after")
    def _has_embeddings(self) -> Self:
        if self.lr_embedding != 1 and "embedding" not in self.kinds:
            raise ConfigError(
                f"{type(self).__name__}.lr_embedding is {self.lr_embedding:g}, but {self.name!r} adapts no embeddings; "
                "leave it out."
            )
        return self

    def group_lr(self) -> dict[str, float]:
        return {"B": self.lr_ratio, "embedding": self.lr_embedding}


class LoRA(LearningRates):
    """Low-rank adaptation: `y = x W₀ᵀ + b + s · drop(x) Aᵀ Bᵀ (+ s·b_B)`, `s = α/r` (rsLoRA: `α/√r`).

    A is [r, in], B is [out, r]. On a convolution A has the base's kernel and B is 1×1; on an embedding A is [r, tokens]
    and starts at zero (a lookup has no fan-in). Parameters: r(in + out) a linear site. Raises MethodError when the rank
    exceeds a site. Papers: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), Init[A]/[B] (2406.08447), LoRA+ (2402.12354).
    """

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "low-rank product beside each weight"
    paper: ClassVar[Paper] = Paper("LoRA: Low-Rank Adaptation of Large Language Models", "ICLR 2022", "2106.09685")
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert", "embedding", "conv"})
    peft: ClassVar[PeftNames | None] = PeftNames(
        "LORA",
        tensors={"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias"},
        fields={
            "r": "rank",
            "lora_alpha": "alpha",
            "lora_dropout": "dropout",
            "use_rslora": "rslora",
            "lora_bias": "lora_bias",
        },
        fixed={"use_dora": False},
    )

    rank: int = Field(8, ge=1, description="rank r of the update; cost and capacity grow with it")
    alpha: float = Field(16.0, gt=0, description="numerator of the scaling s = alpha / rank")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank), so that high ranks keep their learning rate")
    init_factor: Literal["a", "b"] = Field(
        "a", description="which factor starts random: a (default) or b; the other is zero"
    )
    init_dist: Literal["kaiming", "normal", "gaussian"] = Field(
        "kaiming", description="random factor: U(±1/√fan_in), N(0, 1/fan_in), or PEFT's gaussian N(0, 1/rank²)"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the low-rank path, in training only")
    lora_bias: bool = Field(
        False, description="train a bias beside B; it can be merged only where the module has a bias"
    )

    def scaling(self) -> float:
        """`α/r`, or `α/√r` with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        check_rank(self.rank, site)
        lookup = site.kind == "embedding"
        specs = {
            "A": ParamSpec((self.rank, *site.shape[1:]), group="embedding" if lookup else "A"),
            "B": ParamSpec((site.out_features, self.rank), group="embedding" if lookup else "B"),
        }
        if self.lora_bias and site.kind == "embedding":
            raise MethodError(f"An embedding has no bias, so `lora_bias` cannot apply at site {site.name!r}.")
        if self.lora_bias:
            specs["bias"] = ParamSpec((site.out_features,), decay=False, group="bias")
        return specs

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        shapes = {name: spec.shape for name, spec in self.params(site).items()}
        if site.kind == "embedding":
            # a lookup has no fan-in: the token side is zero and the dense side is unit normal, as PEFT and loralib do
            return {"B": torch.empty(shapes["B"]).normal_(generator=rng)}
        random, fan_in = ("A", math.prod(site.shape[1:])) if self.init_factor == "a" else ("B", self.rank)
        if self.init_dist == "kaiming":
            return {random: uniform(shapes[random], fan_in**-0.5, rng)}
        std = fan_in**-0.5 if self.init_dist == "normal" else 1 / self.rank
        return {random: torch.empty(shapes[random]).normal_(std=std, generator=rng)}

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        scale, bias = self.scaling(), p.get("bias")
        return LinearUpdate(
            factors=(LowRank(p["A"], p["B"], scale),),
            bias_O=None if bias is None else scale * bias,
            dropout=0.0 if site.kind == "embedding" else self.dropout,
        )
