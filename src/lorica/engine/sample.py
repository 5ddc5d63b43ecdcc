"""Sampling mixed adapters in one batch: packed prompts once, then one token of every unfinished row at each step.

In: prompts, each with its adapter. Out: sampled tokens with log-probabilities.
Prompts run through the engine's own packed pass, so no padding is computed and the numbers are those of
`Engine.forward`. Refuses to know text, users and files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorica.core.errors import DataError, LoricaError
from lorica.data.packing import end_to_end
from lorica.engine.abilities import FAILURES, close, probe_row
from lorica.engine.attention import without_mask
from lorica.engine.checks import check_tokens
from lorica.engine.decode import stepwise_linears
from lorica.engine.host import Host, RowSpec
from lorica.engine.kv_cache import KVCache
from lorica.engine.route import Stack
from lorica.engine.trunk import Trunk
from lorica.models.positions import context, uniform_positions
from lorica.sampling.logits import generators, pick
from lorica.sampling.params import SamplingParams

KEPT = "steps"
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
    stack: Stack
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

    A row's tokens do not depend on the other rows, up to the rounding of joint products. Where a backbone cannot take
    tokens one by one, every token costs a pass over its whole row.

    Args:
        rows: prompts of at least one token, each with an adapter's name, a stack of names, or None for the base.
        seeds: of each row's draws; without, row i of the call draws from a generator seeded by (params.seed, i).

    Raises: DataError for an empty prompt, an id outside the vocabulary, or positions beyond the model's; RouteError
    for an unknown adapter; MethodError for a model that is no causal language model.
    """
    if seeds is not None and len(seeds) != len(rows):
        raise DataError(f"There are {len(rows)} prompts and {len(seeds)} seeds; each prompt needs one.")
    trunk = Trunk(host)
    names = [f"Prompt {index}" for index in range(len(rows))]
    empty = next((name for name, (prompt, _) in zip(names, rows, strict=True) if not prompt), None)
    if empty is not None:
        raise DataError(f"{empty} is empty; a model needs at least one token to go on from.")
    check_tokens(host.backbone, [prompt for prompt, _ in rows], names)
    if not rows:
        return []
    stacks = host.stacks([spec for _, spec in rows])
    rngs = generators(len(rows), params) if seeds is None else [generators(1, params, seed)[0] for seed in seeds]
    given = zip(rows, stacks, rngs, strict=True)
    batch = [_Row(i, prompt, stack, rng) for i, ((prompt, _), stack, rng) in enumerate(given)]
    # neighbours of one adapter share its product
    order: dict[Stack, int] = {}
    batch.sort(key=lambda row: order.setdefault(row.stack, len(order)))
    stepwise = steps(trunk)
    with _serving(trunk):
        _measure(trunk, batch, params)
        limit = uniform_positions(host.model)
        short = limit is None or max(row.total for row in batch) + params.max_tokens - 1 <= limit
        loop = _Steps if short and stepwise else _Passes
        loop(trunk, batch, params).run()
    batch.sort(key=lambda row: row.index)
    return [Sample(tuple(row.tokens), tuple(row.logprobs), row.stopped) for row in batch]


def steps(trunk: Trunk) -> bool:
    """Whether a token fed behind kept keys gives what it gives in a packed pass; asked once for the frozen weights.

    Raises MethodError for a backbone that cannot run packed passes at all.
    """
    if not trunk.packs():
        return False
    kept = trunk.backbone.kept
    if KEPT not in kept:
        row = probe_row(trunk.backbone)
        batch = [_Row(0, row[:2], (), torch.Generator(), total=2)]
        try:
            with trunk.modes(training=False):
                fed = _Steps(trunk, batch, SamplingParams(max_tokens=len(row))).force(row[2:])
                kept[KEPT] = close(fed, trunk.alone(row)[2:])
        except (LoricaError, *FAILURES):
            kept[KEPT] = False
    return bool(kept[KEPT])


@contextmanager
def _serving(trunk: Trunk) -> Iterator[None]:
    """Eval mode; every update is lowered once, for no adapter changes while rows are sampled."""
    executor = trunk.host.executor
    with trunk.modes(training=False):
        executor.memo = {}
        try:
            yield
        finally:
            executor.memo = None


def _measure(trunk: Trunk, batch: list[_Row], params: SamplingParams) -> None:
    """Count each row's virtual and real positions. Raises DataError where they do not fit into the model."""
    most = context(trunk.host.model)
    for row, (soft, prefix) in zip(batch, trunk.virtual([row.stack for row in batch]), strict=True):
        row.prefix, row.total = prefix, prefix + soft + len(row.prompt)
        needed = row.total + params.max_tokens - 1  # the last token is not fed
        if most is not None and needed > most:
            virtual = f" and {prefix + soft} virtual tokens" if prefix + soft else ""
            raise DataError(
                f"Prompt {row.index} has {len(row.prompt)} tokens{virtual}, and {params.max_tokens} are to be sampled: "
                f"{needed} positions, but this model has {most}.",
                hint=f"Shorten the prompt, or set max_tokens to at most {most - row.total + 1}."
                if row.total <= most
                else "Shorten the prompt.",
            )


