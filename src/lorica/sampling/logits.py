"""From logits to the next token of each row.

In: logits [rows, vocabulary], settings, one generator for each row. Out: token ids and their log-probabilities.
Refuses to know models and caches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lorica.sampling.params import SamplingParams


def generators(rows: int, params: SamplingParams, seed: int | None = None) -> list[torch.Generator]:
    """A generator for each row, so that a row's draws do not depend on who shares the batch.

    Row i's is a function of (seed, i) alone; `seed` stands in for the settings' own.
    """
    own = params.seed if seed is None else seed
    digests = [hashlib.sha256(f"{own}/{row}".encode()).digest() for row in range(rows)]
    return [torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1) for digest in digests]


def pick(logits_BV: Tensor, params: SamplingParams, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Next tokens [B] and their log-probabilities [B] under the model's own distribution (temperature 1,
    untruncated).
    """
    logprobs_BV = logits_BV.float().log_softmax(-1)
    if params.temperature == 0:
        chosen_B = logprobs_BV.argmax(-1)
    else:
        probs_BV = truncate(logprobs_BV / params.temperature, params).softmax(-1)
        draw_B = torch.stack([torch.rand((), generator=rng) for rng in rngs]).to(probs_BV.device)
        # inverse transform by hand: one uniform number a row, whatever the batch; the last token of positive mass is
        # the limit
        cumulative_BV = probs_BV.double().cumsum(-1)
        target_B1 = (draw_B.double() * cumulative_BV[:, -1])[:, None]
        chosen_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0].clamp_max(probs_BV.shape[-1] - 1)
    return chosen_B, logprobs_BV.gather(-1, chosen_B[:, None])[:, 0]


def truncate(scores_BV: Tensor, params: SamplingParams) -> Tensor:
    """Scores with everything outside top-k and top-p at −inf. Ties at the k-th place are all kept."""
    if params.top_k is not None and params.top_k < scores_BV.shape[-1]:
        least_B1 = scores_BV.topk(params.top_k, -1).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < least_B1, -torch.inf)
    if params.top_p < 1.0:
        ordered_BV, order_BV = scores_BV.sort(-1, descending=True)
        probs_BV = ordered_BV.softmax(-1)
        # a token stays while the mass before it is below top_p, so the likeliest always stays
        drop_BV = probs_BV.cumsum(-1) - probs_BV >= params.top_p
        scores_BV = scores_BV.masked_fill(torch.zeros_like(drop_BV).scatter(-1, order_BV, drop_BV), -torch.inf)
    return scores_BV
