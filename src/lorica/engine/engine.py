"""The engine: packed mixed batches through one backbone, and a step of each adapter's optimiser.

In: examples with loss weights, each with the adapter it belongs to. Out: log-probabilities, losses, gradients in the
adapters. Sequences are packed end to end in micro-batches of bounded tokens; none sees another, and no padding is
computed. Refuses to know text, files, users and schedules of runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.core.errors import DataError
from lorica.data.example import Example
from lorica.data.packing import collate
from lorica.engine.checks import check_positions, check_tokens
from lorica.engine.fast import fast_modules, frozen_maps
from lorica.engine.host import Host, RowSpec
from lorica.engine.route import Numbers, Stack, numbered
from lorica.engine.trunk import Trunk
from lorica.models.positions import uniform_positions
from lorica.training.loss_head import chunked_cross_entropy, linear_cross_entropy, weighted


@dataclass(frozen=True, slots=True)
class Item:
    """One example and the adapter (or stack, or None for the base) that it is for."""

    example: Example
    adapter: RowSpec


@dataclass(frozen=True, slots=True)
class Result:
    """Of one example: `loss = Σ_t w_t · −log p(x_t)`, its log-probabilities, one for each token after the first."""

    loss: float
    logprobs: tuple[float, ...]


class Engine:
    """Runs batches on a host.

    Args:
        host: the adapters and their backbone, which must be a causal language model.
        token_budget: most positions of one micro-batch, soft prompts included; a longer example runs alone.

    Raises: MethodError for a backbone that the engine cannot run.
    """

    def __init__(self, host: Host, *, token_budget: int = 2048) -> None:
        self.host = host
        self.token_budget = token_budget
        self.trunk = Trunk(host)

    def forward(self, items: Sequence[Item]) -> list[Result]:
        """Losses and log-probabilities without gradients, dropout off. Examples need no trained token.

        Raises DataError naming the first wrong example, RouteError for unknown and deleted adapters.
        """
        return self._run(items, backward=False)

    def forward_backward(self, items: Sequence[Item]) -> list[Result]:
        """The same with gradients of the summed loss, accumulated into each adapter's own gradient row.

        Also raises DataError when no token of the batch is trained. After an error all gradients are as before.
        """
        if not any(item.example.trained for item in items):
            where = f" (its first row is {items[0].example.where})" if items else ""
            raise DataError(f"No token of this batch is trained: every loss weight is zero{where}.")
        return self._run(items, backward=True)

    def _run(self, items: Sequence[Item], *, backward: bool) -> list[Result]:
        stacks = self.host.stacks([item.adapter for item in items])
        lengths, totals = self._check(items, stacks)
        alone = not self.trunk.packs()
        adapters = dict.fromkeys(adapter for stack in stacks for adapter in stack) if backward else {}
        before = {adapter: (adapter.grad.clone(), adapter.forwards) for adapter in adapters}
        for adapter in adapters:
            adapter.forwards += 1
        call = _Call([i.example for i in items], stacks, numbered(stacks), {a: a.forwards for a in adapters})
        results: list[Result | None] = [None] * len(items)
        try:
            with self.trunk.modes(training=backward):
                for chunk in self._micro_batches(stacks, lengths, totals, alone=alone):
                    for index, result in zip(chunk, self._micro(call, chunk, backward), strict=True):
                        results[index] = result
        except BaseException:
            for adapter, (grad, forwards) in before.items():
                adapter.grad.copy_(grad)
                adapter.forwards = forwards
            raise
        return [result for result in results if result is not None]

    def _check(self, items: Sequence[Item], stacks: Sequence[Stack]) -> tuple[list[int], list[int]]:
        """Each row's length, soft prompts included, and its last position, prefixes included too. Raises DataError for
        the first row that cannot be computed.
        """
        names = [f"Example {i} ({item.example.where})" for i, item in enumerate(items)]
        for name, item in zip(names, items, strict=True):
            if len(item.example) < 2:
                raise DataError(f"{name} has {len(item.example)} tokens; at least two are needed to predict one.")
        check_tokens(self.host.backbone, [item.example.tokens for item in items], names)
        virtual = self.trunk.virtual(stacks)
        lengths = [len(item.example) - 1 + soft for item, (soft, _) in zip(items, virtual, strict=True)]
        totals = [length + prefix for length, (_, prefix) in zip(lengths, virtual, strict=True)]
        check_positions(self.host.backbone, totals, names)
        return lengths, totals

    def _micro_batches(
        self, stacks: Sequence[Stack], lengths: Sequence[int], totals: Sequence[int], *, alone: bool
    ) -> list[list[int]]:
        """Indices in micro-batches of at most `token_budget` positions; neighbours share adapters and a length where
        they can. Where rotations depend on the longest row of a pass, longer rows than that are by themselves.
        """
        rank = {stack: i for i, stack in enumerate(dict.fromkeys(stacks))}
        order = sorted(range(len(stacks)), key=lambda i: (rank[stacks[i]], lengths[i]))
        limit = uniform_positions(self.host.model)
        chunks: list[list[int]] = []
        room = 0
        for index in order:
            single = alone or (limit is not None and totals[index] > limit)
            if not chunks or single or lengths[index] > room:
                chunks.append([])
                room = self.token_budget
            chunks[-1].append(index)
            room = 0 if single else room - lengths[index]
        return chunks

    def _micro(self, call: _Call, chunk: Sequence[int], backward: bool) -> list[Result]:
        packed = collate([call.examples[i] for i in chunk])
        targets_N, weights_N = self.trunk.tensor(packed.targets), self.trunk.tensor(packed.weights, torch.float32)
        rows, numbers = [call.stacks[i] for i in chunk], [call.numbers[i] for i in chunk]
        with (
            torch.set_grad_enabled(backward),
            self.host.rows(rows, lengths=packed.lengths.tolist(), counts=call.counts, numbers=numbers),
            fast_modules(self.host.executor),
        ):
            hidden_ND = self.trunk.hidden(packed)
            loss, logprobs_N = self._head(hidden_ND, targets_N, weights_N)
            if backward and loss.requires_grad:
                loss.backward()
        results, start = [], 0
        for length in packed.lengths.tolist():
            span = slice(start, start + length)
            own = logprobs_N[span]
            results.append(Result(-float(weighted(own, weights_N[span]).sum()), tuple(own.tolist())))
            start += length
        return results

    def _head(self, hidden_ND: Tensor, targets_N: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and log-probabilities: over frozen products where the head is nothing else, else through its module."""
        backbone, host = self.host.backbone, self.host
        assert backbone.head is not None
        maps = frozen_maps(host.executor, backbone.head)
        if maps is None or host.adapts_head() or backbone.transforms_logits:
            return chunked_cross_entropy(hidden_ND, host.windowed(self._logits), targets_N, weights_N)
        return linear_cross_entropy(hidden_ND, maps.forward, maps.back, maps.sizes[0], targets_N, weights_N)

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        backbone = self.host.backbone
        assert backbone.head is not None
        return backbone.logits_transform(backbone.head(hidden_ND))


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """Of all rows of one call: examples, stacks, numbers; and which call it is for each adapter, while training."""

    examples: list[Example]
    stacks: list[Stack]
    numbers: list[Numbers]
    counts: dict[Adapter, int]
