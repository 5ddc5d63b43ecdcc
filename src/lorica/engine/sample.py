"""Sampling mixed adapters in one batch: packed prompts once, then one token of every unfinished row at each step.

In: prompts, each with its adapter. Out: sampled tokens with log-probabilities.
Prompts run through the engine's own packed pass, so no padding is computed and the numbers are those of
`Engine.forward`. Refuses to know text, users and files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lorica.core.errors import DataError
from lorica.core.update import SoftPrompt
from lorica.data.packing import Packed
from lorica.engine.attention import without_mask
from lorica.engine.decode import stepwise_linears
from lorica.engine.engine import Engine
from lorica.engine.host import Host, RowSpec
from lorica.engine.kv_cache import KVCache
from lorica.sampling.logits import generators, pick
from lorica.sampling.params import SamplingParams

PROMPT_BUDGET = 8192
"""Most prompt tokens of one packed pass; a longer prompt runs alone."""
THIN = 0.75
"""The batch is made smaller once no more than this share of its rows is unfinished."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Sampled tokens (a stop token included), their log-probabilities, and whether a stop token ended them."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool


@dataclass(slots=True, eq=False)
class _Row:
    """A prompt on its way: `total` counts its virtual and real positions, `prefix` those of prefixes."""

    index: int
    prompt: Sequence[int]
    adapter: RowSpec
    rng: torch.Generator
    prefix: int = 0
    total: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    done: bool = False


@torch.no_grad()
def generate(
    host: Host,
    rows: Sequence[tuple[Sequence[int], RowSpec]],
    params: SamplingParams,
    *,
    seeds: Sequence[int] | None = None,
) -> list[Sample]:
    """One sample for each (prompt, adapter), in their order.

    A row's tokens do not depend on the other rows, up to the rounding of joint products.

    Args:
        rows: prompts of at least one token, each with an adapter's name, a stack of names, or None for the base.
        seeds: of each row's draws; without, row i of the call draws from a generator seeded by (params.seed, i).

    Raises: DataError for an empty prompt, an id outside the vocabulary, or positions beyond the model's; RouteError
    for an unknown adapter; MethodError for a model that is no causal language model.
    """
    if seeds is not None and len(seeds) != len(rows):
        raise DataError(f"There are {len(rows)} prompts and {len(seeds)} seeds; each prompt needs one.")
    engine = Engine(host)
    _check_prompts(host, [prompt for prompt, _ in rows])
    if not rows:
        return []
    rngs = generators(len(rows), params) if seeds is None else [generators(1, params, seed)[0] for seed in seeds]
    batch = [_Row(i, prompt, spec, rng) for i, ((prompt, spec), rng) in enumerate(zip(rows, rngs, strict=True))]
    # neighbours of one adapter share its product
    order: dict[str, int] = {}
    batch.sort(key=lambda row: order.setdefault(repr(row.adapter), len(order)))
    with _serving(host):
        _measure(host, batch, params)
        _Generation(engine, batch, params).run()
    batch.sort(key=lambda row: row.index)
    return [Sample(tuple(row.tokens), tuple(row.logprobs), row.stopped) for row in batch]


def _check_prompts(host: Host, prompts: Sequence[Sequence[int]]) -> None:
    tokens = host.backbone.weight("input").matrix().shape[1]
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"Prompt {index} is empty; a model needs at least one token to go on from.")
        wrong = next((token for token in prompt if not 0 <= token < tokens), None)
        if wrong is not None:
            raise DataError(f"Prompt {index} has token id {wrong}; this model's ids are 0 to {tokens - 1}.")


@contextmanager
def _serving(host: Host) -> Iterator[None]:
    """Eval mode; every update is lowered once, for no adapter changes while rows are sampled."""
    was_training = host.model.training
    host.eval()
    host.executor.memo = {}
    try:
        yield
    finally:
        host.executor.memo = None
        host.train(was_training)


def _measure(host: Host, batch: list[_Row], params: SamplingParams) -> None:
    """Count each row's virtual and real positions. Raises DataError where they do not fit into the model."""
    most = getattr(getattr(host.model, "config", None), "max_position_embeddings", None)
    site = host.backbone.sites.get("input")
    with host.rows([row.adapter for row in batch]):
        prefixes = host.attention_hub().prefix_lengths(len(batch))
        soft = [0] * len(batch)
        for item in host.executor.work_for_rows(site, len(batch)) if site is not None else []:
            soft[item.start] = sum(u.embeddings_PD.shape[0] for u in item.updates if isinstance(u, SoftPrompt))
    for row, prefix, extra in zip(batch, prefixes, soft, strict=True):
        row.prefix, row.total = prefix, prefix + extra + len(row.prompt)
        if most is not None and row.total + params.max_tokens > most:
            virtual = f" and {prefix + extra} virtual tokens" if prefix + extra else ""
            raise DataError(
                f"Prompt {row.index} has {len(row.prompt)} tokens{virtual}, and {params.max_tokens} are to be sampled: "
                f"{row.total + params.max_tokens} positions, but this model has {most}.",
                hint=f"Shorten the prompt, or set max_tokens to at most {most - row.total}."
                if row.total < most
                else "Shorten the prompt.",
            )


