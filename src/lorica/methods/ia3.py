"""IA³: a trained scale for every key, value and inner feed-forward feature.

In: a site and its place in the block. Out: an output scale, or at a feed-forward's second map an input scale.
Refuses to know rows and optimisers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from lorica.core.site import Site, SiteKind
from lorica.core.update import LinearUpdate, ParamSpec
from lorica.methods.base import BaseWeight, Method, Paper, PeftNames


class IA3(Method):
    """Scaled inner activations: `y = l ⊙ (W₀ x + b₀)`, and at feed-forward sites `y = W₀ (l ⊙ x) + b₀`.

    l is [out], or [in] at a site that `feedforward` names; it starts at one and is not decayed. The defaults are
    keys, values and the second feed-forward map of Llama-, GPT-2-, BERT-, OPT- and T5-like models; GPT-2's fused
    query-key-value map is scaled as a whole, as HF PEFT does. It needs learning rates of 1e-3 and more. Parameters:
    out, or in, a site. Paper: arXiv 2205.05638.
    """

    name: ClassVar[str] = "ia3"
    summary: ClassVar[str] = "a trained scale for keys, values and inner feed-forward features"
    paper: ClassVar[Paper] = Paper(
        "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
        "NeurIPS 2022",
        "2205.05638",
    )
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "expert", "conv"})
    default_targets: ClassVar[str | tuple[str, ...]] = (
        *("k_proj", "v_proj", "down_proj", "fc2", "c_attn", "mlp.c_proj", "query_key_value", "dense_4h_to_h"),
        *(
            "attention.self.key",
            "attention.self.value",
            r"re:.*layer\.\d+\.output\.dense",
            "SelfAttention.k",
            "SelfAttention.v",
            "wo",
        ),
    )
    peft: ClassVar[PeftNames | None] = PeftNames(
        "IA3", tensors={"l": "ia3_l"}, fields={"feedforward_modules": "feedforward"}, fixed={"init_ia3_weights": True}
    )

    feedforward: tuple[str, ...] = Field(
        ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h", "output.dense", "wo", "w2"),
        description="names or suffixes of the sites whose input is scaled; all others have their output scaled",
    )

    @field_validator("feedforward", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def is_feedforward(self, site: Site) -> bool:
        """Whether the scale acts on the site's input."""
        return any(site.name == entry or site.name.endswith("." + entry) for entry in self.feedforward)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        features = site.in_features if self.is_feedforward(site) else site.out_features
        return {"l": ParamSpec((features,), decay=False)}

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.ones(spec.shape) for name, spec in self.params(site).items()}

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        if self.is_feedforward(site):
            return LinearUpdate(in_scale_I=p["l"])
        return LinearUpdate(out_scale_O=p["l"], scale_bias=True)
