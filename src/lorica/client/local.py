"""The in-process client: a service over one backbone, training clients and sampling clients.

In: a backbone, methods, examples, prompts. Out: losses, steps, samples, checkpoints. Recipes speak to these three
classes only, so that they do not know whether the backbone is in this process. Refuses to know data files, configs
and terminals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorica.adapters.adapter import Adapter
from lorica.adapters.lineage import Data
from lorica.adapters.parents import note_training
from lorica.core.errors import DataError, FormatError, MethodError
from lorica.data.example import Example
from lorica.engine.engine import Engine, Item, Result
from lorica.engine.host import Host, RowSpec, TargetSpec
from lorica.engine.sample import Sample, generate
from lorica.methods.base import Method
from lorica.models.backbone import Backbone
from lorica.sampling.params import SamplingParams
from lorica.training.optimizer import AdamWConfig, AdapterOptimizer

Beneath = str | Path | Adapter
"""An adapter to stand on: its folder, or itself where it is resident."""


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step: the gradient's norm before clipping, and the learning rate that was used."""

    grad_norm: float
    lr: float


@dataclass(frozen=True, slots=True)
class Loss:
    """`total = Σ w · −log p` over a batch, and `weight = Σ |w|`; `mean` is what curves show."""

    total: float
    weight: float
    results: tuple[Result, ...]

    @property
    def mean(self) -> float:
        return self.total / self.weight if self.weight else float("nan")


class Service:
    """One backbone, many adapters; the place where clients come from."""

    def __init__(self, backbone: Backbone, *, token_budget: int = 2048) -> None:
        self.host = Host(backbone)
        self.engine = Engine(self.host, token_budget=token_budget)

    def training_client(
        self,
        method: Method,
        targets: TargetSpec = None,
        *,
        name: str = "default",
        seed: int = 0,
        optimizer: AdamWConfig | None = None,
        steps: int | None = None,
        on: Sequence[Beneath] = (),
    ) -> TrainingClient:
        """A new adapter and a client that trains it for `steps` optimiser steps.

        `on` stacks it: these adapters, folders or resident ones, innermost first, act frozen in every pass beneath the
        new one, which alone is trained and saved. Raises TargetError, MethodError; for folders FormatError,
        MismatchError.
        """
        beneath = self._held(on)
        adapter = self.host.add(name, method, targets, seed=seed, on=beneath)
        return TrainingClient(self, adapter, optimizer or AdamWConfig(), steps, beneath)

    def continue_client(
        self,
        path: str | Path,
        *,
        name: str = "default",
        optimizer: AdamWConfig | None = None,
        steps: int | None = None,
        on: Sequence[Beneath] = (),
    ) -> TrainingClient:
        """A client that trains what is in an adapter folder further: the same method and sites, starting from its
        values, its seed and what its method counts, with a fresh optimiser and schedule.

        `on` are the adapters that it was trained on top of, if any. Raises FormatError, MismatchError, MethodError.
        """
        beneath = self._held(on)
        adapter = self.host.continue_from(path, name, on=beneath)
        return TrainingClient(self, adapter, optimizer or AdamWConfig(), steps, beneath)

    def _held(self, on: Sequence[Beneath]) -> tuple[Adapter, ...]:
        """The adapters of a stack, folders read once however many clients stand on them."""
        found = []
        for which in on:
            if isinstance(which, Adapter):
                found.append(which)
                continue
            name = f"beneath {Path(which).resolve()}"
            found.append(self.host.adapters.get(name) or self.host.load(which, name))
        return self.host.hold(found)

    def forward_backward(self, batches: Sequence[tuple[TrainingClient, Sequence[Example]]]) -> list[Loss]:
        """One joint call for several clients, whatever their methods, in micro-batches that they share; each client's
        gradient is its own examples' alone.

        Raises DataError when no token of some client's batch is trained or an example cannot be computed, RouteError
        when a client's adapter was deleted; then nobody's gradient has changed.
        """
        for client, examples in batches:
            if not any(example.trained for example in examples):
                raise DataError(
                    f"No token of the batch for {client.adapter.name!r} is trained: every loss weight is zero."
                )
            if client.adapter.held:
                raise MethodError(f"Adapter {client.adapter.name!r} is held beneath another one, so it is not trained.")
        results = iter(self.engine.forward_backward([Item(e, c.stack) for c, examples in batches for e in examples]))
        losses = [_loss(examples, [next(results) for _ in examples]) for _, examples in batches]
        for (client, _), loss in zip(batches, losses, strict=True):
            client.weight += loss.weight
            client.waiting = True
        return losses

    def sampling_client(self, adapter: RowSpec = None) -> SamplingClient:
        """A client that samples from the base (None), an adapter, or a stack of adapters."""
        return SamplingClient(self, adapter)


