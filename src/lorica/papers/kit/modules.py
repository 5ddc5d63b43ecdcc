"""An arena over any torch module that maps a tensor of rows to a tensor of outputs: classification or regression.

In: a module, tensors of inputs and targets. Out: joint steps in which each adapter sees the same rows, routed one by
one. Refuses to know where data and module come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from lorica.adapters.adapter import Adapter
from lorica.engine.host import Host, TargetSpec
from lorica.models import wrap
from lorica.papers.kit.arena import Entry
from lorica.training.optimizer import AdapterOptimizer

Data = tuple[Tensor, Tensor]
"""Inputs [rows, …] and targets: classes [rows] or values [rows, outputs]."""


class ModuleArena:
    """One module, its parts of data, and adapters. `loss`: cross entropy, or half the mean squared error.
    `targets` are those of entries that name none.
    """

    def __init__(
        self,
        module: nn.Module,
        parts: Mapping[str, Data],
        *,
        batch_size: int,
        loss: Literal["classes", "values"] = "classes",
        targets: TargetSpec = None,
    ) -> None:
        self.host = Host(wrap(module))
        self.parts = parts
        self.batch_size = batch_size
        self.loss = loss
        self.targets = targets
        self.adapters: Sequence[Adapter] = ()
        self.norms: Sequence[float] = ()
        self._optimizers: list[AdapterOptimizer] = []

    def enter(self, entries: Sequence[Entry], steps: int, seed: int) -> None:
        first = len(self.host.adapters)
        self.adapters = [
            self.host.add(f"entry {first + i}", entry.method, entry.targets or self.targets, seed=seed)
            for i, entry in enumerate(entries)
        ]
        self._optimizers = [
            AdapterOptimizer(adapter, entry.optimizer, steps=steps)
            for adapter, entry in zip(self.adapters, entries, strict=True)
        ]

    def step(self, rng: torch.Generator) -> list[float]:
        x, y = self.parts["train"]
        if self.batch_size < len(x):
            chosen = torch.randperm(len(x), generator=rng)[: self.batch_size]
            x, y = x[chosen], y[chosen]
        losses_N = self._losses(self.outputs(x), y)
        losses_N.sum().backward()
        self.norms = [optimizer.step() for optimizer in self._optimizers]
        return losses_N.tolist()

    def score(self, part: str) -> list[dict[str, float]]:
        with torch.no_grad():
            return self._scores(self.outputs(self.parts[part][0]), part)

    def untrained(self, part: str) -> dict[str, float]:
        with torch.no_grad(), self.host.disabled():
            outputs: Tensor = self.host(self.parts[part][0])
            (found,) = self._scores(outputs[None], part)
        return found

    def _scores(self, outputs_NBO: Tensor, part: str) -> list[dict[str, float]]:
        _, y = self.parts[part]
        found = [{f"{part} loss": loss} for loss in self._losses(outputs_NBO, y).tolist()]
        if self.loss == "classes":
            right_N = (outputs_NBO.argmax(-1) == y).float().mean(1).tolist()
            for own, right in zip(found, right_N, strict=True):
                own[f"{part} accuracy"] = right
        return found

    def base_parameters(self) -> int:
        return sum(p.numel() for p in self.host.model.parameters())

    def outputs(self, x: Tensor) -> Tensor:
        """[adapters, rows, outputs]: every adapter on every row."""
        rows = [adapter for adapter in self.adapters for _ in range(len(x))]
        with self.host.rows(rows):
            outputs: Tensor = self.host(x.repeat(len(self.adapters), *[1] * (x.ndim - 1)))
        return outputs.view(len(self.adapters), len(x), -1)

    def _losses(self, outputs_NBO: Tensor, y: Tensor) -> Tensor:
        """Each adapter's mean over rows, [adapters]."""
        if self.loss == "values":
            return 0.5 * (outputs_NBO - y).square().mean((1, 2))
        rows_NB = nn.functional.cross_entropy(
            outputs_NBO.flatten(0, 1), y.repeat(len(outputs_NBO)), reduction="none"
        ).view(len(outputs_NBO), -1)
        return rows_NB.mean(1)


class MLP(nn.Module):
    """`depth` hidden layers of one width with ReLU, and a linear head; with `norms`, a LayerNorm before each ReLU.
    Weights N(0, 2/in) drawn from `seed`, head N(0, 1/in), biases zero.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        depth: int,
        outputs: int,
        *,
        seed: int,
        bias: bool = True,
        norms: bool = False,
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norms else nn.Identity() for _ in range(depth))
        sizes = [inputs, *[width] * depth]
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=bias) for i, o in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], outputs, bias=bias)
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer, gain in [*((layer, 2.0) for layer in self.layers), (self.head, 1.0)]:
                assert isinstance(layer, nn.Linear)
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=rng) * (gain / layer.in_features) ** 0.5)
                if layer.bias is not None:
                    layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.relu(norm(layer(x)))
        logits: Tensor = self.head(x)
        return logits


def pretrain(module: nn.Module, data: Data, *, steps: int, batch_size: int, lr: float, seed: int) -> nn.Module:
    """The base of an experiment: plain AdamW on all weights, cosine, cross entropy. Makes no adapter."""
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    x, y = data
    for _ in range(steps):
        chosen = torch.randint(len(x), (batch_size,), generator=rng)
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x[chosen]), y[chosen]).backward()
        optimizer.step()
        plan.step()
    return module
