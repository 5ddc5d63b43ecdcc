"""Adaptive quantisation noise: Gaussian noise on norm weights, for exploration in rollouts.

In: a norm site, a standard deviation. Out: the noise as a difference to the norm's weight; and its schedule over a
training run. Refuses to know rollouts, rewards and when a draw is due (`client.noise`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lorica.core.errors import ConfigError
from lorica.core.site import Site
from lorica.core.update import LinearUpdate, ParamSpec
from lorica.methods.base import BaseWeight, Paper, PeftNames
from lorica.methods.norm import Norm

START, END, STAGES = 1e-2, 1e-4, 10
"""The schedule of the paper's training script."""


def schedule(step: int, steps: int, *, start: float = START, end: float = END, stages: int = STAGES) -> float:
    """The standard deviation of the noise at training step `step` of `steps`, which are K = `stages` equal intervals:

        σ = 0 in the first,   σ = start · (end / start)^((j − 1) / (K − 2)) in interval j = 1 … K − 1

    and that of the last interval from `steps` on. Raises ConfigError for fewer than three stages, which have no trend,
    and for numbers out of range. Paper: arXiv 2510.11696.
    """
    if stages < 3:
        raise ConfigError(
            f"The noise has {stages} stages; three are the least: one without noise, one at `start`, one at `end`."
        )
    if not (0 < start < math.inf and 0 < end < math.inf):
        raise ConfigError(f"The noise goes from {start} to {end}; both must be positive numbers.")
    if steps < 1 or step < 0:
        raise ConfigError(
            f"Step {step} of {steps} is no step of a run; steps count from 0, and a run has at least one."
        )
    interval = min(step * stages // steps, stages - 1)
    return 0.0 if interval == 0 else start * (end / start) ** ((interval - 1) / (stages - 2))


class AQN(Norm):
    """Noise on norms: `y = normalise(x) ⊙ (w₀ + z + Δw) (+ b₀ + Δb)`, z ~ N(0, σ²) drawn once for each site.

    z is [features], frozen, and a function of the adapter's seed and the site; with σ = 0 the output is the base's, bit
    for bit. It is what multiplies column i of the linear maps behind the norm by `1 + zᵢ / wᵢ` would do, without
    touching their (perhaps packed) weights. Noise is meant for sampling alone: the adapter of a draw is stacked on the
    tenant's and never trained, so that draws do not add up. Δw and Δb are norm tuning's, and zero unless somebody does
    train them. Parameters: those of norm tuning. Paper: arXiv 2510.11696.
    """

    name: ClassVar[str] = "aqn"
    summary: ClassVar[str] = "Gaussian noise on norm weights, for exploration in rollouts"
    paper: ClassVar[Paper] = Paper(
        "QeRL: Beyond Efficiency -- Quantization-enhanced Reinforcement Learning for LLMs", "2025", "2510.11696"
    )
    identity_at_init: ClassVar[str] = "none"
    peft: ClassVar[PeftNames | None] = None

    sigma: float = Field(START, ge=0, allow_inf_nan=False, description="standard deviation σ of the noise")

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {**super().params(site), "noise": ParamSpec(site.shape, trainable=False)}

    def init(self, site: Site, weight: BaseWeight, rng: torch.Generator) -> dict[str, Tensor]:
        return {"noise": self.sigma * torch.randn(site.shape, generator=rng)}

    def lower(self, site: Site, p: Mapping[str, Tensor], weight: BaseWeight) -> LinearUpdate:
        return LinearUpdate(delta=p["weight"] + p["noise"], bias_O=p.get("bias"))
