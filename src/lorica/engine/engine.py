"""The engine: packed mixed batches through one backbone.

In: examples or data, each with its loss and the adapter it belongs to. Out: log-probabilities, losses, gradients in the
adapters. Sequences are packed end to end in micro-batches of bounded tokens; none sees another, and no padding is
computed. Refuses to know text, files, users and schedules of runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.core.errors import DataError
from lorica.data.datum import Datum, Floats
from lorica.data.example import Example
from lorica.data.packing import Packed, end_to_end
from lorica.engine.checks import check_positions, check_tokens
from lorica.engine.fast import fast_modules, frozen_maps
from lorica.engine.host import Host, RowSpec
from lorica.engine.loss_groups import LossGroup, loss_groups, sums
from lorica.engine.repeats import pass_key
from lorica.engine.replay import Inputs, Replays
from lorica.engine.route import Numbers, Stack, numbered
from lorica.engine.trunk import Trunk
from lorica.models.positions import uniform_positions
from lorica.training.loss_head import chunked_logprobs, linear_logprobs
from lorica.training.losses import CROSS_ENTROPY, Loss

REPLAYS = "replays"
TARGETS = "targets"


@dataclass(frozen=True, slots=True)
class Item:
    """One example or datum, the adapter (or stack, or None for the base) that it is for, and its loss."""

    example: Example | Datum
    adapter: RowSpec
    loss: Loss = CROSS_ENTROPY


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """Of one example or datum: its loss, a sum over its targets, and the log-probabilities [M] of these."""

    loss: float
    logprobs: Floats


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
        """Losses and log-probabilities without gradients, dropout off.

        Raises DataError naming the first wrong example, RouteError for unknown and deleted adapters.
        """
        return self._run(items, backward=False)

    def forward_backward(self, items: Sequence[Item]) -> list[Result]:
        """The same with gradients of the summed loss, accumulated into each adapter's own gradient row.

        After an error all gradients are as before.
        """
        return self._run(items, backward=True)

    def _run(self, items: Sequence[Item], *, backward: bool) -> list[Result]:
        stacks = self.host.stacks([item.adapter for item in items])
        data, lengths, totals = self._check(items, stacks)
        alone = not self.trunk.packs()
        trained = [adapter for stack in stacks for adapter in stack if backward and not adapter.held]
        adapters = dict.fromkeys(trained)
        before = {adapter: adapter.remember() for adapter in adapters}
        for adapter in adapters:
            adapter.forwards += 1
            adapter.grad_written()
        call = _Call(data, [i.loss for i in items], stacks, numbered(stacks), {a: a.forwards for a in adapters})
        results: list[Result | None] = [None] * len(items)
        try:
            with self.trunk.modes(training=backward):
                for chunk in self._micro_batches(stacks, lengths, totals, alone=alone):
                    for index, result in zip(chunk, self._micro(call, chunk, backward), strict=True):
                        results[index] = result
        except BaseException:
            for adapter, mark in before.items():
                adapter.restore(mark)
            raise
        return [result for result in results if result is not None]

    def _check(self, items: Sequence[Item], stacks: Sequence[Stack]) -> tuple[list[Datum], list[int], list[int]]:
        """The data, each row's length, soft prompts included, and its last position, prefixes included too. Raises
        DataError for the first row that cannot be computed.
        """
        names = [f"Example {i} ({item.example.where})" for i, item in enumerate(items)]
        for name, item in zip(names, items, strict=True):
            if isinstance(item.example, Example) and len(item.example) < 2:
                raise DataError(f"{name} has {len(item.example)} tokens; at least two are needed to predict one.")
        data = [item.example.datum() for item in items]
        for datum, item in zip(data, items, strict=True):
            item.loss.check(datum)
        check_tokens(self.host.backbone, [datum.tokens for datum in data], names)
        check_tokens(self.host.backbone, [datum.targets for datum in data], [f"{name}, as a target," for name in names])
        virtual = self.trunk.virtual(stacks)
        lengths = [len(datum) + soft for datum, (soft, _) in zip(data, virtual, strict=True)]
        totals = [length + prefix for length, (_, prefix) in zip(lengths, virtual, strict=True)]
        check_positions(self.host.backbone, totals, names)
        return data, lengths, totals

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
        data = [call.data[i] for i in chunk]
        packed = end_to_end([datum.tokens for datum in data])
        rows, numbers = [call.stacks[i] for i in chunk], [call.numbers[i] for i in chunk]
        lengths: list[int] = packed.lengths.tolist()
        groups = loss_groups([call.losses[i] for i in chunk], data)

        def run(inputs: Inputs) -> list[Tensor]:
            with (
                torch.set_grad_enabled(backward),
                self.host.rows(rows, lengths=lengths, counts=call.counts, numbers=numbers),
                fast_modules(self.host.executor),
            ):
                hidden_ND = self.trunk.walked(inputs["tokens"], inputs["positions"], lengths)
                lps = self._logprobs(hidden_ND, data, inputs.get(TARGETS))
                terms = [group.terms(lps, inputs) for group in groups]
                total = torch.stack([terms_M.sum() for terms_M in terms]).sum()
                if backward and total.requires_grad:
                    total.backward()
            return [t.detach() for t in (torch.cat(lps), *terms)]

        given, key = self._given(packed, data, groups), None
        if TARGETS in given:
            others = tuple((group.loss, tuple(group.places), tuple(group.inputs)) for group in groups)
            key = pass_key(self.trunk, rows, lengths, others, backward=backward)
        flat, *terms = self._replays().run(key, given, run)
        flat_M = flat.cpu().numpy()
        edges = np.cumsum([len(datum.targets) for datum in data])[:-1]
        return [Result(loss, own) for loss, own in zip(sums(groups, terms), np.split(flat_M, edges), strict=True)]

    def _given(self, packed: Packed, data: Sequence[Datum], groups: Sequence[LossGroup]) -> dict[str, Tensor]:
        """All numbers that a pass reads besides adapters and weights, on the device."""
        tensor = self.trunk.tensor
        given = {"tokens": tensor(packed.tokens), "positions": tensor(packed.positions)}
        if all(datum.crow is None for datum in data):
            given[TARGETS] = tensor(np.concatenate([datum.targets for datum in data]))
        for group in groups:
            given |= {group.name(name): tensor(own, torch.float32) for name, own in group.inputs.items()}
        return given

    def _replays(self) -> Replays:
        """Recorded passes, kept until the frozen weights change."""
        kept = self.host.backbone.kept
        if REPLAYS not in kept:
            kept[REPLAYS] = Replays(self.host.backbone.device)
        found: Replays = kept[REPLAYS]
        return found

    def _logprobs(self, hidden_ND: Tensor, data: Sequence[Datum], targets_N: Tensor | None) -> list[Tensor]:
        """The log-probabilities of each datum's targets: over frozen products where the head is nothing else and a
        position has one target, whose ids are `targets_N`, else through its module.
        """
        backbone, host = self.host.backbone, self.host
        assert backbone.head is not None
        maps = frozen_maps(host.executor, backbone.head)
        plain = maps is not None and not host.adapts_head() and not backbone.transforms_logits
        vocabulary = backbone.head.weight.shape[0]
        counts, head = [len(datum) for datum in data], host.windowed(self._logits)
        if targets_N is not None:
            if maps is None or not plain:
                return list(chunked_logprobs(hidden_ND, head, targets_N, vocabulary=vocabulary).split(counts))
            return list(linear_logprobs(hidden_ND, maps.forward, maps.back, vocabulary, targets_N).split(counts))
        found, start = [], 0
        for datum, own_ND in zip(data, hidden_ND.split(counts), strict=True):
            targets_M, crow = self.trunk.tensor(datum.targets), None if datum.crow is None else datum.crow.tolist()
            if crow is None and maps is not None and plain:
                found.append(linear_logprobs(own_ND, maps.forward, maps.back, vocabulary, targets_M))
            else:
                own_head = _shifted(head, start)
                found.append(chunked_logprobs(own_ND, own_head, targets_M, vocabulary=vocabulary, crow=crow))
            start += len(datum)
        return found

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        backbone = self.host.backbone
        assert backbone.head is not None
        return backbone.logits_transform(backbone.head(hidden_ND))


def _shifted(head: Callable[[Tensor, int], Tensor], by: int) -> Callable[[Tensor, int], Tensor]:
    return lambda hidden_CD, start: head(hidden_CD, start + by)


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """Of all rows of one call: data, losses, stacks, numbers; and which call it is for each adapter, while training."""

    data: list[Datum]
    losses: list[Loss]
    stacks: list[Stack]
    numbers: list[Numbers]
    counts: dict[Adapter, int]
