"""Sampling mixed adapters in one batch: one prefill, then one token for every unfinished row at each step.

In: prompts, each with its adapter. Out: sampled tokens with log-probabilities.
Prompts are padded on the left and masked. Refuses to know text and users.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorica.core.errors import DataError
from lorica.engine.host import Host, RowSpec
from lorica.sampling.logits import generators, pick
from lorica.sampling.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Sample:
    """Sampled tokens (a stop token included), their log-probabilities, and whether a stop token ended them."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool


@torch.no_grad()
def generate(host: Host, rows: Sequence[tuple[Sequence[int], RowSpec]], params: SamplingParams) -> list[Sample]:
    """One sample for each (prompt, adapter). Raises DataError for an empty prompt, RouteError for an unknown adapter."""
    for index, (prompt, _) in enumerate(rows):
        if not prompt:
            raise DataError(f"Prompt {index} is empty; a model needs at least one token to go on from.")
    if not rows:
        return []
    was_training = host.model.training
    host.eval()
    try:
        return _decode(host, rows, params)
    finally:
        host.train(was_training)


def _decode(host: Host, rows: Sequence[tuple[Sequence[int], RowSpec]], params: SamplingParams) -> list[Sample]:
    device = host.backbone.device
    ids, mask = _left_padded([prompt for prompt, _ in rows], device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    rngs = generators(len(rows), params)
    tokens: list[list[int]] = [[] for _ in rows]
    logprobs: list[list[float]] = [[] for _ in rows]
    live = [True] * len(rows)
    cache: Any = None
    word = _cache_word(host.model)
    stops = set(params.stop_ids)
    with host.rows([adapter for _, adapter in rows]):
        for _ in range(params.max_tokens):
            out = host.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{word: cache},
            )
            cache = out[word]
            chosen_B, logprob_B = pick(out.logits[:, -1], params, rngs)
            for row, (token, logprob) in enumerate(zip(chosen_B.tolist(), logprob_B.tolist(), strict=True)):
                if live[row]:
                    tokens[row].append(token)
                    logprobs[row].append(logprob)
                    live[row] = token not in stops
            if not any(live):
                break
            ids = chosen_B[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1
    return [Sample(tuple(t), tuple(p), not alive) for t, p, alive in zip(tokens, logprobs, live, strict=True)]


def _cache_word(model: nn.Module) -> str:
    """What this transformers calls a cache: `past_key_values` became `cache` in the course of version 5."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask
