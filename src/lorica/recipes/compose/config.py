"""The settings of both ways to compose.

In: values. Out: checked settings, and the rule of merging that they name. Refuses to know adapters and data.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from lorica.adapters.merging import get_merging, make_merging
from lorica.adapters.merging.base import Merging
from lorica.core.config import Config
from lorica.core.errors import ConfigError


class ComposeConfig(Config):
    """LoraHub's search (arXiv 2307.13269), with the published defaults and a named optimiser."""

    how: str = Field("lorahub", description="rule of merging whose weights are searched; `lorica merge --list`")
    parameters: dict[str, Any] = Field({}, description="parameters of that rule")
    optimizer: str = Field(
        "Cobyla", description="nevergrad's optimiser by name; one that chooses another by itself (NGOpt) is refused"
    )
    budget: int = Field(40, ge=1, description="evaluations of the search; random search gets as many")
    bound: float = Field(1.5, gt=0, allow_inf_nan=False, description="weights stay in [−bound, bound]")
    l1: float = Field(0.05, ge=0, allow_inf_nan=False, description="penalty on the mean of |w|")
    candidates: int | None = Field(
        None, ge=1, description="keep so many adapters, those that score best alone; null is all"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of the optimiser, of random search, and of choosing examples")

    @field_validator("how")
    @classmethod
    def _weighted(cls, how: str) -> str:
        if not get_merging(how).weighted:
            raise ConfigError(f"The rule {how!r} has no weights of parents, so there is nothing to search.")
        return how

    def rule(self) -> Merging:
        """The rule with its parameters. Raises ConfigError for an unknown one."""
        return make_merging(self.how, **self.parameters)


class SoupsConfig(Config):
    """How LoRA-Soups' weights are learnt (arXiv 2410.13025)."""

    weighting: Literal["free", "softmax"] = Field(
        "free", description="any numbers, or positive ones that sum to one at each site (`softmax`)"
    )
    spread: float = Field(0.0, ge=0, description="standard deviation of the initial logits; the authors' code has 1")
    steps: int = Field(60, ge=1, description="optimiser steps, AdamW without decay, cosine")
    lr: float = Field(0.1, gt=0, description="learning rate; the paper's 1e-4 is for ten thousand examples")
    batch_size: int = Field(8, ge=1, description="examples of one step")
    seed: int = Field(0, ge=0, lt=2**32, description="of batches, initial logits, and of choosing examples")
