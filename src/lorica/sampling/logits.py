"""From logits to the next token of each row.

In: logits [rows, vocabulary], settings and the uniform numbers of each row. Out: token ids and their log-probabilities.
Refuses to know models and caches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lorica.sampling.params import SamplingParams

Settings = SamplingParams | Sequence[SamplingParams]
"""One for all rows, or one for each."""


class Draws:
    """Uniform numbers in [0, 1), one a call, in the order of a generator that nobody else draws from. They are made a
    block at a time: a call of torch for one number takes as long.
    """

    BLOCK = 32

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._ahead: list[float] = []

    def __call__(self) -> float:
        if not self._ahead:
            self._ahead = torch.rand(self.BLOCK, generator=self._generator).tolist()[::-1]
        return self._ahead.pop()


def draws(rows: int, params: SamplingParams, seed: int | None = None, *, first: int = 0) -> list[Draws]:
    """Uniform numbers for each row, so that a row's do not depend on who shares the batch.

    Row i's are a function of (seed, first + i) alone; `seed` stands in for the settings' own.
    """
    own = params.seed if seed is None else seed
    digests = [hashlib.sha256(f"{own}/{row}".encode()).digest() for row in range(first, first + rows)]
    seeds = [int.from_bytes(digest[:8], "little") >> 1 for digest in digests]
    return [Draws(torch.Generator().manual_seed(seed)) for seed in seeds]


def pick(logits_BV: Tensor, params: Settings, rngs: Sequence[Draws]) -> tuple[Tensor, Tensor]:
    """Next tokens [B] and their log-probabilities [B] under the model's own distribution (temperature 1,
    untruncated).
    """
    logprobs_BV = logits_BV.float().log_softmax(-1)
    chosen_B = choose(logprobs_BV, params, rngs)
    return chosen_B, logprobs_BV.gather(-1, chosen_B[:, None])[:, 0]


def choose(logprobs_BV: Tensor, params: Settings, rngs: Sequence[Draws]) -> Tensor:
    """Next tokens [B], from log-probabilities of every token. A greedy row draws nothing."""
    settings = _each(params, logprobs_BV.shape[0])
    drawn = [i for i, own in enumerate(settings) if own.temperature != 0]
    if not drawn:
        return logprobs_BV.argmax(-1)
    every = len(drawn) == len(settings)
    index_D = torch.tensor(drawn, device=logprobs_BV.device)
    own_DV = logprobs_BV if every else logprobs_BV[index_D]
    drawing = [settings[i] for i in drawn]
    heat_D1 = torch.tensor([[own.temperature] for own in drawing], dtype=own_DV.dtype, device=own_DV.device)
    # the likeliest is at 0, so that a temperature of next to nothing leaves it there and not at −inf
    scores_DV = (own_DV - own_DV.amax(-1, keepdim=True)) / heat_D1.clamp_min(torch.finfo(own_DV.dtype).tiny)
    probs_DV = truncate(scores_DV, drawing).softmax(-1)
    draw_D = torch.tensor([rngs[i]() for i in drawn], dtype=torch.double, device=probs_DV.device)
    # inverse transform by hand: one uniform number a row, whatever the batch; the last token of positive mass is the
    # limit
    cumulative_DV = probs_DV.double().cumsum(-1)
    target_D1 = (draw_D * cumulative_DV[:, -1])[:, None]
    chosen_D = torch.searchsorted(cumulative_DV, target_D1, right=True)[:, 0].clamp_max(probs_DV.shape[-1] - 1)
    return chosen_D if every else logprobs_BV.argmax(-1).index_copy(0, index_D, chosen_D)


def truncate(scores_BV: Tensor, params: Settings) -> Tensor:
    """Scores with everything outside top-k and top-p at −inf. Ties at the k-th place are all kept."""
    settings, vocabulary = _each(params, scores_BV.shape[0]), scores_BV.shape[-1]
    places = [vocabulary if own.top_k is None else min(own.top_k, vocabulary) for own in settings]
    cut = [i for i, k in enumerate(places) if k < vocabulary]
    if cut:
        index_C, own_CV = _rows(scores_BV, cut)
        ordered_CK = own_CV.topk(max(places[i] for i in cut), -1).values
        kth_C1 = torch.tensor([[places[i] - 1] for i in cut], device=scores_BV.device)
        own_CV = own_CV.masked_fill(own_CV < ordered_CK.gather(-1, kth_C1), -torch.inf)
        scores_BV = own_CV if index_C is None else scores_BV.index_copy(0, index_C, own_CV)
    cut = [i for i, own in enumerate(settings) if own.top_p < 1.0]
    if cut:
        index_C, own_CV = _rows(scores_BV, cut)
        ordered_CV, order_CV = own_CV.sort(-1, descending=True)
        probs_CV = ordered_CV.softmax(-1)
        most_C1 = torch.tensor([[settings[i].top_p] for i in cut], dtype=probs_CV.dtype, device=scores_BV.device)
        # a token stays while the mass before it is below top_p, and the likeliest always
        drop_CV = probs_CV.cumsum(-1) - probs_CV >= most_C1
        drop_CV[:, 0] = False
        own_CV = own_CV.masked_fill(torch.zeros_like(drop_CV).scatter(-1, order_CV, drop_CV), -torch.inf)
        scores_BV = own_CV if index_C is None else scores_BV.index_copy(0, index_C, own_CV)
    return scores_BV


def likeliest(logprobs_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row and their log-probabilities, [N, min(k, vocabulary)] each."""
    found = logprobs_NV.topk(min(k, logprobs_NV.shape[-1]), -1)
    return found.indices, found.values


def _each(params: Settings, rows: int) -> Sequence[SamplingParams]:
    return [params] * rows if isinstance(params, SamplingParams) else params


def _rows(scores_BV: Tensor, rows: list[int]) -> tuple[Tensor | None, Tensor]:
    """Some rows, and their index; None for all rows."""
    if len(rows) == scores_BV.shape[0]:
        return None, scores_BV
    index_C = torch.tensor(rows, device=scores_BV.device)
    return index_C, scores_BV[index_C]
