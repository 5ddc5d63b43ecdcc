"""One adapter's optimiser: torch's own AdamW (or SGD) over a few flat tensors, with clipping, a schedule, and what the
adapter's method does before and after a step.

In: an adapter whose gradient row is filled. Out: new values in place, and the norm of the gradient.
Refuses to know losses, batches, other adapters, and what a method does in its hooks.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.layout import GLOBAL
from lorica.core.config import Config
from lorica.core.errors import ConfigError, FormatError, MethodError, did_you_mean
from lorica.methods.base import SharedStep, SiteStep, Step
from lorica.training.paged import check_paged, paged_zeros

ScheduleName = Literal["constant", "linear", "cosine"]
MOMENTS = ("exp_avg", "exp_avg_sq")
"""The rows that Adam keeps beside an adapter's values."""
OWN = "state/"
"""Before the names of what the adapter's method keeps between steps (`Step.state`)."""


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
    paged: bool = Field(
        False, description="keep the moments in memory that CUDA may page out to the host (needs bitsandbytes)"
    )


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
    """`torch.optim.AdamW` (fused where torch has it) over one adapter's flat groups, and the method's step hooks.

    Each step is set by the config and its schedule, or by an `AdamStep`. The moments are two rows as the adapter's
    own, `exp_avg` and `exp_avg_sq`; they are made by the first step, so an optimiser that never steps costs nothing.
    A method with `plain_steps` is stepped by `torch.optim.SGD`, which keeps nothing. `steps` are those planned: what
    the schedule spans and a method's own schedules may ask for; None where nobody knows.
    """

    def __init__(self, adapter: Adapter, config: AdamWConfig | None = None, *, steps: int | None = None) -> None:
        self.adapter = adapter
        self.config = config or AdamWConfig()
        self.done = 0
        self.steps = steps
        self._factor = schedule(self.config, steps or 1)
        self._flat = adapter.flat
        self._plain = adapter.method.plain_steps
        self._hooks = adapter.method.has_step_hooks()
        self._own: dict[str, Tensor] = {}
        self._torch: torch.optim.Optimizer | None = None
        self._moments: tuple[Tensor, Tensor] | None = None
        if self.config.paged:
            check_paged(adapter.flat)
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
            hooked = self._hooked(settings) if self._hooks else None
            if hooked is not None:
                self.adapter.method.before_step(hooked)
            self._ready(settings).step()
            if hooked is not None:
                self.adapter.method.after_step(hooked)
            self.done += 1
        self.adapter.zero_grad()
        return norm

    @torch.no_grad()
    def _hooked(self, settings: AdamStep) -> Step:
        """What the method may see of this step; gradients are gathered in the row already."""
        adapter, layout = self.adapter, self.adapter.layout
        own = type(adapter.method)
        sites = {
            name: SiteStep(site, layout.methods[name], adapter.values(name), adapter.gradients(name))
            for name, site in layout.sites.items()
            if type(layout.methods[name]) is own
        }
        shared = SharedStep(adapter.values(GLOBAL), adapter.gradients(GLOBAL))
        # torch's CPU generator reads the low 32 bits of a seed alone
        rng = torch.Generator().manual_seed(zlib.crc32(f"{adapter.seed}/step {self.done}".encode()))
        s = settings
        return Step(self.done, self.steps, s.lr, s.betas, s.eps, s.weight_decay, sites, shared, self._own, rng)

    def _ready(self, settings: AdamStep) -> torch.optim.Optimizer:
        """torch's optimiser, made on first use, with the settings of this step."""
        if self._torch is None:
            self._torch = self._made()
        factors = self.adapter.method.group_lr()
        for group in self._torch.param_groups:
            name = group["name"]
            group["lr"] = settings.lr * self.config.group_lr.get(name, 1.0) * factors.get(name, 1.0)
            group["weight_decay"] = settings.weight_decay if group["decay"] else 0.0
            if not self._plain:
                group["betas"], group["eps"] = settings.betas, settings.eps
        return self._torch

    def _made(self) -> torch.optim.Optimizer:
        """torch's optimiser, its moments being slices of our two rows."""
        groups = self.adapter.optimizer_groups()
        if self._plain:
            return torch.optim.SGD(groups, lr=0.0, foreach=False)
        adamw = torch.optim.AdamW(groups, lr=0.0, fused=True)
        first, second = self._moments or (self._zeros(), self._zeros())
        self._moments = first, second
        for own, group in zip(self.adapter.layout.groups, groups, strict=True):
            (values,) = group["params"]
            span = slice(own.start, own.stop)
            step = torch.tensor(float(self.done), device=self._flat.device)
            adamw.state[values] = {"step": step, "exp_avg": first[span], "exp_avg_sq": second[span]}
        return adamw

    def _zeros(self) -> Tensor:
        return paged_zeros(self._flat) if self.config.paged else torch.zeros_like(self._flat)

    def tensors(self) -> dict[str, Tensor]:
        """The two moments and what the method keeps: themselves, not copies; none before the first step. With `done`
        and the adapter, all there is to continue.
        """
        own = {f"{OWN}{name}": value for name, value in self._own.items()}
        return own if self._moments is None else {**dict(zip(MOMENTS, self._moments, strict=True)), **own}

    def restore(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Continue from copies of `tensors()` after `done` steps. Raises FormatError where they are not this
        adapter's.
        """
        own = {name.removeprefix(OWN): value for name, value in tensors.items() if name.startswith(OWN)}
        moments = {name: value for name, value in tensors.items() if not name.startswith(OWN)}
        expected = set(MOMENTS) if done and not self._plain else set()
        if set(moments) != expected:
            raise FormatError(
                f"An optimiser after {done} steps has {' and '.join(sorted(expected)) or 'no moments'}; "
                f"this one has {', '.join(sorted(moments)) or 'none'}."
            )
        if own and not (self._hooks and done):
            raise FormatError(
                f"The optimiser's state has {', '.join(sorted(own))}, which method {self.adapter.method.name!r} "
                f"does not keep after {done} steps."
            )
        for name, value in moments.items():
            if value.shape != self._flat.shape:
                raise FormatError(
                    f"Moment {name!r} has shape {tuple(value.shape)}; the adapter's {tuple(self._flat.shape)} is right."
                )
        kept = [self._zeros().copy_(moments[name].detach()) for name in MOMENTS] if moments else None
        self._moments = None if kept is None else (kept[0], kept[1])
        self._own = {name: value.detach().to(self._flat.device, copy=True) for name, value in own.items()}
        self._torch, self.done = None, done

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that continues the optimiser; later steps do not change it."""
        return {"done": self.done, **{name: value.clone() for name, value in self.tensors().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. Raises FormatError where it is another adapter's."""
        self.restore({name: value for name, value in state.items() if name != "done"}, int(state["done"]))
