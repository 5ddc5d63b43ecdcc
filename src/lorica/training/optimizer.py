"""One adapter's AdamW: torch's own, over a few flat tensors, with clipping and a schedule.

In: an adapter whose gradient row is filled. Out: new values in place, and the norm of the gradient.
Refuses to know losses, batches and other adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.core.config import Config
from lorica.core.errors import ConfigError, FormatError, MethodError, did_you_mean

ScheduleName = Literal["constant", "linear", "cosine"]
MOMENTS = ("exp_avg", "exp_avg_sq")
"""The rows that Adam keeps beside an adapter's values."""


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


@dataclass(frozen=True, slots=True)
class AdamStep:
    """The settings of one step, where no schedule decides them; `clip` is the largest norm, 0 is off.

    A rate may be as large as it likes: what becomes of the adapter is its owner's affair. Raises ConfigError.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"Adam's {name} is {value}; a finite number that is not negative is right.")
        for name, beta in zip(("beta1", "beta2"), self.betas, strict=True):
            if not 0 <= beta < 1:
                raise ConfigError(f"Adam's {name} is {beta}; at least 0 and less than 1 is right.")


class AdapterOptimizer:
    """`torch.optim.AdamW` (fused where torch has it) over one adapter's flat groups.

    Each step is set by the config and its schedule, or by an `AdamStep`. The moments are two rows as the adapter's
    own, `exp_avg` and `exp_avg_sq`; they are made by the first step, so an optimiser that never steps costs nothing.
    """

    def __init__(self, adapter: Adapter, config: AdamWConfig | None = None, *, steps: int = 1) -> None:
        self.adapter = adapter
        self.config = config or AdamWConfig()
        self.done = 0
        self._factor = schedule(self.config, steps)
        self._flat = adapter.flat
        self._adamw: torch.optim.AdamW | None = None
        self._moments: tuple[Tensor, Tensor] | None = None
        own = {group.name for group in adapter.layout.groups}
        for name in self.config.group_lr:
            if name not in own:
                raise ConfigError(
                    f"group_lr names {name!r}, but {adapter.method.name!r} has no parameter group {name!r}; "
                    f"its groups are {', '.join(sorted(own))}.{did_you_mean(name, own)}"
                )

    @property
    def lr(self) -> float:
        """The learning rate of the next scheduled step, before group factors."""
        return self.config.lr * self._factor(self.done)

    def step(self, settings: AdamStep | None = None, *, scale: float = 1.0) -> float:
        """One step with the gradient times `scale`; the gradient is zeroed. Returns its norm before clipping, after
        scaling. Without settings, the config and its schedule decide.

        A gradient that is not finite moves neither the adapter nor the schedule; the norm that is returned tells.
        Raises MethodError after the adapter was moved or cast: this optimiser would step values that nobody reads.
        """
        if self.adapter.flat is not self._flat:
            raise MethodError(
                f"Adapter {self.adapter.name!r} was moved or cast after its optimiser was made.",
                hint="Call `adapter.to(…)` first, then make the optimiser.",
            )
        config = self.config
        if settings is None:
            clip = config.clip or 0.0
            settings = AdamStep(self.lr, config.betas, config.eps, config.weight_decay, clip)
        grad = self.adapter.collect_grad()
        if scale != 1.0:
            grad.mul_(scale)
        norm = float(torch.linalg.vector_norm(grad))
        if settings.clip and norm > settings.clip:
            grad.mul_(settings.clip / norm)
        if math.isfinite(norm):
            self._torch(settings).step()
            self.done += 1
        self.adapter.zero_grad()
        return norm

    def _torch(self, settings: AdamStep) -> torch.optim.AdamW:
        """torch's optimiser, made on first use, with the settings of this step."""
        if self._adamw is None:
            self._adamw = self._made()
        for group in self._adamw.param_groups:
            group["lr"] = settings.lr * self.config.group_lr.get(group["name"], 1.0)
            group["betas"], group["eps"] = settings.betas, settings.eps
            group["weight_decay"] = settings.weight_decay if group["decay"] else 0.0
        return self._adamw

    def _made(self) -> torch.optim.AdamW:
        """torch's optimiser, its moments being slices of our two rows."""
        groups = self.adapter.optimizer_groups()
        adamw = torch.optim.AdamW(groups, lr=0.0, fused=True)
        first, second = self._moments or (torch.zeros_like(self._flat), torch.zeros_like(self._flat))
        self._moments = first, second
        for own, group in zip(self.adapter.layout.groups, groups, strict=True):
            (values,) = group["params"]
            span = slice(own.start, own.stop)
            step = torch.tensor(float(self.done), device=self._flat.device)
            adamw.state[values] = {"step": step, "exp_avg": first[span], "exp_avg_sq": second[span]}
        return adamw

    def tensors(self) -> dict[str, Tensor]:
        """The two moments themselves, not copies; none before the first step. With `done`, all there is to continue."""
        return {} if self._moments is None else dict(zip(MOMENTS, self._moments, strict=True))

    def restore(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Continue from copies of `tensors()` after `done` steps. Raises FormatError where they are not this
        adapter's.
        """
        if set(tensors) != (set(MOMENTS) if done else set()):
            raise FormatError(
                f"An optimiser after {done} steps has {' and '.join(MOMENTS) if done else 'no moments'}; "
                f"this one has {', '.join(sorted(tensors)) or 'none'}."
            )
        for name, value in tensors.items():
            if value.shape != self._flat.shape:
                raise FormatError(
                    f"Moment {name!r} has shape {tuple(value.shape)}; the adapter's {tuple(self._flat.shape)} is right."
                )
        kept = [tensors[name].detach().to(self._flat, copy=True) for name in MOMENTS] if tensors else None
        self._moments = None if kept is None else (kept[0], kept[1])
        self._adamw, self.done = None, done

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that continues the optimiser; later steps do not change it."""
        return {"done": self.done, **{name: value.clone() for name, value in self.tensors().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. Raises FormatError where it is another adapter's."""
        self.restore({name: value for name, value in state.items() if name != "done"}, int(state["done"]))
