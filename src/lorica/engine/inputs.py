"""The model's entrance: soft prompts before each row's first token, and positions that start after virtual tokens.

In: the keyword arguments of a transformers forward. Out: the same with `inputs_embeds`, mask, positions and labels
extended, and afterwards outputs of the original length. Rows with shorter prompts are padded on the left and masked.
Refuses to know methods and what the outputs are for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorica.core.errors import MethodError
from lorica.core.site import Site
from lorica.core.update import SoftPrompt
from lorica.engine.executor import Executor


class Entrance:
    """Adapts the inputs of one forward pass. `virtual` is what `leave` has to cut off again."""

    def __init__(
        self, executor: Executor, site: Site | None, embedding: nn.Module | None, takes_positions: bool
    ) -> None:
        self.executor = executor
        self.site = site
        self.embedding = embedding
        self.takes_positions = takes_positions

    def enter(self, kwargs: dict[str, Any], prefix_lengths: list[int]) -> tuple[dict[str, Any], int]:
        """New keyword arguments, and how many leading positions the outputs will have too many."""
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        lead = ids if ids is not None else embeds
        if lead is None:
            return kwargs, 0
        prompts = self._prompts(lead.shape[0])
        lengths = [sum(p.shape[0] for p in row) for row in prompts]
        shifts = [a + b for a, b in zip(lengths, prefix_lengths, strict=True)]
        if not any(shifts):
            return kwargs, 0
        kwargs = dict(kwargs)
        past = _past_length(kwargs)
        width = max(lengths)
        # a cache already holds the prompts' keys, so only its real tokens count as past
        if self.takes_positions:
            kwargs["position_ids"] = self._positions(kwargs, lead, past - width if past else 0, shifts)
        if width:
            self._extend_mask(kwargs, lead, past, lengths, width)
        if not width or past:
            return kwargs, 0
        self._prepend(kwargs, ids, embeds, prompts, prefix_lengths)
        return kwargs, width

    def _prompts(self, rows: int) -> list[list[Tensor]]:
        prompts: list[list[Tensor]] = [[] for _ in range(rows)]
        for item in self.executor.work_for_rows(self.site, rows) if self.site is not None else []:
            prompts[item.start] = [u.embeddings_PD for u in item.updates if isinstance(u, SoftPrompt)]
        return prompts

    def _positions(self, kwargs: dict[str, Any], lead: Tensor, past: int, shifts: list[int]) -> Tensor:
        rows, tokens = lead.shape[:2]
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + tokens, device=lead.device)[None]
        return positions.expand(rows, -1) + torch.tensor(shifts, device=lead.device)[:, None]

    def _extend_mask(self, kwargs: dict[str, Any], lead: Tensor, past: int, lengths: list[int], width: int) -> None:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise MethodError(f"Soft prompts need a 2-D attention mask [rows, tokens], not {mask.ndim}-D.")
        if mask is None:
            mask = torch.ones(
                lead.shape[0], (past - width if past else 0) + lead.shape[1], dtype=torch.long, device=lead.device
            )
        front = (
            torch.arange(width, device=lead.device)[None] >= width - torch.tensor(lengths, device=lead.device)[:, None]
        )
        kwargs["attention_mask"] = torch.cat([front.to(mask.dtype), mask], dim=1)

    def _prepend(
        self,
        kwargs: dict[str, Any],
        ids: Tensor | None,
        embeds: Tensor | None,
        prompts: list[list[Tensor]],
        prefix_lengths: list[int],
    ) -> None:
        lengths = [sum(p.shape[0] for p in row) for row in prompts]
        width = max(lengths)
        if embeds is None:
            assert self.embedding is not None
            assert ids is not None
            embeds = self.embedding(ids)
        front = [
            torch.cat([embeds.new_zeros(width - length, embeds.shape[-1]), *(p.to(embeds.dtype) for p in row)])
            for row, length in zip(prompts, lengths, strict=True)
        ]
        kwargs["input_ids"] = None
        kwargs["inputs_embeds"] = torch.cat([torch.stack(front), embeds], dim=1)
        if self.takes_positions:
            starts = torch.tensor(lengths, device=embeds.device)[:, None] - width
            virtual = (torch.arange(width, device=embeds.device)[None] + starts).clamp_min(0)
            behind = torch.tensor(prefix_lengths, device=embeds.device)[:, None]  # a prefix stands before the prompt
            kwargs["position_ids"] = torch.cat([virtual + behind, kwargs["position_ids"]], dim=1)
        for key, filler in (("labels", -100), ("token_type_ids", 0)):
            given = kwargs.get(key)
            # one for each token; a row's class labels stay as they are
            if given is not None and given.shape == embeds.shape[:2] and not given.is_floating_point():
                kwargs[key] = torch.cat([given.new_full((given.shape[0], width), filler), given], dim=1)


def leave(output: Any, width: int, tokens: int) -> Any:
    """The outputs without the virtual tokens' positions. Outputs that were cut already (`logits_to_keep`) stay."""

    def cut(value: Tensor) -> Tensor:
        return value[:, width:] if value.shape[1] == width + tokens else value

    for key in ("logits", "last_hidden_state"):
        if width and getattr(output, key, None) is not None:
            output[key] = cut(output[key])
    if width and getattr(output, "hidden_states", None) is not None:
        output["hidden_states"] = tuple(cut(h) for h in output["hidden_states"])
    return output


def _past_length(kwargs: dict[str, Any]) -> int:
    cache = kwargs.get("cache", kwargs.get("past_key_values"))  # renamed in the course of transformers 5
    return 0 if cache is None else int(cache.get_seq_length())