class _Generation:
    """The rows of one call, their cache, and the loop over steps."""

    def __init__(self, engine: Engine, batch: list[_Row], params: SamplingParams) -> None:
        self.engine, self.host, self.params = engine, engine.host, params
        self.batch = batch
        self.stops = frozenset(params.stop_ids)
        self.device = self.host.backbone.device
        limit = max(row.total for row in batch) + params.max_tokens - 1
        self.cache = KVCache([row.total for row in batch], [row.prefix for row in batch], limit, self.device)

    def run(self) -> None:
        """Fill in every row's sample."""
        hub = self.engine.hub
        hub.cache = self.cache
        try:
            hidden_RD: Tensor | None = self._prompts()
            while self.batch:
                with self.host.rows([row.adapter for row in self.batch]), stepwise_linears(self.host.executor):
                    self.host.begin()
                    self._until_thinner(hidden_RD)
                hidden_RD = None
                kept = [i for i, row in enumerate(self.batch) if not row.done]
                if kept:
                    self.cache.keep(kept)
                self.batch = [self.batch[i] for i in kept]
        finally:
            hub.cache = None

    def _prompts(self) -> Tensor:
        """Run all prompts, in passes of bounded length. Returns the last hidden state of each row."""
        last: list[Tensor] = []
        for chunk in self._chunks():
            self.cache.filling = chunk
            rows = [self.batch[i] for i in chunk]
            lengths = [len(row.prompt) for row in rows]
            with self.host.rows([row.adapter for row in rows], lengths=lengths):
                hidden_ND = self.engine.hidden(_packed([row.prompt for row in rows]))
            last.append(hidden_ND[torch.tensor(lengths, device=self.device).cumsum(0) - 1])
        return torch.cat(last)

    def _chunks(self) -> list[list[int]]:
        chunks: list[list[int]] = []
        room = 0
        for index, row in enumerate(self.batch):
            if not chunks or row.total > room:
                chunks.append([])
                room = PROMPT_BUDGET
            chunks[-1].append(index)
            room -= row.total
        return chunks

    def _until_thinner(self, hidden_RD: Tensor | None) -> None:
        """Sample tokens until so many rows are finished that the rest are better off alone."""
        while True:
            if hidden_RD is None:
                hidden_RD = self._feed()
            self._take(hidden_RD)
            live = sum(not row.done for row in self.batch)
            if live <= THIN * len(self.batch):
                return
            hidden_RD = None

    def _take(self, hidden_RD: Tensor) -> None:
        """The next token of each row. Finished rows that are still in the batch draw nothing."""
        backbone = self.host.backbone
        assert backbone.head is not None
        logits_RV = backbone.logits_transform(backbone.head(hidden_RD))
        chosen_R, logprob_R = pick(logits_RV, self.params, [row.rng for row in self.batch])
        for row, token, logprob in zip(self.batch, chosen_R.tolist(), logprob_R.tolist(), strict=True):
            if row.done:
                continue
            row.tokens.append(token)
            row.logprobs.append(logprob)
            row.stopped = token in self.stops
            row.done = row.stopped or len(row.tokens) == self.params.max_tokens

    def _feed(self) -> Tensor:
        """Feed each row's last token. Returns the hidden states [rows, width]."""
        trunk = self.host.backbone.trunk
        assert trunk is not None
        self.cache.advance()
        ids_R1 = torch.tensor([[row.tokens[-1]] for row in self.batch], device=self.device)
        with without_mask():
            hidden_R1D: Tensor = trunk(
                input_ids=ids_R1,
                position_ids=self.cache.positions(),
                # the cache has masks of its own; a mask of four axes stops transformers from making one
                attention_mask=torch.zeros(len(self.batch), 1, 1, 1, device=self.device),
                use_cache=False,
            )[0]
        return hidden_R1D[:, 0]


def _packed(prompts: Sequence[Sequence[int]]) -> Packed:
    """Prompts end to end; nothing is asked of them."""
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    tokens = np.concatenate([np.array(prompt, dtype=np.int64) for prompt in prompts])
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    nothing = np.zeros(len(tokens), dtype=np.int64)
    return Packed(
        tokens, nothing, nothing.astype(np.float32), positions, lengths, np.zeros(len(prompts), dtype=np.int64)
    )
