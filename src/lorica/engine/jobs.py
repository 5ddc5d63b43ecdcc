"""Requests on their way: which draws wait, what each row has sampled so far, and what a step's logits make of it.

In: requests, what was found of their prompts, logits. Out: tokens and log-probabilities in the rows, events. Refuses to
know models, caches and routes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lorica.core.errors import FormatError
from lorica.engine.kv_lane import Place
from lorica.engine.native.kernels import Kernels
from lorica.engine.prompts import Read
from lorica.engine.requests import Event, Failed, Finished, Result, Sample, StreamRequest, Token, TopK
from lorica.sampling.logits import Draws, choose, draws, likeliest


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way.

    Attributes:
        total: virtual and real positions of the prompt, `prefix` those of prefixes; need: the most positions of a row.
        stepwise: whether its rows go on behind kept keys, and not by a pass over all of them for every token.
        pending: how many draws have no row yet, the last ones; rows: those that are being sampled.
        over: finished, failed or cancelled; nothing more is to be computed.
        plain: whether a token is drawn from the whole vocabulary, and nothing else is asked of it.
    """

    request: StreamRequest
    total: int
    prefix: int
    stepwise: bool
    pending: int = 0
    read: Read | None = None
    cached: int = 0
    rows: list[Row] = field(default_factory=list)
    samples: dict[int, Sample] = field(default_factory=dict)
    over: bool = False
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        params = self.request.params
        self.plain = params.top_k is None and params.top_p >= 1 and not self.request.topk_sample

    @property
    def need(self) -> int:
        return self.total + max(self.request.params.max_tokens, 1) - 1  # the last token is not fed

    @property
    def goes_on(self) -> bool:
        """Whether a sample may be longer than what the prompt's pass gives."""
        return self.request.params.max_tokens > 1

    def start(self, read: Read, events: list[Event]) -> None:
        """The prompt was read. A request that asked for nothing else is finished."""
        self.read = read
        scores = read.logprobs if self.request.scores_prompt else None
        if scores is not None and np.isnan(scores[1:]).any():
            self.fail(self.no_number("its prompt"), events)
        else:
            self._finish(events)

    def next_row(self) -> Row:
        """The row of the next draw."""
        request = self.request
        index = request.num_samples - self.pending
        self.pending -= 1
        row = Row(self, index, draws(1, request.params, first=request.first + index)[0])
        self.rows.append(row)
        return row

    def close_row(self, row: Row, events: list[Event]) -> None:
        """A row is done. With the last one the request is finished."""
        self.rows.remove(row)
        self.samples[row.index] = row.sample()
        self._finish(events)

    def _finish(self, events: list[Event]) -> None:
        if self.over or self.pending or self.rows:
            return
        self.over = True
        assert self.read is not None
        samples = tuple(self.samples[index] for index in sorted(self.samples))
        logprobs = self.read.logprobs if self.request.prompt_logprobs else None
        events.append(Finished(self.request.key, Result(samples, logprobs, self.read.topk, self.cached)))

    def fail(self, error: Exception, events: list[Event]) -> None:
        if not self.over:
            self.over = True
            events.append(Failed(self.request.key, error))

    def no_number(self, where: str) -> FormatError:
        names = ", ".join(repr(adapter.name) for adapter in self.request.stack)
        who = f"The adapter {names}" if len(self.request.stack) == 1 else f"The stack of adapters {names}"
        return FormatError(
            f"{who if names else 'The model'} gives log-probabilities that are no numbers at {where}.",
            hint="Its weights are too large, or not finite." if names else None,
        )


@dataclass(slots=True, eq=False)
class Row:
    """Draw `index` of a job. `place` is where its keys are, None without."""

    job: Job
    index: int
    rng: Draws
    place: Place | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk: list[tuple[list[int], list[float]]] = field(default_factory=list)
    stopped: bool = False
    done: bool = False

    @property
    def dead(self) -> bool:
        """Whether nothing more is to be computed for it."""
        return self.done or self.job.over

    @property
    def left(self) -> int:
        """How many more tokens it may have."""
        return self.job.request.params.max_tokens - len(self.tokens)

    def take(self, token: int, logprob: float) -> None:
        params = self.job.request.params
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.stopped = params.stops(self.tokens)
        self.done = self.stopped or len(self.tokens) >= params.max_tokens

    def sample(self) -> Sample:
        k, topk = self.job.request.topk_sample, None
        if k:
            topk = TopK.empty(len(self.tokens), k)
            for at, (ids, values) in enumerate(self.topk):
                topk.ids[at, : len(ids)] = ids
                topk.logprobs[at, : len(values)] = values
        return Sample(tuple(self.tokens), tuple(self.logprobs), self.stopped, topk)


def take(rows: Sequence[Row], logits_RV: Tensor, events: list[Event], kernels: Kernels | None) -> None:
    """The next token of each row, drawn from its logits. `kernels` are for these."""
    add(rows, *(_drawn(rows, logits_RV, kernels) or _chosen(rows, logits_RV)), events)


def add(rows: Sequence[Row], tokens: Sequence[int], logprobs: Sequence[float], events: list[Event]) -> None:
    """A token and its log-probability to every row that goes on; a row where that is no number fails its job."""
    for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
        if row.dead:
            continue
        if math.isnan(logprob):  # one logit that is no number leaves none in its row
            row.job.fail(row.job.no_number(f"token {len(row.tokens)} of sample {row.index}"), events)
            continue
        row.take(token, logprob)
        if row.job.request.tells:
            events.append(Token(row.job.request.key, row.index, token, logprob))


def _drawn(rows: Sequence[Row], logits_RV: Tensor, kernels: Kernels | None) -> tuple[list[int], list[float]] | None:
    """Tokens and log-probabilities of rows that ask for no more, in one call; None where one does."""
    if kernels is None or not all(row.job.plain for row in rows) or not logits_RV.is_contiguous():
        return None
    heats = [row.job.request.params.temperature for row in rows]
    uniform = [row.rng() if heat else 0.0 for row, heat in zip(rows, heats, strict=True)]
    tokens_R, values_R = kernels.draw(logits_RV, heats, uniform)
    return tokens_R.tolist(), values_R.tolist()


def _chosen(rows: Sequence[Row], logits_RV: Tensor) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities, in whatever way the rows ask for them; their likeliest tokens go into the rows."""
    logprobs_RV = logits_RV.float().log_softmax(-1)
    chosen_R = choose(logprobs_RV, [row.job.request.params for row in rows], [row.rng for row in rows])
    values_R = logprobs_RV.gather(-1, chosen_R[:, None])[:, 0]
    asked = [i for i, row in enumerate(rows) if row.job.request.topk_sample]
    if asked:
        most = max(rows[i].job.request.topk_sample for i in asked)
        ids_AK, values_AK = likeliest(logprobs_RV[torch.tensor(asked, device=logprobs_RV.device)], most)
        for i, ids, own in zip(asked, ids_AK.tolist(), values_AK.tolist(), strict=True):
            k = rows[i].job.request.topk_sample
            rows[i].topk.append((ids[:k], own[:k]))
    return chosen_R.tolist(), values_R.tolist()