class TrainingClient:
    """Trains one adapter: `forward_backward` accumulates, `optim_step` applies.

    Attributes: `weight` is the total absolute loss weight that the accumulated gradient stands for; `waiting` says
    whether there is one. `stack` is what acts in every pass: held adapters, innermost first, and the trained one.
    """

    def __init__(
        self,
        service: Service,
        adapter: Adapter,
        optimizer: AdamWConfig,
        steps: int | None,
        beneath: Sequence[Adapter] = (),
    ) -> None:
        self.service = service
        self.adapter = adapter
        self.stack = (*beneath, adapter)
        self.optimizer = AdapterOptimizer(adapter, optimizer, steps=steps)
        self.weight = 0.0
        self.waiting = False

    def forward_backward(self, examples: Sequence[Example]) -> Loss:
        """Add the gradient of `Σ w · −log p` over the examples. Raises DataError when no token is trained."""
        (loss,) = self.service.forward_backward([(self, examples)])
        return loss

    def forward(self, examples: Sequence[Example]) -> Loss:
        """The loss alone, dropout off."""
        return _loss(examples, self.service.engine.forward([Item(e, self.stack) for e in examples]))

    def optim_step(self) -> Step:
        """One step on the gradient accumulated since the last one, divided by `weight` (a mean over trained tokens).

        Raises MethodError where no gradient is waiting.
        """
        if not self.waiting:
            raise MethodError("There is no gradient: call forward_backward before optim_step.")
        lr = self.optimizer.lr
        norm = self.optimizer.step(scale=1.0 / self.weight)
        self.weight, self.waiting = 0.0, False
        return Step(norm, lr)

    def sampling_client(self) -> SamplingClient:
        """Samples from the adapter, and what is beneath it, as it is at each call."""
        return SamplingClient(self.service, self.stack)

    def state(self) -> dict[str, Any]:
        """All that continues this client exactly: adapter, optimiser, schedule, counters, torch's random state."""
        return {
            "flat": self.adapter.flat.clone(),
            "changing": {name: value.clone() for name, value in self.adapter.changing().items()},
            "forwards": self.adapter.forwards,
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state()`; gradients accumulated since are dropped. Raises FormatError on another adapter's
        state.
        """
        if state["flat"].shape != self.adapter.flat.shape:
            raise FormatError(
                f"The saved state holds {state['flat'].numel()} trained values; this adapter has "
                f"{self.adapter.flat.numel()}."
            )
        self.adapter.flat.copy_(state["flat"])
        changing = self.adapter.changing()
        if state.get("changing", {}).keys() != changing.keys():
            raise FormatError(f"The saved state lacks what {self.adapter.method.name!r} changes at each step.")
        for name, value in changing.items():
            value.copy_(state["changing"][name])
        self.adapter.forwards = state["forwards"]
        self.adapter.zero_grad()
        self.weight, self.waiting = 0.0, False
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])

    def note(self, recipe: Mapping[str, Any], data: Data | None = None) -> None:
        """Say in the adapter's lineage what trains it (`name` and settings, as JSON) and on which rows."""
        note_training(self.adapter, self.service.host.backbone, recipe, data)

    def save(self, path: str | Path) -> Path:
        """Write the adapter, without what is beneath it, as a folder that PEFT reads, where PEFT has the method."""
        return self.service.host.save(path, self.adapter)


class SamplingClient:
    """Samples token sequences from one adapter, a stack, or the base."""

    def __init__(self, service: Service, adapter: RowSpec) -> None:
        self.service = service
        self.adapter = adapter

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Sample]:
        """One sample for each prompt, all in one batch."""
        return generate(self.service.host, [(prompt, self.adapter) for prompt in prompts], params)

    def logprobs(self, examples: Sequence[Example]) -> list[Result]:
        """Log-probabilities of given tokens."""
        return self.service.engine.forward([Item(example, self.adapter) for example in examples])


def _loss(examples: Sequence[Example], results: Sequence[Result]) -> Loss:
    weight = sum(sum(map(abs, example.weights)) for example in examples)
    return Loss(sum(result.loss for result in results), weight, tuple(results))
