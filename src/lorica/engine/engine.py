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

from lorica.core.errors import DataError, MethodError
from lorica.core.update import SoftPrompt
from lorica.data.example import Example
from lorica.data.packing import Packed, collate
from lorica.engine.attention import without_mask
from lorica.engine.fast import fast_modules
from lorica.engine.groups import group_of
from lorica.engine.host import Host, RowSpec
from lorica.training.loss_head import chunked_cross_entropy, linear_cross_entropy


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
        token_budget: most tokens of one micro-batch; an example longer than this runs alone.
    """

    def __init__(self, host: Host, *, token_budget: int = 2048) -> None:
        if not host.backbone.is_causal_lm:
            raise MethodError(f"{host.backbone.name!r} is not a causal language model, so it has no next-token loss.")
        self.host = host
        self.token_budget = token_budget
        self.hub = host.attention_hub()

    def forward(self, items: Sequence[Item]) -> list[Result]:
        """Losses and log-probabilities without gradients, dropout off."""
        return self._run(items, backward=False)

    def forward_backward(self, items: Sequence[Item]) -> list[Result]:
        """The same with gradients of the summed loss, accumulated into each adapter's own gradient row."""
        return self._run(items, backward=True)

    def _run(self, items: Sequence[Item], *, backward: bool) -> list[Result]:
        for index, item in enumerate(items):
            if len(item.example.tokens) < 2:
                raise DataError(
                    f"Example {index} has {len(item.example.tokens)} tokens; at least two are needed to predict one."
                )
        results: list[Result | None] = [None] * len(items)
        was_training = self.host.model.training
        self.host.train(backward)
        try:
            for chunk in self._micro_batches(items):
                for index, result in zip(chunk, self._micro([items[i] for i in chunk], backward), strict=True):
                    results[index] = result
        finally:
            self.host.train(was_training)
        return [result for result in results if result is not None]

    def _micro_batches(self, items: Sequence[Item]) -> list[list[int]]:
        """Indices in micro-batches of at most `token_budget` tokens; neighbours share an adapter and a length where
        they can.
        """
        names = {str(item.adapter): None for item in items}
        rank = {name: i for i, name in enumerate(names)}
        order = sorted(range(len(items)), key=lambda i: (rank[str(items[i].adapter)], len(items[i].example.tokens)))
        chunks: list[list[int]] = []
        room = 0
        for index in order:
            tokens = len(items[index].example.tokens)
            if not chunks or tokens > room:
                chunks.append([])
                room = self.token_budget
            chunks[-1].append(index)
            room -= tokens
        return chunks

    def _micro(self, items: list[Item], backward: bool) -> list[Result]:
        packed = collate([item.example for item in items])
        targets_N, weights_N = self._tensor(packed.targets), self._tensor(packed.weights, torch.float32)
        with (
            torch.set_grad_enabled(backward),
            self.host.rows([item.adapter for item in items], lengths=packed.lengths.tolist()),
            fast_modules(self.host.executor),
        ):
            hidden_ND = self.hidden(packed)
            loss, logprobs_N = self._head(hidden_ND, targets_N, weights_N)
            if backward and loss.requires_grad:
                loss.backward()
        results, start = [], 0
        for length in packed.lengths.tolist():
            span = slice(start, start + length)
            logprobs = logprobs_N[span]
            results.append(Result(float(-(logprobs * weights_N[span]).sum()), tuple(logprobs.tolist())))
            start += length
        return results

    def _tensor(self, values: Sequence[float] | object, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device=self.host.backbone.device)

    def hidden(self, packed: Packed) -> Tensor:
        """Final hidden states [N, width] of the packed tokens under the present route."""
        backbone = self.host.backbone
        assert backbone.trunk is not None
        self.host.begin()
        ids_N, positions_N = self._tensor(packed.tokens), self._tensor(packed.positions)
        lengths: list[int] = packed.lengths.tolist()
        prompts, prefix_lengths = self._prompts(len(lengths)), self.hub.prefix_lengths(len(lengths))
        shifts = [p + sum(t.shape[0] for t in row) for p, row in zip(prefix_lengths, prompts, strict=True)]
        if any(shifts):
            positions_N = positions_N + torch.repeat_interleave(self._tensor(shifts), self._tensor(lengths))
        if any(prompts):
            return self._with_prompts(ids_N, positions_N, lengths, prompts)
        with without_mask():
            output = backbone.trunk(input_ids=ids_N[None], position_ids=positions_N[None], use_cache=False)
        hidden_1ND: Tensor = output[0]
        return hidden_1ND[0]

    def _prompts(self, rows: int) -> list[list[Tensor]]:
        site = self.host.backbone.sites.get("input")
        prompts: list[list[Tensor]] = [[] for _ in range(rows)]
        for item in self.host.executor.work_for_rows(site, rows) if site is not None else []:
            prompts[item.start] = [u.embeddings_PD for u in item.updates if isinstance(u, SoftPrompt)]
        return prompts

    def _with_prompts(
        self, ids_N: Tensor, positions_N: Tensor, lengths: list[int], prompts: list[list[Tensor]]
    ) -> Tensor:
        """The trunk over sequences with their soft prompts before them; the prompts' own hidden states are dropped."""
        backbone = self.host.backbone
        assert backbone.trunk is not None
        embeds_ND = backbone.module_of("input")(ids_N)
        pieces, places, real, start = [], [], [], 0
        for length, row in zip(lengths, prompts, strict=True):
            front = torch.cat([p.to(embeds_ND.dtype) for p in row]) if row else embeds_ND[:0]
            extra = front.shape[0]
            pieces += [front, embeds_ND[start : start + length]]
            # positions of the prompt count up to the first real token's
            places += [
                positions_N[start] - extra + torch.arange(extra, device=ids_N.device),
                positions_N[start : start + length],
            ]
            real += [False] * extra + [True] * length
            start += length
        longer = [length + sum(p.shape[0] for p in row) for length, row in zip(lengths, prompts, strict=True)]
        with self.host.relengthened(longer), without_mask():
            hidden_1ND: Tensor = backbone.trunk(
                inputs_embeds=torch.cat(pieces)[None], position_ids=torch.cat(places)[None], use_cache=False
            )[0]
        return hidden_1ND[0, torch.tensor(real, device=ids_N.device)]

    def _head(self, hidden_ND: Tensor, targets_N: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor]:
        backbone = self.host.backbone
        assert backbone.head is not None
        if self.host.covers_head() or backbone.transforms_logits:
            return chunked_cross_entropy(hidden_ND, self.host.windowed(self._logits), targets_N, weights_N)
        group = group_of(self.host.executor, backbone.head)
        forward, back = (None, None) if group is None else (group.maps.forward, group.maps.back)
        return linear_cross_entropy(hidden_ND, backbone.head.weight, targets_N, weights_N, forward=forward, back=back)

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        backbone = self.host.backbone
        assert backbone.head is not None
        return backbone.logits_transform(backbone.head(hidden_ND))
