"""Prompt tuning: trained vectors before the first token.

In: the input site and the embedding table. Out: a soft prompt. Refuses to know tokenizers, rows and optimisers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lorica.core.errors import MethodError
from lorica.core.site import Site, SiteKind
from lorica.core.update import ParamSpec, SoftPrompt
from lorica.methods.base import BaseWeight, Method, Paper, PeftNames


class Prompt(Method):
    """Prompt tuning: the model reads `[p₁ … p_P, e(x₁), …, e(x_T)]`, with trained p of shape [P, width].

    Vectors start as normal noise, as embeddings of random tokens, or as those of `init_ids`; with the last two the
    model at step 0 is the frozen one behind those tokens. No decay (zero is no natural place for a prompt).
    Parameters: P · width. Raises MethodError for token ids outside the table, ConfigError for ids that do not fit.
    Paper: arXiv 2104.08691.
    """

    name: ClassVar[str] = "prompt"
    summary: ClassVar[str] = "trained vectors before the first token"
    paper: ClassVar[Paper] = Paper(
        "The Power of Scale for Parameter-Efficient Prompt Tuning", "EMNLP 2021", "2104.08691"
    )
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"input"})
    default_targets: ClassVar[str | tuple[str, ...]] = "input"
    identity_at_init: ClassVar[str] = "none"
    peft: ClassVar[PeftNames | None] = PeftNames(
        "PROMPT_TUNING",
        tensors={"prompt": "prompt_embeddings"},
        fields={"num_virtual_tokens": "tokens"},
        fixed={"prompt_tuning_init": "RANDOM", "num_transformer_submodules": 1},
    )

    tokens: int = Field(20, ge=1, description="number P of virtual tokens")
    init_from: Literal["normal", "vocab", "ids"] = Field(
        "vocab", description="start from noise, from random tokens, or from `init_ids`"
    )
    init_std: float = Field(0.02, gt=0, description="standard deviation of `init_from: normal`")
    init_ids: tuple[int, ...] = Field(
        (), description="token ids to start from; repeated in order when there are fewer than P"
    )

    @model_validator(mode="before")
    @classmethod
    def _ids_are_meant(cls, values: Any) -> Any:
        # naming ids says where to start from, unless `init_from` says otherwise
        if isinstance(values, dict) and values.get("init_ids") and "init_from" not in values:
            return {**values, "init_from": "ids"}
        return values

    @model_validator(mode="after")
    def _ids_fit(self) -> Prompt:
        if (self.init_from == "ids") != bool(self.init_ids):
            raise ValueError("`init_from: ids` and `init_ids` belong together")
        if len(self.init_ids) > self.tokens:
            raise ValueError(f"{len(self.init_ids)} init_ids do not fit into {self.tokens} virtual tokens")
        return self

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {"prompt": ParamSpec((self.tokens, site.shape[0]), decay=False)}

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        if self.init_from == "normal":
            return {"prompt": torch.empty(self.tokens, site.shape[0]).normal_(std=self.init_std, generator=rng)}
        table_DV = weight.matrix()
        count = table_DV.shape[1]
        if self.init_from == "vocab":
            ids = torch.randint(count, (self.tokens,), generator=rng).tolist()
        else:
            ids = [self.init_ids[i % len(self.init_ids)] for i in range(self.tokens)]
            wrong = [i for i in ids if not 0 <= i < count]
            if wrong:
                raise MethodError(
                    f"Token id {wrong[0]} of `init_ids` is not in the embedding table, which has {count} tokens."
                )
        # a soft prompt enters behind the embedding module, so what the module multiplies by (Gemma) is part of it
        return {"prompt": table_DV[:, ids].T * site.scale}

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> SoftPrompt:
        return SoftPrompt(p["prompt"])