class _Loop(ABC):
    """The rows of one call, and the loop over their tokens."""

    def __init__(self, trunk: Trunk, batch: list[_Row], params: SamplingParams) -> None:
        self.trunk, self.host, self.params = trunk, trunk.host, params
        self.batch = batch
        self.stops = frozenset(params.stop_ids)
        self.device = trunk.backbone.device

    @abstractmethod
    def run(self) -> None:
        """Fill in every row's sample."""

    def passes(self, chunks: Sequence[Sequence[int]], *, before: Callable[[Sequence[int]], None]) -> Tensor:
        """The last hidden state of each row, from packed passes over prompts and what was sampled."""
        last: list[Tensor] = []
        for chunk in chunks:
            before(chunk)
            rows = [self.batch[i] for i in chunk]
            tokens = [[*row.prompt, *row.tokens] for row in rows]
            lengths = [len(own) for own in tokens]
            with self.host.rows([row.stack for row in rows], lengths=lengths):
                hidden_ND = self.trunk.hidden(end_to_end(tokens))
            last.append(hidden_ND[torch.tensor(lengths, device=self.device).cumsum(0) - 1])
        return torch.cat(last)

    def chunks(self) -> list[list[int]]:
        """Rows whose prompts share a pass of bounded length."""
        found: list[list[int]] = []
        room = 0
        for index, row in enumerate(self.batch):
            if not found or row.total > room:
                found.append([])
                room = PROMPT_BUDGET
            found[-1].append(index)
            room -= row.total
        return found

    def take(self, hidden_RD: Tensor) -> None:
        """The next token of each row. Finished rows that are still in the batch take nothing."""
        backbone = self.trunk.backbone
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


class _Passes(_Loop):
    """A pass over the whole row for each token: for backbones that keep more than keys and values, row by row."""

    def run(self) -> None:
        while self.batch:
            hidden_RD = self.passes([[i] for i in range(len(self.batch))], before=lambda chunk: None)
            with self.host.rows([row.stack for row in self.batch]):
                self.host.begin()
                self.take(hidden_RD)
            self.batch = [row for row in self.batch if not row.done]


class _Steps(_Loop):
    """Prompts once, then one token of every unfinished row at each step, behind kept keys and values."""

    def __init__(self, trunk: Trunk, batch: list[_Row], params: SamplingParams) -> None:
        super().__init__(trunk, batch, params)
        limit = max(row.total for row in batch) + params.max_tokens - 1
        self.cache = KVCache([row.total for row in batch], [row.prefix for row in batch], limit, self.device)

    def run(self) -> None:
        with self._caching():
            hidden_RD: Tensor | None = self._prompts()
            while self.batch:
                with self.host.rows([row.stack for row in self.batch]), stepwise_linears(self.host.executor):
                    self.host.begin()
                    self._until_thinner(hidden_RD)
                hidden_RD = None
                kept = [i for i, row in enumerate(self.batch) if not row.done]
                if kept:
                    self.cache.keep(kept)
                self.batch = [self.batch[i] for i in kept]

    def force(self, tokens: Sequence[int]) -> Tensor:
        """Feed given tokens to the only row. Returns the hidden states [tokens, width] that each led to."""
        with self._caching():
            self._prompts()
            found = []
            with self.host.rows([row.stack for row in self.batch]), stepwise_linears(self.host.executor):
                self.host.begin()
                for token in tokens:
                    self.batch[0].tokens.append(token)
                    found.append(self._feed())
        return torch.cat(found)

    @contextmanager
    def _caching(self) -> Iterator[None]:
        hub = self.trunk.hub
        before, hub.cache = hub.cache, self.cache
        try:
            yield
        finally:
            hub.cache = before

    def _prompts(self) -> Tensor:
        def fill(chunk: Sequence[int]) -> None:
            self.cache.filling = list(chunk)

        return self.passes(self.chunks(), before=fill)

    def _until_thinner(self, hidden_RD: Tensor | None) -> None:
        """Sample tokens until so many rows are finished that the rest are better off alone."""
        while True:
            if hidden_RD is None:
                hidden_RD = self._feed()
            self.take(hidden_RD)
            live = sum(not row.done for row in self.batch)
            if live <= THIN * len(self.batch):
                return
            hidden_RD = None

    def _feed(self) -> Tensor:
        """Feed each row's last token. Returns the hidden states [rows, width]."""
        trunk = self.trunk.backbone.trunk
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
