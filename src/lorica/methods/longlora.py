"""LongLoRA: LoRA on attention, with trained embeddings and norms, for contexts longer than the base was made for.

In: a site. Out: factors at a linear site, a dense difference at an embedding or a norm. Refuses to know attention
patterns and positions: these belong to the run and to the base, which all adapters of a batch share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, ParamSpec
from lorica.methods.base import BaseWeight, Paper, PeftNames
from lorica.methods.lora import LoRA

ATTENTION = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama and its kin
    *("c_attn", "attn.c_proj"),  # GPT-2
    *("query_key_value", "attention.dense"),  # GPT-NeoX
    *("self.query", "self.key", "self.value", "attention.output.dense"),  # BERT
)
"""What the projections of attention are called in several families."""


class LongLoRA(LoRA):
    """LoRA on the attention's projections, and every embedding and norm in full:

        linear:     y = x W₀ᵀ + b₀ + s · drop(x) Aᵀ Bᵀ,   s = α / r
        embedding:  y = (W₀ + Δ)[:, token]                 Δ is [width, tokens]
        norm:       y = normalise(x) ⊙ (w₀ + Δw) (+ b₀ + Δb)

    All differences start at zero, so step 0 is the base (under the run's attention and positions). Where the embedding
    is tied to the output head, Δ acts on the lookup alone and the head stays as it is; such a Δ cannot be merged.
    Norms do not decay; embeddings decay towards the base's. Parameters: r(in + out) a linear site, width · tokens an
    embedding, and the features of each norm (twice with a bias). Raises MethodError when the rank exceeds a site.
    Paper: arXiv 2309.12307.
    """

    name: ClassVar[str] = "longlora"
    summary: ClassVar[str] = "LoRA on attention with trained embeddings and norms, for long contexts"
    paper: ClassVar[Paper] = Paper(
        "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models", "ICLR 2024", "2309.12307"
    )
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "embedding", "norm"})
    default_targets: ClassVar[str | tuple[str, ...]] = (*ATTENTION, "all-embedding", "all-norm")
    peft: ClassVar[PeftNames | None] = None

    def params(self, site: Site) -> dict[str, ParamSpec]:
        if site.kind == "linear":
            return super().params(site)
        if site.kind == "embedding":
            return {"delta": ParamSpec(site.shape, group="embedding")}
        spec = ParamSpec(site.shape, decay=False, group="norm")
        return {"delta": spec, "bias": spec} if site.bias else {"delta": spec}

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        return super().init(site, weight, rng) if site.kind == "linear" else {}

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        if site.kind == "linear":
            return super().lower(site, p, weight)
        return LinearUpdate(delta=p["delta"], bias_O=p.get("bias"))
