"""Skills: small adapters of one model, each trained on one prompt template of the T0 mixture, side by side.

In: settings and a seed. Out: a service with the adapters, and rows of any template in disjoint parts. What was trained
once in a process is not trained again. Refuses to know what is made of the adapters, and papers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pydantic import Field

from lorica.adapters.adapter import Adapter
from lorica.client.local import Service
from lorica.core.config import Config
from lorica.data.example import Example
from lorica.data.render import Renderer
from lorica.methods.base import Method
from lorica.methods.lora import LoRA
from lorica.papers.kit.arena import OPTIMIZER
from lorica.papers.kit.text import examples, open_model, split
from lorica.training.optimizer import AdamWConfig

Parts = Mapping[str, Sequence[Example]]
KEPT = 3
"""Trained sets of skills that a process remembers."""


class SkillSettings(Config):
    """A model, templates, and how an adapter is trained on each; a paper's settings inherit these."""

    model: str = Field("nano", description="a causal language model")
    dtype: str = Field("float32", description="dtype of the base")
    device: str = Field("cpu", description="where it runs")
    skills: tuple[str, ...] = Field(description="templates of the T0 mixture, one adapter each")
    max_length: int = Field(80, ge=8, description="most tokens of a row; longer ones are left out")
    rank: int = Field(4, ge=1, description="of every adapter, alpha = 2 rank; all start from the same A")
    lr: float = Field(4e-3, gt=0, description="learning rate of every adapter")
    steps: int = Field(40, ge=1, description="optimiser steps of every adapter")
    batch_size: int = Field(2, ge=1, description="rows of one step and adapter")
    held_out: int = Field(32, ge=1, description="rows of each template that are measured and never trained on")


@dataclass(frozen=True)
class Skills:
    """Adapters by template, resident in a service, and each template's rows as `train` and `test`."""

    service: Service
    renderer: Renderer
    adapters: Mapping[str, Adapter]
    parts: Mapping[str, Parts]

    @contextmanager
    def tidy(self) -> Iterator[None]:
        """Inside, adapters may be made; those that were not there before are deleted at the end."""
        before = set(self.service.host.adapters)
        try:
            yield
        finally:
            for name in set(self.service.host.adapters) - before:
                self.service.host.delete(name)


_KEPT: dict[tuple[SkillSettings, int], Skills] = {}


def t0_skills(settings: SkillSettings, seed: int, say: Callable[[str], None]) -> Skills:
    """An adapter for each template of `settings.skills`. Equal settings and seeds give the same ones, trained once.

    Only the fields of `SkillSettings` count, so papers whose settings inherit them share what is trained. Do not change
    the adapters; make others inside `Skills.tidy`. Raises MissingError, DataError.
    """
    own = SkillSettings(**{name: getattr(settings, name) for name in SkillSettings.model_fields})
    if (own, seed) not in _KEPT:
        while len(_KEPT) >= KEPT:
            del _KEPT[next(iter(_KEPT))]
        _KEPT[own, seed] = _trained(own, seed, say)
    return _KEPT[own, seed]


def _trained(settings: SkillSettings, seed: int, say: Callable[[str], None]) -> Skills:
    backbone, renderer = open_model(settings.model, dtype=settings.dtype, device=settings.device)
    counts = {"train": None, "test": settings.held_out}
    parts = {
        name: split(examples(f"t0/{name}", renderer, settings.max_length), counts, seed, name)
        for name in settings.skills
    }
    service = Service(backbone)
    method = LoRA(rank=settings.rank, alpha=2.0 * settings.rank)
    tasks = {name: own["train"] for name, own in parts.items()}
    optimizer = OPTIMIZER.replace(lr=settings.lr)
    adapters, losses = side_by_side(
        service, tasks, method, optimizer, steps=settings.steps, batch_size=settings.batch_size, seed=seed
    )
    say(f"seed {seed}: skills trained; last losses " + ", ".join(f"{n} {loss:.2f}" for n, loss in losses.items()))
    return Skills(service, renderer, adapters, parts)


def side_by_side(
    service: Service,
    tasks: Mapping[str, Sequence[Example]],
    method: Method,
    optimizer: AdamWConfig,
    *,
    steps: int,
    batch_size: int,
    seed: int,
) -> tuple[dict[str, Adapter], dict[str, float]]:
    """An adapter for each task, named as it is, and its last loss. All start from the same values and train in joint
    mixed batches; each sees rows of its own task alone.
    """
    clients = {
        name: service.training_client(method, name=name, seed=seed, optimizer=optimizer, steps=steps) for name in tasks
    }
    rng = torch.Generator().manual_seed(seed)
    losses: dict[str, float] = {}
    for _ in range(steps):
        batches = []
        for name, client in clients.items():
            drawn = torch.randint(len(tasks[name]), (batch_size,), generator=rng).tolist()
            batches.append((client, [tasks[name][i] for i in drawn]))
        found = service.forward_backward(batches)
        losses = {name: loss.mean for name, loss in zip(clients, found, strict=True)}
        for client in clients.values():
            client.optim_step()
    return {name: client.adapter for name, client in clients.items()}, losses
