"""One adapter's AdamW: torch's own, over a few flat tensors, with clipping and a schedule.

In: an adapter whose gradient row is filled. Out: new values in place, and the norm of the gradient.
Refuses to know losses, batches and other adapters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field

from lorica.adapters.adapter import Adapter
from lorica.core.config import Config
from lorica.core.errors import ConfigError, MethodError, did_you_mean

ScheduleName = Literal["constant", "linear", "cosine"]


class AdamWConfig(Config):
    """AdamW with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), a schedule, and clipping by global
    norm.
    """

    lr: float = Field(2e-3, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay rates of the two moments")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay; a method's no-decay tensors never decay")
    group_lr: dict[str, float] = Field(
        {}, description="learning-rate factor by the method's parameter group, e.g. `B: 16`"
    )
    clip: float | None = Field(1.0, gt=0, description="largest norm of the whole gradient; null turns clipping off")
    schedule: ScheduleName = Field("cosine", description="shape of the learning rate after warm-up")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate rises linearly from zero")
    floor: float = Field(0.0, ge=0, le=1, description="what the rate falls towards, as a share of the peak")


def schedule(config: AdamWConfig, steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at each of `steps` optimiser steps (0-based)."""
    warm = max(1, round(config.warmup * steps)) if config.warmup else 0

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        done = min(1.0, (step - warm) / max(1, steps - warm))
        if config.schedule == "constant":
            return 1.0
        fall = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return config.floor + (1 - config.floor) * fall

    return factor


class AdapterOptimizer:
    """`torch.optim.AdamW` (fused where torch has it) and `LambdaLR` over one adapter's flat groups."""

    def __init__(self, adapter: Adapter, config: AdamWConfig, *, steps: int = 1) -> None:
        self.adapter = adapter
        self.config = config
        groups, own = [], {group.name for group in adapter.layout.groups}
        for name in config.group_lr:
            if name not in own:
                raise ConfigError(
                    f"group_lr names {name!r}, but {adapter.method.name!r} has no parameter group {name!r}; "
                    f"its groups are {', '.join(sorted(own))}.{did_you_mean(name, own)}"
                )
        for group in adapter.optimizer_groups():
            decay = config.weight_decay if group["decay"] else 0.0
            factor = config.group_lr.get(group["name"], 1.0)
            groups.append({"params": group["params"], "lr": config.lr * factor, "weight_decay": decay})
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adamw, schedule(config, steps))
        self._flat = adapter.flat

    @property
    def lr(self) -> float:
        """The learning rate of the next step, before group factors."""
        return self.config.lr * float(self.schedule.lr_lambdas[0](self.schedule.last_epoch))

    def step(self, *, scale: float = 1.0) -> float:
        """One step with the gradient times `scale`; the gradient is zeroed. Returns its norm before clipping, after
        scaling.

        A gradient that is not finite moves neither the adapter nor the schedule; the norm that is returned tells.
        Raises MethodError after the adapter was moved or cast: this optimiser would step values that nobody reads.
        """
        if self.adapter.flat is not self._flat:
            raise MethodError(
                f"Adapter {self.adapter.name!r} was moved or cast after its optimiser was made.",
                hint="Call `adapter.to(…)` first, then make the optimiser.",
            )
        grad = self.adapter.collect_grad()
        if scale != 1.0:
            grad.mul_(scale)
        norm = float(torch.linalg.vector_norm(grad))
        if self.config.clip is not None and norm > self.config.clip:
            grad.mul_(self.config.clip / norm)
        if math.isfinite(norm):
            self.adamw.step()
            self.schedule.step()
        self.adapter.zero_grad()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that continues the optimiser; later steps do not change it."""
        return copy.deepcopy({"adamw": self.adamw.state_dict(), "schedule": self.schedule.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(copy.deepcopy(state["adamw"]))  # torch would go on in the caller's tensors
        self.schedule.load_state_dict(state["schedule"])
