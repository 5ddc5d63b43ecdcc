"""Prompts in packed passes: keys and values for the rows to come, the last hidden state, scores of the prompt's tokens.

In: prompts, each with its stack, under no route. Out: what each pass found, prompt by prompt; logits of more than a
few positions never exist at a time. Refuses to know requests, samples and who waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorica.data.packing import end_to_end
from lorica.engine.attention import without_mask
from lorica.engine.chain import Walk, last_block
from lorica.engine.decode import prompt_maps
from lorica.engine.fast import fast_modules
from lorica.engine.groups import Group
from lorica.engine.joined import JoinedMaps
from lorica.engine.kv_cache import Filling, KVCache
from lorica.engine.kv_lane import Kept
from lorica.engine.requests import TopK
from lorica.engine.route import Stack
from lorica.engine.trunk import Trunk
from lorica.engine.updates import Updates
from lorica.sampling.logits import likeliest

CHUNK_BYTES = 2**25
"""About the memory of the logits and log-probabilities that exist at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """Tokens to read. `prefix`: virtual positions of prefixes before them; `scores` asks for every token's
    log-probability, `topk` for the likeliest tokens at each position.
    """

    tokens: Sequence[int]
    stack: Stack
    prefix: int = 0
    scores: bool = False
    topk: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """What a pass found: the hidden state [width] behind the last token, keys and values, and what was asked for."""

    hidden_D: Tensor
    kept: Kept | None = None
    logprobs: NDArray[np.float32] | None = None
    topk: TopK | None = None


@contextmanager
def caching(trunk: Trunk, cache: KVCache | None) -> Iterator[None]:
    """Inside, attention meets this cache."""
    before, trunk.hub.cache = trunk.hub.cache, cache
    try:
        yield
    finally:
        trunk.hub.cache = before


def head(trunk: Trunk, hidden_ND: Tensor) -> Tensor:
    """Logits under the present route."""
    backbone = trunk.backbone
    assert backbone.head is not None
    return backbone.logits_transform(backbone.head(hidden_ND))


def read(trunk: Trunk, prompts: Sequence[Prompt], *, keep: bool, updates: Updates | None = None) -> list[Read]:
    """One packed pass over prompts; with `keep`, their keys and values too. `updates` are what is kept of adapters that
    do not change.
    """
    lengths = [len(prompt.tokens) for prompt in prompts]
    cache = KVCache(trunk.backbone.device) if keep else None
    if cache is not None:
        cache.filling = Filling([prompt.prefix for prompt in prompts])
    stacks, executor = [prompt.stack for prompt in prompts], trunk.host.executor
    with trunk.host.rows(stacks, lengths=lengths):
        every = any(prompt.scores or prompt.topk for prompt in prompts)
        cut = None if every else trunk.cut(lengths)
        known: dict[Group, JoinedMaps] = {}
        if updates is not None and not trunk.longer(len(stacks)):
            known = prompt_maps(executor, stacks, lengths, updates, None if cut is None else last_block(executor))
        packed = end_to_end([prompt.tokens for prompt in prompts])
        with fast_modules(executor, known), caching(trunk, cache):
            hidden_ND = trunk.hidden(packed, cut)
        found, start = [], 0
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            logprobs, topk = _scores(trunk, prompt, hidden_ND, start)
            kept = None if cache is None or cache.filling is None else cache.filling.rows[index]
            last_D = hidden_ND[start + length - 1 if cut is None else index]
            found.append(Read(last_D.clone(), kept, logprobs, topk))
            start += length
    return found


def feed(trunk: Trunk, cache: KVCache, ids_RT: Tensor, positions_RT: Tensor, walk: Walk | None = None) -> Tensor:
    """The newest tokens of each row behind what is cached, under a route of rows. Returns [rows, tokens, width]. `walk`
    takes the place of the trunk's own pass.
    """
    module = trunk.backbone.trunk
    assert module is not None
    with caching(trunk, cache), without_mask():
        if walk is not None:
            return walk(ids_RT, positions_RT)
        hidden_RTD: Tensor = module(
            input_ids=ids_RT,
            position_ids=positions_RT,
            # the cache has masks of its own; a mask of four axes stops transformers from making one
            attention_mask=torch.zeros(ids_RT.shape[0], 1, 1, 1, device=ids_RT.device),
            use_cache=False,
        )[0]
    return hidden_RTD


def read_on(trunk: Trunk, kept: Kept, tokens: Sequence[int], stack: Stack) -> tuple[Tensor, Kept]:
    """Tokens behind the kept positions of their row. Returns their hidden states [tokens, width], and all that is kept
    now.
    """
    cache = KVCache(trunk.backbone.device)
    total = kept.total + len(tokens)
    cache.claim(total)
    place = cache.put([(kept, total)])[0]
    cache.order([place])
    lane = place.lane
    if lane.slot + len(tokens) >= lane.capacity:
        lane.arrange(1, total, lane.span - 1)
    lane.advance(len(tokens))
    positions_1T = torch.arange(kept.total, total, device=trunk.backbone.device)[None]
    with trunk.host.rows([stack]):
        trunk.host.begin()
        hidden_1TD = feed(trunk, cache, trunk.tensor([list(tokens)]), positions_1T)
    return hidden_1TD[0], lane.kept(place, total)


def _scores(
    trunk: Trunk, prompt: Prompt, hidden_ND: Tensor, start: int
) -> tuple[NDArray[np.float32] | None, TopK | None]:
    """Log-probabilities [T] of a prompt's tokens, NaN at 0, and the likeliest tokens; the prompt begins at `start`."""
    if not (prompt.scores or prompt.topk):
        return None, None
    count = len(prompt.tokens)
    logprobs = np.full(count, np.nan, np.float32)
    topk = TopK.empty(count, prompt.topk)
    run = trunk.host.windowed(lambda hidden_CD: head(trunk, hidden_CD))
    targets = trunk.tensor(list(prompt.tokens))
    vocabulary = trunk.backbone.weight("input").matrix().shape[1]
    rows = max(8, CHUNK_BYTES // (8 * vocabulary))
    for at in range(0, count - 1, rows):
        stop = min(count - 1, at + rows)
        with fast_modules(trunk.host.executor):
            logits_CV = run(hidden_ND[start + at : start + stop], start + at)
        logprobs_CV = logits_CV.float().log_softmax(-1)
        own_C = logprobs_CV.gather(1, targets[at + 1 : stop + 1, None])[:, 0]
        logprobs[at + 1 : stop + 1] = own_C.cpu().numpy()
        if prompt.topk:
            ids_CK, values_CK = likeliest(logprobs_CV, prompt.topk)
            topk.ids[at + 1 : stop + 1, : ids_CK.shape[1]] = ids_CK.cpu().numpy()
            topk.logprobs[at + 1 : stop + 1, : ids_CK.shape[1]] = values_CK.cpu().numpy()
    return logprobs, topk if prompt.topk else None
